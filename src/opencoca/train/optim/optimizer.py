"""The optimizer with the right parameter groups, what is frozen, and the moving average of the weights."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from opencoca.distributed.world import sharded_like
from opencoca.model.coca import CoCa
from opencoca.train.optim.adafactor import Adafactor
from opencoca.train.optim.muon import Muon, divide_groups
from opencoca.train.recipe.optimizer import PARTS
from opencoca.train.recipe.recipe import Recipe

MakeOptimizer = Callable[[CoCa, Recipe], torch.optim.Optimizer]
"""What `build_optimizer` is; each group of what it makes has ``lr`` and ``peak_lr``."""


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
        if model.config.pooler.arrangement == "parallel":
            model.image_pooling.poolers.caption_pooler.requires_grad_(False)  # pyright: ignore
    if not contrastive:
        model.unimodal_decoder.cls_embed.requires_grad_(False)
        model.unimodal_decoder.norm.requires_grad_(False)
        model.text_proj.requires_grad_(False)
        model.image_proj.requires_grad_(False)
        model.log_logit_scale.requires_grad_(False)
        pooler = getattr(model.image_pooling.poolers, "contrastive_pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)


def freeze_parts(model: CoCa, recipe: Recipe) -> None:
    """Stops gradients of the parts that ``optimizer.frozen`` names.

    Raises ValueError if nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        if _part_of(name) in recipe.optimizer.frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("everything is frozen (optimizer.frozen, encoder.frozen_stages): nothing would be learned")


def parameter_groups(model: CoCa, recipe: Recipe) -> list[dict]:
    """Groups by learning rate and weight decay; matrices decay, all else (norms, biases, positions, ...) does not."""
    optimizer = recipe.optimizer
    rates = dict(optimizer.learning_rates)
    if recipe.encoder.learning_rate is not None:
        rates["image_encoder"] = recipe.encoder.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        lr = rates.get(_part_of(name), optimizer.learning_rate)
        if optimizer.layer_decay != 1:
            lr *= optimizer.layer_decay ** layers_behind(model, name)
        keeps = parameter.ndim < 2 or name.endswith(("pos_embed", "query", "token_embed.weight"))
        groups.setdefault((lr, 0.0 if keeps else optimizer.weight_decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def layers_behind(model: CoCa, name: str) -> int:
    """How many layers of its tower come after that of the parameter of this name; 0 for poolers, heads, last norms.

    The image encoder is one tower, both halves of the text decoder are another. Embeddings stand before its first
    layer, unless they are the vocabulary head, too.
    """
    part, *path = name.split(".")
    unimodal, multimodal = len(model.unimodal_decoder.blocks), len(model.multimodal_decoder.layers)
    if part == "image_encoder" and path[0] == "stages":
        return model.image_encoder.num_stages - 1 - int(path[1])
    if part == "unimodal_decoder" and path[0] == "blocks":
        return unimodal - 1 - int(path[1]) + multimodal
    if part == "unimodal_decoder" and path[0] != "norm":
        return 0 if path[0] == "token_embed" and model.config.text.tie_embeddings else unimodal + multimodal
    if part == "multimodal_decoder" and path[0] == "layers":
        return multimodal - 1 - int(path[1])
    return 0


def _part_of(name: str) -> str:
    return next(part for part, starts in PARTS.items() if name.startswith(starts))


def build_optimizer(model: CoCa, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over what is trained; ``peak_lr`` of each group is what `set_learning_rate` scales."""
    options, groups = recipe.optimizer, parameter_groups(model, recipe)
    if options.name == "adafactor":
        return Adafactor(groups, options.learning_rate, options.betas)
    if options.name == "muon":
        return Muon(divide_groups(model, groups), options.learning_rate, betas=options.betas, eps=options.eps)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


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
            average.copy_(sharded_like(tensors[name], average))
        self.updates = updates
