"""What the parts of a CoCa are made of: frozen dataclasses, one for the image encoder, the poolers and the decoders.

Users import them from `opencoca.model.config`, where `CoCaConfig` joins them.
Letters: D width, E embed_dim, N image features, Q pooler queries, V vocabulary, H heads.
"""

from dataclasses import dataclass, replace
from typing import Literal

from opencoca.model.config_checks import as_pair, check_choice, check_counts, check_divides, check_dropout

Activation = Literal["gelu", "quick_gelu", "swiglu"]
ACTIVATIONS = ("gelu", "quick_gelu", "swiglu")


@dataclass(frozen=True)
class BlockConfig:
    """What one transformer block needs to know; the image and text configs hand it to their blocks.

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

    name: ``vit``; ``efficientnet_lite0`` to ``efficientnet_lite2``; ``timm:MODEL`` (extra ``timm``); or ``custom``, a
        module that is handed over when the CoCa is built: ``CoCa(config, image_encoder=module)``; ``width`` is that of
        its features.
    image_size: (height, width) in pixels that the model is made for; other sizes work (positions are interpolated).
    The remaining fields describe the ViT and are ignored by the other encoders.
    head_dim: None = width / num_heads.
    patch_norm: the pixels of a patch are normalised before their projection, and the patch after it (vit_pytorch).
    positions: ``learned``, or ``sincos``: fixed sines and cosines of row and column.
    class_token: a learned token stands before the patches, and is an image feature like them.
    patch_bias: whether the projection of the patches has a bias.
    pre_norm, final_norm: the features are normalised before the first block, after the last one.
    activation: ``gelu``, ``quick_gelu`` (x sigmoid(1.702 x)) or ``swiglu``; layer_scale: see `BlockConfig`.
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
    patch_norm: bool = False
    positions: Literal["learned", "sincos"] = "learned"
    class_token: bool = False
    final_norm: bool = True
    pre_norm: bool = False
    patch_bias: bool = True
    activation: Activation = "gelu"
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", as_pair(self.image_size, "image_size"))
        check_dropout("image", self.dropout)
        if self.name == "vit":
            check_counts("image", self, "patch_size", "width", "depth", "num_heads", "mlp_width", "head_dim")
            check_choice("image positions", self.positions, ("learned", "sincos"))
            check_choice("image activation", self.activation, ACTIVATIONS)
            if self.positions != "learned" and not self.patch_norm:
                raise ValueError("an image encoder with sincos positions must have patch_norm")
            if self.patch_norm and (self.pre_norm or not self.patch_bias):
                raise ValueError("an image encoder with patch_norm has a patch_bias and no pre_norm")
            if self.positions == "sincos" and (self.width % 4 or self.width < 8):
                raise ValueError(f"sincos positions need an image width of at least 8 that 4 divides, got {self.width}")
            check_divides("patch_size", self.patch_size, "image height", self.image_size[0])
            check_divides("patch_size", self.patch_size, "image width", self.image_size[1])
            if self.head_dim is None:
                check_divides("num_heads", self.num_heads, "width", self.width)

    def block(self) -> BlockConfig:
        return BlockConfig(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.head_dim or self.width // self.num_heads,
            mlp_width=self.mlp_width,
            activation=self.activation,
            dropout=self.dropout,
            layer_scale=self.layer_scale,
        )


@dataclass(frozen=True)
class PoolerConfig:
    """How image features become image tokens (B, Q, D) and one image embedding (B, E).

    arrangement: ``cascade`` (the paper: the contrastive pooler reads the captioning pooler's output),
        ``parallel`` (both read the image features), ``shared`` (one pooler of ``num_queries`` queries: the first
        is the image embedding, the others are the image tokens), ``class_token`` (nothing is pooled: the class token
        of a ViT is the image embedding, its patches are the image tokens; the fields below are ignored).
    num_queries: of the captioning pooler; 0 hands the image features themselves to the decoder (projected if their
        width differs), so that nothing is pooled.
    project_queries: False learns the queries where they are used, in the attention's own space: the same functions
        as with a projection, and width^2 fewer parameters a pooler.
    dropout: on the image features before any pooling.
    num_kv_heads: None = as many as heads; 1 = one shared key-value head. head_dim: None = text width / num_heads.
    norm_bias, linear_bias: whether norms and linear maps of the poolers have biases.
    norm_queries: the learned queries are normalised. norm_output: the pooled vectors are.
    """

    arrangement: Literal["cascade", "parallel", "shared", "class_token"] = "cascade"
    num_queries: int = 256
    num_heads: int = 12
    project_queries: bool = False
    dropout: float = 0.0
    num_kv_heads: int | None = None
    head_dim: int | None = None
    norm_bias: bool = True
    linear_bias: bool = True
    norm_queries: bool = False
    norm_output: bool = True

    def __post_init__(self) -> None:
        check_choice("pooler arrangement", self.arrangement, ("cascade", "parallel", "shared", "class_token"))
        check_dropout("pooler", self.dropout)
        check_counts("pooler", self, "num_heads", "num_kv_heads", "head_dim")
        check_divides("pooler num_kv_heads", self.num_kv_heads or self.num_heads, "pooler num_heads", self.num_heads)
        least = 2 if self.arrangement == "shared" else 0
        if self.num_queries < least:
            raise ValueError(f"num_queries {self.num_queries} is too few: a {self.arrangement} pooler needs {least}")

    def block(self, width: int) -> BlockConfig:
        """For a pooler whose queries and tokens have this width."""
        return BlockConfig(
            width=width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or width // self.num_heads,
            mlp_width=0,
            norm_bias=self.norm_bias,
            linear_bias=self.linear_bias,
        )


@dataclass(frozen=True)
class TextConfig:
    """Both halves of the text decoder.

    context_length: the most words (special ids included) a text may have, [CLS] not counted.
    num_kv_heads: None = as many as heads; 1 = one shared key-value head; between = grouped.
    block: ``serial`` (pre-norm, attention then MLP) or ``parallel`` (PaLM: both from one norm, added).
    cls_position: which rotary position [CLS] has: ``after_last_word``, or ``after_padding``, the number of columns of
        token_ids, so that its vector depends on how far a text is padded (weights of coca_pytorch learned with it).
    cross_attn_mlp / self_attn_mlp: where a multimodal layer has its MLPs; the paper's has one, after cross-attention.
    norm_image_tokens: every multimodal layer normalises the image tokens before it looks at them.
    multimodal_num_heads, multimodal_mlp_width: where the multimodal half differs from the unimodal one.
    layer_scale: see `BlockConfig`.
    hidden_id: attention does not see positions that hold this id, as if they were padding; None = it sees all words.
        open_clip tells padding by its id, which is the word "!" as well.
    hide_next: not the position that holds hidden_id is hidden but the one after it, and position 0 never. A text that
        does not fill context_length is followed by one hidden_id, which [CLS] sees (unless the last word is hidden_id
        too) while it does not see itself. The weights of open_clip's CoCa learned with this shifted mask.
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
    cls_position: Literal["after_last_word", "after_padding"] = "after_last_word"
    activation: Activation = "gelu"
    norm_bias: bool = True
    linear_bias: bool = True
    self_attn_mlp: bool = False
    cross_attn_mlp: bool = True
    tie_embeddings: bool = False
    dropout: float = 0.0
    norm_image_tokens: bool = False
    multimodal_num_heads: int | None = None
    multimodal_mlp_width: int | None = None
    layer_scale: float | None = None
    hidden_id: int | None = None
    hide_next: bool = False

    def __post_init__(self) -> None:
        check_dropout("text", self.dropout)
        check_counts("text", self, "vocab_size", "context_length", "width", "unimodal_depth", "multimodal_depth")
        check_counts("text", self, "num_heads", "num_kv_heads", "head_dim", "mlp_width")
        check_counts("text", self, "multimodal_num_heads", "multimodal_mlp_width")
        for heads in (self.num_heads, self.multimodal_num_heads or self.num_heads):
            if self.head_dim is None:
                check_divides("num_heads", heads, "width", self.width)
            check_divides("num_kv_heads", self.num_kv_heads or heads, "num_heads", heads)
        for name, allowed in (
            ("block", ("serial", "parallel")),
            ("positions", ("learned", "rotary")),
            ("cls_position", ("after_last_word", "after_padding")),
            ("activation", ACTIVATIONS),
        ):
            check_choice(f"text {name}", getattr(self, name), allowed)
        if self.cls_position == "after_padding" and self.positions != "rotary":
            raise ValueError("cls_position after_padding needs rotary positions: with learned ones [CLS] has its own")
        if self.hide_next and self.hidden_id is None:
            raise ValueError("hide_next needs a hidden_id")
        if self.hidden_id is not None and not 0 <= self.hidden_id < self.vocab_size:
            raise ValueError(f"hidden_id {self.hidden_id} is not an id of a vocabulary of {self.vocab_size}")
        if self.block == "parallel" and self.layer_scale is not None:
            raise ValueError("parallel blocks have no layer_scale")
        if self.positions == "rotary" and self.block_config().head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.block_config().head_dim}")

    def block_config(self) -> BlockConfig:
        return BlockConfig(
            width=self.width,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads or self.num_heads,
            head_dim=self.head_dim or self.width // self.num_heads,
            mlp_width=self.mlp_width,
            parallel=self.block == "parallel",
            activation=self.activation,
            norm_bias=self.norm_bias,
            linear_bias=self.linear_bias,
            rotary=self.positions == "rotary",
            dropout=self.dropout,
            layer_scale=self.layer_scale,
        )

    def multimodal_block_config(self) -> BlockConfig:
        """As `block_config`, for the multimodal half."""
        num_heads = self.multimodal_num_heads or self.num_heads
        return replace(
            self.block_config(),
            num_heads=num_heads,
            num_kv_heads=self.num_kv_heads or num_heads,
            head_dim=self.head_dim or self.width // num_heads,
            mlp_width=self.multimodal_mlp_width or self.mlp_width,
            norm_context=self.norm_image_tokens,
        )
