"""Every initial value of a CoCa, in one place.

Linear maps keep the variance of their input (normal, deviation 1 / sqrt(fan-in)); those that write into a residual
stream are scaled down by the root of their number, so that its variance does not grow with depth (GPT-2).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from opencoca.model.encoders.normed_patches import NormedPatchEmbed
from opencoca.model.encoders.vit import PatchEmbed, VisionTransformer
from opencoca.model.layers.attention import Attention
from opencoca.model.layers.blocks import LayerScale, Mlp
from opencoca.model.layers.linear_branch import LinearBranch
from opencoca.model.layers.poolers import AttentionalPooler
from opencoca.model.text_decoder import MultimodalDecoder, UnimodalDecoder

EMBEDDING_STD = 0.02


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Models built inside have parameters on the meta device, which have shapes and no values: weights follow.

    Nothing is drawn either: PyTorch would import its compiler for that, which takes seconds.
    """
    with torch.device("meta"), _DrawNothing():
        yield


class _DrawNothing(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def init_weights(model: nn.Module) -> None:
    """Fills every parameter of a CoCa; image encoders other than the ViT fill their own, maybe from pretraining.

    One that is built without values is left as it is.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    ours = [module for child in _own_children(model) for module in child.modules()]
    for module in ours:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, AttentionalPooler):
            nn.init.normal_(module.query)
        elif isinstance(module, LayerScale):
            nn.init.constant_(module.factor, module.initial)
        elif isinstance(module, PatchEmbed):
            nn.init.normal_(module.proj.weight, std=module.proj.weight[0].numel() ** -0.5)
            if module.proj.bias is not None:
                nn.init.zeros_(module.proj.bias)
            nn.init.normal_(module.pos_embed, std=EMBEDDING_STD)
            if module.class_token is not None:
                nn.init.normal_(module.class_token, std=EMBEDDING_STD)
        elif isinstance(module, NormedPatchEmbed):
            for parameter in (module.class_token, module.pos_embed):
                if parameter is not None:
                    nn.init.normal_(parameter, std=EMBEDDING_STD)
    for module in ours:
        if isinstance(module, LinearBranch) and module.class_proj is not None:
            nn.init.zeros_(module.class_proj.weight)  # until it is fitted
        if isinstance(module, UnimodalDecoder):
            nn.init.normal_(module.cls_embed, std=EMBEDDING_STD)
            if module.pos_embed is not None:
                nn.init.normal_(module.pos_embed, std=EMBEDDING_STD / 2)
            # Also where the head shares this matrix: the embedding's scale, not the head's.
            nn.init.normal_(module.token_embed.weight, std=EMBEDDING_STD)
        if isinstance(module, UnimodalDecoder | MultimodalDecoder | VisionTransformer):
            scale_residual_writes(module)


def _own_children(model: nn.Module) -> list[nn.Module]:
    foreign = getattr(model, "image_encoder", None)
    return [child for child in model.children() if child is not foreign or isinstance(child, VisionTransformer)]


def scale_residual_writes(stack: nn.Module) -> None:
    """Divides the weights of all maps that are added to the residual stream by sqrt(their number)."""
    writers = [module.out_proj for module in stack.modules() if isinstance(module, Attention)]
    writers += [module.down_proj for module in stack.modules() if isinstance(module, Mlp)]
    with torch.no_grad():
        for linear in writers:
            linear.weight.div_(len(writers) ** 0.5)
