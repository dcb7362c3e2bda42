"""Weights of one CoCa taken over by another whose architecture may differ in places.

What has the same name and shape is copied. Learned positions of image patches are interpolated to another grid; those
of words are copied as far as both reach. Projections of the embeddings where the other has none begin as the identity.
Everything else of the new model keeps the values that it has.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opencoca.model.coca import CoCa
from opencoca.model.encoders.vit import PatchEmbed

_PROJECTIONS = ("image_proj.weight", "text_proj.weight")


@dataclass(frozen=True)
class Transfer:
    """What became of the tensors, by name: copied; adapted; new, as they were; left in the start.

    num_copied: how many numbers were copied or adapted.
    """

    copied: tuple[str, ...]
    adapted: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]
    num_copied: int

    def describe(self) -> str:
        """A few lines for a log."""
        lines = [f"taken: {len(self.copied)} tensors, {self.num_copied / 1e6:.1f}M numbers"]
        for title, names in (("adapted", self.adapted), ("new", self.new), ("left", self.left)):
            if names:
                lines.append(f"{title}: {', '.join(_stems(names))}")
        return "\n".join(lines)


@torch.no_grad()
def take_weights(model: CoCa, start: CoCa, same_vocabulary: bool = True) -> Transfer:
    """Copies the weights of ``start`` into ``model``; without the same vocabulary, none that belong to words' ids."""
    theirs, ours = start.state_dict(keep_vars=True), _tensors(model)
    patches = dict(_patch_embeds(start)), dict(_patch_embeds(model))
    by_word = set() if same_vocabulary else _vocabulary(model)
    linear = model.config.linear, start.config.linear
    if (linear[0].dim, linear[0].class_dim) != (linear[1].dim, linear[1].class_dim):
        by_word = by_word | {"linear_branch.word_embed.weight"}  # its columns mean something else
    copied, adapted, new, count = [], [], [], 0
    for name, tensor in ours.items():
        found = theirs.get(name)
        if found is None and name in _PROJECTIONS and tensor.shape[0] == tensor.shape[1] == start.config.embed_dim:
            tensor.copy_(torch.eye(len(tensor)))  # the start model has none: what it does is this
            adapted.append(name)
        elif found is None or name in by_word:
            new.append(name)
        elif found.shape == tensor.shape:
            tensor.copy_(found)
            copied.append(name)
            count += tensor.numel()
        elif name in patches[0] and name in patches[1] and found.shape[-1] == tensor.shape[-1]:
            tensor.copy_(_resized(patches[0][name], patches[1][name]))
            adapted.append(name)
            count += tensor.numel()
        elif name == "unimodal_decoder.pos_embed" and found.shape[-1] == tensor.shape[-1]:
            both = min(len(found), len(tensor)) - 1
            tensor[:both].copy_(found[:both])
            tensor[-1].copy_(found[-1])  # the position of [CLS], wherever a text ends
            adapted.append(name)
            count += (both + 1) * tensor.shape[-1]
        else:
            new.append(name)
    taken = {id(theirs[name]) for name in (*copied, *adapted) if name in theirs}
    left = tuple(name for name, tensor in theirs.items() if id(tensor) not in taken)
    return Transfer(tuple(copied), tuple(adapted), tuple(new), left, count)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and stored buffers by name; what two names share is there once."""
    tensors, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            tensors[name] = tensor
            seen.add(id(tensor))
    return tensors


def _patch_embeds(model: nn.Module) -> Iterator[tuple[str, PatchEmbed]]:
    """Patch embeddings with learned positions, by the name of these."""
    for name, module in model.named_modules():
        if isinstance(module, PatchEmbed):
            yield f"{name}.pos_embed", module


def _vocabulary(model: CoCa) -> set[str]:
    owners = {"unimodal_decoder.token_embed": model.unimodal_decoder.token_embed, "lm_head": model.lm_head}
    if model.linear_branch is not None:
        owners["linear_branch.word_embed"] = model.linear_branch.word_embed
    return {f"{owner}.{name}" for owner, module in owners.items() for name, _ in module.named_parameters()}


def _resized(start: PatchEmbed, target: PatchEmbed) -> Tensor:
    """The positions of ``start`` for the grid of ``target``."""
    positions = start.positions(*target.grid)
    first = target.pos_embed.shape[1] - positions.shape[1]  # 1 where a class token has a position of its own
    return torch.cat((start.pos_embed[:, :first], positions), dim=1)


def _stems(names: tuple[str, ...]) -> list[str]:
    """The names, those of one module joined: ``task_head (4)``."""
    counts: dict[str, int] = {}
    for name in names:
        stem = ".".join(name.split(".")[:2]) if name.count(".") > 1 else name.split(".")[0]
        counts[stem] = counts.get(stem, 0) + 1
    return [stem if count == 1 else f"{stem} ({count})" for stem, count in counts.items()]
