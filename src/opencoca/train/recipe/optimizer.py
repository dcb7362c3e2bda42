"""The recipe's keys for optimizer and schedule, and for what a step keeps in memory."""

from dataclasses import dataclass, field
from typing import Literal

from opencoca.model.structure import PARTS

SHARDABLE = ("adamw",)
"""Optimizers whose update of a weight needs nothing but that weight's numbers, so that fsdp can divide it."""


@dataclass(frozen=True)
class OptimizerRecipe:
    """The optimizer and its schedule.

    Args:
        name: adamw, or adafactor (arXiv 1804.04235) as the paper trained: second moments of matrices factored into
            rows and columns, first moments in bf16, which is a quarter of AdamW's memory; or muon (arXiv 2502.16982):
            orthogonalised updates of the hidden matrices, AdamW for the rest, three quarters of its memory or less.
        learning_rate: at the peak.
        learning_rates: of single parts of the model, by name: image_encoder, image_pooling, unimodal_decoder,
            multimodal_decoder, heads, linear_branch, task_head.
        layer_decay: the peak is multiplied by this for every layer further from the outputs, in the image encoder and
            in the text decoder (arXiv 2106.08254); 1 = the same for all.
        frozen: names of parts that are not trained (image_encoder: as in LiT, arXiv 2111.07991).
        betas: of the running means of gradient and squared gradient; the paper's adafactor: 0.9 and 0.999. Of muon:
            those of its AdamW.
        eps: of adamw, added to the root of the latter.
        weight_decay: decoupled; not on norms, biases, positions, queries and the temperature.
        grad_clip: largest norm of the whole gradient; 0 = no clipping.
        warmup_steps: of linear warm-up.
        decay: after warm-up: cosine, linear, constant, or wsd: constant, then linear in the run's last part
            (warmup-stable-decay, arXiv 2404.06395).
        decay_fraction: of the run that the last part of wsd takes.
        final_lr_fraction: of the peak, at the end.
        ema_decay: of the exponential moving average of the weights that is validated and kept; 0 = none.
    """

    name: Literal["adamw", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    learning_rates: dict[str, float] = field(default_factory=dict)
    layer_decay: float = 1.0
    frozen: list[str] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.05
    grad_clip: float = 1.0
    warmup_steps: int = 200
    decay: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    decay_fraction: float = 0.2
    final_lr_fraction: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        for key in ("learning_rates", "frozen"):
            unknown = [name for name in getattr(self, key) if name not in PARTS]
            if unknown:
                raise ValueError(f"optimizer.{key} names {unknown[0]!r}, which is none of {', '.join(PARTS)}")
        for name, rate in self.learning_rates.items():
            if not 0 < rate < float("inf"):
                raise ValueError(f"optimizer.learning_rates {name} {rate} must be more than 0; freeze it by frozen")
            if name in self.frozen:
                raise ValueError(f"optimizer.frozen and optimizer.learning_rates both name {name}")
        if set(self.frozen) >= {*PARTS} - {"task_head"}:
            raise ValueError("optimizer.frozen names every part: nothing would be learned")


@dataclass(frozen=True)
class ComputeRecipe:
    """How a step is computed. Losses and gradients are the same whatever is chosen here.

    Args:
        recompute: blocks whose inside is not kept but computed again for the gradient (activation checkpointing, arXiv
            1604.06174): none, image (the image encoder's), text (the decoder's), or all. About a third more work.
        recompute_every: 1 recomputes all of these blocks, 2 every second one, 3 every third.
        compile: compiles the blocks (torch.compile), which takes a minute and, on a CPU, a C++ compiler.
    """

    recompute: Literal["none", "image", "text", "all"] = "none"
    recompute_every: int = 1
    compile: bool = False
