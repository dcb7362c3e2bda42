"""AdamW with the right parameter groups, its schedule, and the moving average of the weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from opencoca.model.coca import CoCa
from opencoca.train.recipe import OptimizerRecipe, Recipe


def freeze_image_stages(model: CoCa, frozen_stages: int) -> int:
    """Stops gradients of the image encoder's first stages; -1 = all. Returns how many are frozen.

    Raises ValueError if the encoder has fewer.
    """
    encoder = model.image_encoder
    count = encoder.num_stages if frozen_stages == -1 else frozen_stages
    if not 0 <= count <= encoder.num_stages:
        raise ValueError(f"encoder.frozen_stages {frozen_stages}: this image encoder has {encoder.num_stages} stages")
    for stage in encoder.stages[:count]:
        stage.requires_grad_(False)
    return count


def freeze_unused(model: CoCa, contrastive: bool, captioning: bool) -> None:
    """Stops gradients of the half that a loss of weight 0 would leave without any."""
    if not captioning:
        model.multimodal_decoder.requires_grad_(False)
        if not model.config.text.tie_embeddings:
            model.lm_head.requires_grad_(False)
    if not contrastive:
        model.unimodal_decoder.cls_embed.requires_grad_(False)
        model.unimodal_decoder.norm.requires_grad_(False)
        model.text_proj.requires_grad_(False)
        model.image_proj.requires_grad_(False)
        model.log_logit_scale.requires_grad_(False)
        pooler = getattr(model.image_pooling.poolers, "contrastive_pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)


def parameter_groups(model: CoCa, recipe: Recipe) -> list[dict]:
    """Groups by learning rate and weight decay; matrices decay, all else (norms, biases, positions, ...) does not."""
    optimizer = recipe.optimizer
    encoder_lr = recipe.encoder.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_encoder = name.startswith("image_encoder.")
        lr = encoder_lr if in_encoder and encoder_lr is not None else optimizer.learning_rate
        keeps = parameter.ndim < 2 or name.endswith(("pos_embed", "query", "token_embed.weight"))
        groups.setdefault((lr, 0.0 if keeps else optimizer.weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def build_optimizer(model: CoCa, recipe: Recipe) -> torch.optim.AdamW:
    """Fused AdamW over what is trained; ``peak_lr`` of each group is what `set_learning_rate` scales."""
    options = recipe.optimizer
    return torch.optim.AdamW(
        parameter_groups(model, recipe), lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True
    )


def learning_rate_factor(step: int, total_steps: int, options: OptimizerRecipe) -> float:
    """What the peak learning rate is multiplied by in step ``step`` (from 0): linear warm-up, then decay."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    if options.decay == "constant":
        return 1.0
    done = min(1.0, (step - options.warmup_steps) / max(1, total_steps - options.warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * done)) if options.decay == "cosine" else 1 - done
    return options.final_lr_fraction + (1 - options.final_lr_fraction) * left


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of the whole gradient, a scalar."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(grads)


class WeightAverage:
    """Exponential moving average of the trained parameters; it starts fast, so that early averages are useful.

    decay of step t is min(decay, (1 + t) / (10 + t)).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.averages = [parameter.detach().clone() for parameter in self._of(model)]

    def _of(self, model: nn.Module) -> list[nn.Parameter]:
        parameters = dict(model.named_parameters())
        return [parameters[name] for name in self.names]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, parameter in zip(self.averages, self._of(model), strict=True):
            average.lerp_(parameter, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchanges the model's parameters with their averages; a second call undoes the first."""
        for average, parameter in zip(self.averages, self._of(model), strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(kept)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages, strict=True))

    def load(self, tensors: dict[str, Tensor], updates: int) -> None:
        for name, average in zip(self.names, self.averages, strict=True):
            average.copy_(tensors[name])
        self.updates = updates
