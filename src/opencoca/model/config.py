"""What a CoCa is made of: frozen dataclasses, and the sizes that have a name.

Every choice between the known CoCas is a field here or in config_parts.py, made once, when the module is built.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from opencoca.model.config_checks import check_counts, check_divides, check_fields, config_from_dict
from opencoca.model.config_parts import (
    Activation,
    BlockConfig,
    Compat,
    HeadConfig,
    ImageEncoderConfig,
    LinearConfig,
    PoolerConfig,
    TextConfig,
    at_todays_places,
)

__all__ = [
    "NAMED_SIZES",
    "Activation",
    "BlockConfig",
    "CoCaConfig",
    "Compat",
    "HeadConfig",
    "ImageEncoderConfig",
    "LinearConfig",
    "PoolerConfig",
    "TextConfig",
    "at_todays_places",
]


@dataclass(frozen=True)
class CoCaConfig:
    """A whole CoCa. ``CoCaConfig.named("base")`` gives the sizes that have a name.

    Args:
        embed_dim: width of the space that images and texts share, without what `linear` adds.
        image: the image encoder.
        pooler: what makes image tokens and an embedding of the image encoder's features.
        text: the text decoder.
        initial_temperature: of the contrastive softmax (paper, section 3: starts at 0.07).
        max_logit_scale: the learned scale 1 / temperature is clamped to this.
        compat: what weights of other projects need.
        head: what a task adds; None = nothing.
        linear: a dual encoder without depth beside the deep one.
    """

    embed_dim: int = 768
    image: ImageEncoderConfig = field(default_factory=ImageEncoderConfig)
    pooler: PoolerConfig = field(default_factory=PoolerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    initial_temperature: float = 0.07
    max_logit_scale: float = 100.0
    compat: Compat = field(default_factory=Compat)
    head: HeadConfig | None = None
    linear: LinearConfig = field(default_factory=LinearConfig)

    def __post_init__(self) -> None:
        check_fields("model", self)
        check_counts("model", self, "embed_dim")
        self._check_compat()
        if self.compat.pooler_head_dim is None:
            check_divides("pooler num_heads", self.pooler.num_heads, "text width", self.text.width)
        if self.pooler.arrangement == "class_token":
            if self.image.name != "vit" or not self.compat.image_class_token:
                raise ValueError("pooler arrangement class_token needs a ViT with image_class_token")
            if self.image.width != self.text.width:
                raise ValueError(
                    f"pooler arrangement class_token needs an image width of {self.text.width}, the text width, "
                    f"got {self.image.width}"
                )
        if self.initial_temperature <= 0:
            raise ValueError(f"initial_temperature {self.initial_temperature} must be positive")
        if 1 / self.initial_temperature > self.max_logit_scale:
            # The clamp has no gradient: a scale that starts beyond it would never be learned.
            raise ValueError(
                f"initial_temperature {self.initial_temperature} must be at least 1 / max_logit_scale = "
                f"{1 / self.max_logit_scale if self.max_logit_scale > 0 else float('inf'):.3g}"
            )

    def _check_compat(self) -> None:
        """Raises ValueError where the part for other projects' weights does not go with the rest."""
        image, text, compat = self.image, self.text, self.compat
        if compat.project_embeds is False and self.embed_dim != text.width:
            raise ValueError(f"embed_dim {self.embed_dim} is not the text width {text.width}: project_embeds is needed")
        if compat.image_positions == "sincos" and (image.width % 4 or image.width < 8):
            raise ValueError(f"sincos positions need an image width of at least 8 that 4 divides, got {image.width}")
        heads = compat.text_multimodal_num_heads or text.num_heads
        if text.head_dim is None:
            check_divides("text_multimodal_num_heads", heads, "text width", text.width)
        check_divides("num_kv_heads", text.num_kv_heads or heads, "text_multimodal_num_heads", heads)
        if compat.text_cls_position == "after_padding" and text.positions != "rotary":
            raise ValueError(
                "text_cls_position after_padding needs rotary positions: with learned ones [CLS] has its own"
            )
        if compat.text_hidden_id is not None and not 0 <= compat.text_hidden_id < text.vocab_size:
            raise ValueError(
                f"text_hidden_id {compat.text_hidden_id} is not an id of a vocabulary of {text.vocab_size}"
            )
        if text.block == "parallel" and compat.text_layer_scale is not None:
            raise ValueError("parallel blocks have no text_layer_scale")

    @property
    def embed_size(self) -> int:
        """How many numbers an embedding has: embed_dim, and those of the linear branch."""
        return self.embed_dim + self.linear.dim + self.linear.class_dim

    @property
    def projects_embeds(self) -> bool:
        """Whether the vectors of images and texts are projected into the space that they share."""
        wanted = self.compat.project_embeds
        return self.embed_dim != self.text.width if wanted is None else wanted

    def image_block(self) -> BlockConfig:
        """The blocks of the ViT."""
        image = self.image
        return BlockConfig(
            width=image.width,
            num_heads=image.num_heads,
            num_kv_heads=image.num_heads,
            head_dim=image.head_dim or image.width // image.num_heads,
            mlp_width=image.mlp_width,
            activation=image.activation,
            dropout=image.dropout,
            layer_scale=self.compat.image_layer_scale,
        )

    def pooler_block(self) -> BlockConfig:
        """The attention of the poolers."""
        pooler, width = self.pooler, self.text.width
        return BlockConfig(
            width=width,
            num_heads=pooler.num_heads,
            num_kv_heads=pooler.num_kv_heads or pooler.num_heads,
            head_dim=self.compat.pooler_head_dim or width // pooler.num_heads,
            mlp_width=0,
            norm_bias=self.compat.pooler_norm_bias,
            linear_bias=self.compat.pooler_linear_bias,
        )

    def unimodal_block(self) -> BlockConfig:
        """The blocks of the text decoder's unimodal half."""
        text = self.text
        return BlockConfig(
            width=text.width,
            num_heads=text.num_heads,
            num_kv_heads=text.num_kv_heads or text.num_heads,
            head_dim=text.head_dim or text.width // text.num_heads,
            mlp_width=text.mlp_width,
            parallel=text.block == "parallel",
            activation=text.activation,
            norm_bias=text.norm_bias,
            linear_bias=text.linear_bias,
            rotary=text.positions == "rotary",
            dropout=text.dropout,
            layer_scale=self.compat.text_layer_scale,
        )

    def multimodal_block(self) -> BlockConfig:
        """The blocks of the text decoder's multimodal half."""
        text, compat = self.text, self.compat
        num_heads = compat.text_multimodal_num_heads or text.num_heads
        return replace(
            self.unimodal_block(),
            num_heads=num_heads,
            num_kv_heads=text.num_kv_heads or num_heads,
            head_dim=text.head_dim or text.width // num_heads,
            mlp_width=compat.text_multimodal_mlp_width or text.mlp_width,
            norm_context=compat.text_norm_image_tokens,
        )

    @classmethod
    def named(cls, name: str, **changes: Any) -> "CoCaConfig":
        """The configuration with this name, with fields replaced.

        Raises ValueError for an unknown name.
        """
        if name not in NAMED_SIZES:
            raise ValueError(f"there is no CoCa size {name!r}; known sizes: {', '.join(NAMED_SIZES)}")
        return replace(NAMED_SIZES[name], **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, as config.json stores them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "CoCaConfig":
        """The inverse of `to_dict`, which also reads what earlier versions stored.

        Raises ValueError for unknown fields and impossible values.
        """
        return config_from_dict(cls, at_todays_places(values), "model")


def _paper_size(width: int, heads: int, image: tuple[int, int], text: tuple[int, int], tied: bool) -> CoCaConfig:
    """A size of the paper's table 1; image and text are (depth, mlp_width), text depth is of either half."""
    return CoCaConfig(
        embed_dim=width,
        image=ImageEncoderConfig(width=width, depth=image[0], num_heads=heads, mlp_width=image[1]),
        pooler=PoolerConfig(num_heads=heads),
        text=TextConfig(
            width=width,
            num_heads=heads,
            unimodal_depth=text[0],
            multimodal_depth=text[0],
            mlp_width=text[1],
            tie_embeddings=tied,
        ),
    )


def _small_size(width: int, image_depth: int, text_depth: int, image_size: int, patch_size: int) -> CoCaConfig:
    like_the_papers = _paper_size(width, width // 64, (image_depth, 4 * width), (text_depth, 4 * width), tied=True)
    return replace(
        like_the_papers,
        image=replace(like_the_papers.image, image_size=(image_size, image_size), patch_size=patch_size),
        pooler=replace(like_the_papers.pooler, num_queries=64),
        text=replace(like_the_papers.text, vocab_size=49_408, context_length=76),
    )


# Base and Large of the paper's table reach its decoder column with separate embedding and head, 2b with one matrix.
NAMED_SIZES: dict[str, CoCaConfig] = {
    "tiny": _small_size(width=192, image_depth=6, text_depth=2, image_size=128, patch_size=16),
    "small": _small_size(width=384, image_depth=12, text_depth=4, image_size=224, patch_size=16),
    "base": _paper_size(width=768, heads=12, image=(12, 3072), text=(12, 3072), tied=False),
    "large": _paper_size(width=1024, heads=16, image=(24, 4096), text=(12, 4096), tied=False),
    "2b": _paper_size(width=1408, heads=16, image=(40, 6144), text=(18, 5632), tied=True),
}
