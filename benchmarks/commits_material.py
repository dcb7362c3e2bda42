"""What commits.py measures with: photographs with captions, and a coca_ViT-B-32's weights, all made at random."""

import random
from pathlib import Path

import numpy as np
import torch
from PIL import Image

WORDS = ("a", "an", "the", "two", "brown", "white", "man", "dog", "child", "ball", "runs", "plays", "sits", "on", "in")


def generate_photographs(folder: Path, captions: Path, count: int) -> None:
    """A folder of JPEG files of 500 x 375 pixels, and the table of five captions for each."""
    folder.mkdir()
    chance, rows = random.Random(0), ["image,caption"]
    for number in range(count):
        colours = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg")
        rows += [f"{number:05d}.jpg,{' '.join(chance.choices(WORDS, k=chance.randint(7, 16)))}" for _ in range(5)]
    captions.write_text("\n".join(rows) + "\n", encoding="utf-8")


def open_clip_tensors() -> dict[str, torch.Tensor]:
    """Random weights of open_clip's coca_ViT-B-32, by open_clip's names."""
    image, text, vocabulary = 768, 512, 49_408
    pool, stacks = "visual.attn_pool", {"visual.transformer.resblocks": image, "text.transformer.resblocks": text}
    stacks |= {"text_decoder.resblocks": text, "text_decoder.cross_attn": text}
    norms = {"visual.ln_pre": image, "visual.ln_post": text, "text.ln_final": text, "text_decoder.ln_final": text}
    norms |= {f"{pool}.ln_q": text, f"{pool}.ln_k": image}
    linears = {f"{pool}.attn.out_proj.": (text, text)}
    for layer, width in ((f"{stack}.{index}", width) for stack, width in stacks.items() for index in range(12)):
        norms |= {f"{layer}.{norm}": width for norm in ("ln_1", "ln_2", "ln_1_kv")[: 3 if "cross" in layer else 2]}
        linears |= {f"{layer}.attn.in_proj_": (3 * width, width), f"{layer}.attn.out_proj.": (width, width)}
        linears |= {f"{layer}.mlp.c_fc.": (4 * width, width), f"{layer}.mlp.c_proj.": (width, 4 * width)}
    shapes: dict[str, tuple[int, ...]] = {
        "text.cls_emb": (text,),
        "text.token_embedding.weight": (vocabulary, text),
        "text.positional_embedding": (77, text),
        "text.text_projection": (text, text),
        "text_decoder.text_projection": (text, vocabulary),
        "visual.class_embedding": (image,),
        "visual.conv1.weight": (image, 3, 32, 32),
        "visual.positional_embedding": (50, image),
        "visual.proj": (text, text),
        f"{pool}.query": (256, text),
        f"{pool}.attn.q_proj_weight": (text, text),
        f"{pool}.attn.k_proj_weight": (text, image),
        f"{pool}.attn.v_proj_weight": (text, image),
        f"{pool}.attn.in_proj_bias": (3 * text,),
    }
    shapes |= {f"{name}weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}bias": shape[:1] for name, shape in linears.items()}
    tensors = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    tensors |= {f"{name}.weight": torch.ones(width) for name, width in norms.items()}
    tensors |= {f"{name}.bias": torch.zeros(width) for name, width in norms.items()}
    return tensors | {"logit_scale": torch.tensor(2.6593)}
