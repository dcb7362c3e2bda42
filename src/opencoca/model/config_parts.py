"""What the parts of a CoCa are made of: frozen dataclasses for the image encoder, the poolers, the decoders, the rest.

Users import them from `opencoca.model.config`, where `CoCaConfig` joins them.
Letters: D width, E embed_dim, N image features, Q pooler queries, V vocabulary, H heads.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from opencoca.model.config_checks import as_pair, check_counts, check_divides, check_dropout, check_fields

Activation = Literal["gelu", "quick_gelu", "swiglu"]


@dataclass(frozen=True)
class BlockConfig:
    """What one transformer block needs to know; `CoCaConfig` has one for the blocks of each part.

    norm_context: cross-attention normalises what it looks at. layer_scale: what is added to the residual stream is
    multiplied by learned factors, one a channel, that start at this value (arXiv 2103.17239); None = it is not.
    """

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    parallel: bool = False
    activation: Activation = "gelu"
    norm_bias: bool = True
    linear_bias: bool = True
    rotary: bool = False
    dropout: float = 0.0
    norm_context: bool = False
    layer_scale: float | None = None


@dataclass(frozen=True)
class ImageEncoderConfig:
    """Images -> image features (B, N, D).

    The fields after image_size describe the ViT and are ignored by the other encoders; ``width`` is also that of the
    features of a custom one.

    Args:
        name: vit; efficientnet_lite0 to efficientnet_lite2; timm:MODEL (extra timm); or custom, in Python alone: a
            module that is handed over when the CoCa is built, ``CoCa(config, image_encoder=module)``.
        image_size: height and width in pixels that the model is made for; other sizes work (positions are
            interpolated).
        patch_size: side of the square patches that an image is cut into, in pixels.
        width: channels of a patch's vector.
        depth: number of blocks.
        num_heads: attention heads of a block.
        mlp_width: channels inside a block's MLP.
        dropout: this part of what a block adds is left out in training.
        head_dim: channels of an attention head; None = width / num_heads.
        activation: of the MLPs: gelu, quick_gelu (x sigmoid(1.702 x)) or swiglu.
    """

    name: str = "vit"
    image_size: tuple[int, int] = (288, 288)
    patch_size: int = 18
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_width: int = 3072
    dropout: float = 0.0
    head_dim: int | None = None
    activation: Activation = "gelu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_pair(self.image_size, "image_size"))
        check_fields("image", self)
        check_dropout("image", self.dropout)
        if self.name == "vit":
            check_counts("image", self, "patch_size", "width", "depth", "num_heads", "mlp_width", "head_dim")
            check_divides("patch_size", self.patch_size, "image height", self.image_size[0])
            check_divides("patch_size", self.patch_size, "image width", self.image_size[1])
            if self.head_dim is None:
                check_divides("num_heads", self.num_heads, "width", self.width)


@dataclass(frozen=True)
class HeadConfig:
    """What a task adds to the network: an attentional pooler of one query over image features, and a linear map.

    Args:
        num_outputs: of the linear map, such as the number of classes.
        num_heads: attention heads of the pooler; None = one for every 64 channels of the features if 64 divides them,
            else one.
        dropout: this part of the pooled vector is left out in training.
    """

    num_outputs: int
    num_heads: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_fields("head", self)
        check_counts("head", self, "num_outputs", "num_heads")
        check_dropout("head", self.dropout)

    def block(self, width: int) -> BlockConfig:
        """For features of this width. Raises ValueError if the heads do not divide it."""
        num_heads = self.num_heads or (width // 64 if width % 64 == 0 else 1)
        check_divides("head num_heads", num_heads, "width of the image features", width)
        return BlockConfig(width, num_heads, num_heads, width // num_heads, mlp_width=0)


@dataclass(frozen=True)
class LinearConfig:
    """A dual encoder without depth beside the deep one, see `layers.linear_branch`: its embedding stands behind that.

    Args:
        dim: how many numbers of it learn from pairs of images and texts; 0 = there is no linear branch.
        class_dim: how many more are fitted to the classifier that the image encoder comes with; 0 = none.
        weight: of the similarity of those that learn from pairs, where that of the deep embedding has 1.
        class_weight: likewise, of a class's name and an image that shows it.
        label_weight: how long the class part of a label to classify by is, where that of a name is 1 in other texts.
        image_dropout: this part of an image's pooled features is left out in training.
        word_dropout: this part of a text's words is left out in training.
    """

    dim: int = 0
    class_dim: int = 0
    weight: float = 2.0
    class_weight: float = 2.0
    label_weight: float = 6.0
    image_dropout: float = 0.7
    word_dropout: float = 0.1

    def __post_init__(self) -> None:
        check_fields("linear", self)
        for name in ("dim", "class_dim"):
            if getattr(self, name) < 0:
                raise ValueError(f"linear {name} {getattr(self, name)} must be at least 0")
        if self.class_dim and not self.dim:
            raise ValueError(f"linear class_dim {self.class_dim} needs a linear branch: set linear dim as well")
        check_dropout("linear image", self.image_dropout)
        check_dropout("linear word", self.word_dropout)
        for name in ("weight", "class_weight", "label_weight"):
            if getattr(self, name) <= 0:
                raise ValueError(f"linear {name} {getattr(self, name)} must be more than 0")


@dataclass(frozen=True)
class PoolerConfig:
    """How image features become image tokens (B, Q, D) and one image embedding (B, E).

    Args:
        arrangement: cascade (the paper: the contrastive pooler reads the captioning pooler's output), parallel (both
            read the image features), shared (one pooler of num_queries queries: the first is the image embedding, the
            others are the image tokens), class_token (nothing is pooled: the class token of a ViT is the image
            embedding, its patches are the image tokens; the fields below are ignored).
        num_queries: of the captioning pooler; 0 hands the image features themselves to the decoder (projected if their
            width differs), so that nothing is pooled.
        num_heads: attention heads of a pooler.
        project_queries: False learns the queries where they are used, in the attention's own space: the same functions
            as with a projection, and width^2 fewer parameters a pooler.
        dropout: this part of the image features is left out in training, before any pooling.
        num_kv_heads: key-value heads of a pooler; None = as many as heads; 1 = one that they share.
    """

    arrangement: Literal["cascade", "parallel", "shared", "class_token"] = "cascade"
    num_queries: int = 256
    num_heads: int = 12
    project_queries: bool = False
    dropout: float = 0.0
    num_kv_heads: int | None = None

    def __post_init__(self) -> None:
        check_fields("pooler", self)
        check_dropout("pooler", self.dropout)
        check_counts("pooler", self, "num_heads", "num_kv_heads")
        check_divides("pooler num_kv_heads", self.num_kv_heads or self.num_heads, "pooler num_heads", self.num_heads)
        least = 2 if self.arrangement == "shared" else 0
        if self.num_queries < least:
            raise ValueError(f"num_queries {self.num_queries} is too few: a {self.arrangement} pooler needs {least}")


@dataclass(frozen=True)
class TextConfig:
    """Both halves of the text decoder.

    Args:
        vocab_size: number of words and special ids; the tokenizer's.
        context_length: the most words (special ids included) a text may have, [CLS] not counted.
        width: channels of a word's vector.
        unimodal_depth: number of blocks of the half that sees the text alone.
        multimodal_depth: number of layers of the half that sees the image too.
        num_heads: attention heads of a block.
        num_kv_heads: key-value heads; None = as many as heads; 1 = one that they share; between = grouped.
        head_dim: channels of an attention head; None = width / num_heads.
        mlp_width: channels inside a block's MLP.
        block: serial (pre-norm, attention then MLP) or parallel (PaLM: both from one norm, added).
        positions: of the words: learned vectors, or rotary.
        activation: of the MLPs: gelu, quick_gelu or swiglu.
        norm_bias: whether the norms have biases.
        linear_bias: whether the linear maps have biases.
        tie_embeddings: one matrix embeds words and scores the next one.
        dropout: this part of what a block adds is left out in training.
    """

    vocab_size: int = 64_000
    context_length: int = 64
    width: int = 768
    unimodal_depth: int = 12
    multimodal_depth: int = 12
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int = 3072
    block: Literal["serial", "parallel"] = "serial"
    positions: Literal["learned", "rotary"] = "learned"
    activation: Activation = "gelu"
    norm_bias: bool = True
    linear_bias: bool = True
    tie_embeddings: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_fields("text", self)
        check_dropout("text", self.dropout)
        check_counts("text", self, "vocab_size", "context_length", "width", "unimodal_depth", "multimodal_depth")
        check_counts("text", self, "num_heads", "num_kv_heads", "head_dim", "mlp_width")
        if self.head_dim is None:
            check_divides("num_heads", self.num_heads, "width", self.width)
        check_divides("num_kv_heads", self.num_kv_heads or self.num_heads, "num_heads", self.num_heads)
        head_dim = self.head_dim or self.width // self.num_heads
        if self.positions == "rotary" and head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {head_dim}")


@dataclass(frozen=True)
class Compat:
    """What weights of other projects need and a new model does not: whoever trains one leaves all of this alone.

    The keys that begin with image are of the image encoder, a ViT; the others are of the poolers and the text decoder.

    Args:
        image_patch_norm: the pixels of a patch are normalised before their projection, and the patch after it
            (vit_pytorch).
        image_positions: learned, or sincos: fixed sines and cosines of row and column.
        image_class_token: a learned token stands before the patches, and is an image feature like them.
        image_patch_bias: whether the projection of the patches has a bias.
        image_pre_norm: the features are normalised before the first block.
        image_final_norm: the features are normalised after the last block.
        image_layer_scale: what a block adds is multiplied by learned factors, one a channel, that start at this value
            (arXiv 2103.17239); None = it is not.
        pooler_head_dim: channels of a pooler's attention head; None = text width / num_heads.
        pooler_norm_bias: whether the poolers' norms have biases.
        pooler_linear_bias: whether the poolers' linear maps have biases.
        pooler_norm_queries: the learned queries are normalised.
        pooler_norm_output: the pooled vectors are normalised.
        text_cls_position: which rotary position [CLS] has: after_last_word, or after_padding, the number of columns of
            token_ids, so that its vector depends on how far a text is padded (weights of coca_pytorch learned with it).
        text_self_attn_mlp: a multimodal layer has an MLP after self-attention as well as after cross-attention.
        text_norm_image_tokens: every multimodal layer normalises the image tokens before it looks at them.
        text_multimodal_num_heads: attention heads of the multimodal half; None = those of the unimodal one.
        text_multimodal_mlp_width: channels inside the MLPs of the multimodal half; None = those of the unimodal one.
        text_layer_scale: like image_layer_scale, of the text decoder's blocks.
        text_hidden_id: attention does not see positions that hold this id, as if they were padding; None = it sees all
            words. open_clip tells padding by its id, which is the word "!" as well.
        text_hide_next: not the position that holds the hidden id is hidden but the one after it, and position 0 never.
            A text that does not fill context_length is followed by one hidden id, which [CLS] sees (unless the last
            word is that id too) while it does not see itself. The weights of open_clip's CoCa learned with this mask.
        project_embeds: both vectors are projected into their common space; None = only where its width is not theirs.
    """

    image_patch_norm: bool = False
    image_positions: Literal["learned", "sincos"] = "learned"
    image_class_token: bool = False
    image_patch_bias: bool = True
    image_pre_norm: bool = False
    image_final_norm: bool = True
    image_layer_scale: float | None = None
    pooler_head_dim: int | None = None
    pooler_norm_bias: bool = True
    pooler_linear_bias: bool = True
    pooler_norm_queries: bool = False
    pooler_norm_output: bool = True
    text_cls_position: Literal["after_last_word", "after_padding"] = "after_last_word"
    text_self_attn_mlp: bool = False
    text_norm_image_tokens: bool = False
    text_multimodal_num_heads: int | None = None
    text_multimodal_mlp_width: int | None = None
    text_layer_scale: float | None = None
    text_hidden_id: int | None = None
    text_hide_next: bool = False
    project_embeds: bool | None = None

    def __post_init__(self) -> None:
        check_fields("compat", self)
        check_counts("compat", self, "pooler_head_dim", "text_multimodal_num_heads", "text_multimodal_mlp_width")
        if self.image_positions != "learned" and not self.image_patch_norm:
            raise ValueError("an image encoder with sincos positions must have image_patch_norm")
        if self.image_patch_norm and (self.image_pre_norm or not self.image_patch_bias):
            raise ValueError("an image encoder with image_patch_norm has image_patch_bias and no image_pre_norm")
        if self.text_hide_next and self.text_hidden_id is None:
            raise ValueError("text_hide_next needs a text_hidden_id")


def at_todays_places(model: Any) -> Any:
    """Stored fields of a model, of which some stood elsewhere before `Compat` had them; others are left as they are.

    Raises ValueError for what can no longer be built.
    """
    if not isinstance(model, dict):
        return model
    model = {name: dict(value) if isinstance(value, dict) else value for name, value in model.items()}
    names, moved = {field.name for field in fields(Compat)}, {}
    for part in ("image", "pooler", "text"):
        section = model.get(part)
        for name in [name for name in section if f"{part}_{name}" in names] if isinstance(section, dict) else ():
            moved[f"{part}_{name}"] = section.pop(name)
    if "project_embeds" in model:
        moved["project_embeds"] = model.pop("project_embeds")
    if isinstance(model.get("text"), dict) and not model["text"].pop("cross_attn_mlp", True):
        raise ValueError("text.cross_attn_mlp is False: layers without an MLP after cross-attention are not supported")
    return model | {"compat": moved | model.get("compat", {})} if moved else model
