"""Every initial value of a CoCa, in one place.

Linear maps keep the variance of their input (normal, deviation 1 / sqrt(fan-in)); those that write into a residual
stream are scaled down by the root of their number, so that its variance does not grow with depth (GPT-2).
"""

import torch
from torch import nn

from opencoca.model.attention import Attention
from opencoca.model.attn_pool import AttentionalPooler
from opencoca.model.blocks import Mlp
from opencoca.model.image_encoders.vit import PatchEmbed, VisionTransformer
from opencoca.model.text_decoder import MultimodalDecoder, UnimodalDecoder

EMBEDDING_STD = 0.02


def init_weights(model: nn.Module) -> None:
    """Fills every parameter of a CoCa; image encoders other than the ViT fill their own, maybe from pretraining."""
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
        elif isinstance(module, PatchEmbed):
            nn.init.normal_(module.proj.weight, std=module.proj.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.proj.bias)  # pyright: ignore[reportArgumentType]
            nn.init.normal_(module.pos_embed, std=EMBEDDING_STD)
    for module in ours:
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
