"""`opencoca convert`: turns other projects' weights into a model folder."""

import argparse
from pathlib import Path
from typing import Any

from opencoca.cli.common import add_command, add_group, add_overwrite, check_new_folder


def add_commands(commands: Any) -> None:
    group = add_group(commands, "convert", "Turn other projects' weights into a model that --model takes.")
    _add_open_clip(group)


def _add_open_clip(group: Any) -> None:
    parser = add_command(
        group,
        "open-clip",
        run_open_clip,
        "Turn the weights of open_clip's CoCa into a model's folder.",
        example="opencoca convert open-clip coca_ViT-B-32 open_clip_pytorch_model.bin coca-b32\n"
        "  opencoca caption photo.jpg --model coca-b32",
        more="The model gives the embeddings, logits, temperature and greedy captions that open_clip gives. No code\n"
        "in the checkpoint is run, and nothing is written if anything about it is wrong. Python takes a checkpoint\n"
        'without converting it: opencoca.load("open_clip:coca_ViT-B-32", checkpoint=PATH).',
    )
    parser.add_argument(
        "name",
        metavar="NAME",
        help="coca_ViT-B-32, coca_ViT-L-14, coca_base, or a JSON file with another configuration of open_clip's",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help=".pt, .bin or .safetensors: a state dict, or open_clip's training checkpoint",
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder to write")
    add_overwrite(parser)
    group.choices["open_clip"] = parser  # the name of before
    parser.add_argument(
        "--dtype", default="float32", metavar="T", help="type of the stored weights: float32, bfloat16 or float16"
    )


def run_open_clip(arguments: argparse.Namespace) -> int:
    from opencoca.store.interop.open_clip import load_open_clip
    from opencoca.store.model_folder import CONFIG_FILE, WEIGHTS_FILE, save_model_folder
    from opencoca.system.devices import as_dtype

    folder = Path(arguments.out_dir)
    check_new_folder(arguments, folder, CONFIG_FILE)
    dtype = as_dtype(arguments.dtype)
    model, tokenizer, preprocess = load_open_clip(arguments.name, arguments.checkpoint, dtype)
    source = {"format": "open_clip", "architecture": Path(arguments.name).name, "file": Path(arguments.checkpoint).name}
    save_model_folder(folder, model, tokenizer, preprocess, info={"source": source})
    count, size = sum(p.numel() for p in model.parameters()), (folder / WEIGHTS_FILE).stat().st_size
    print(f"{folder}: {count / 1e6:,.1f} million parameters, {size / 1e6:,.0f} MB")
    return 0
