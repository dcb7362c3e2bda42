"""A tiny model's folder, captioned images and damaged files for the tests of the commands and of the evaluation."""

from __future__ import annotations

import argparse
import csv
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from opencoca.cli import main
from opencoca.cli.parser import Parser
from opencoca.data import PreprocessConfig
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.store.model_folder import save_model_folder
from opencoca.tokenizer import train_tokenizer

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "white": (250, 250, 250)}
CAPTIONS = {name: [f"a {name} picture", f"everything here is {name}"] for name in COLOURS}


def all_parsers(parser: argparse.ArgumentParser) -> list[Parser]:
    """The parser of the commands with those of all its sub-commands."""
    found: list[Parser] = [parser] if isinstance(parser, Parser) else []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                found += all_parsers(child)
    return found


def save_tiny_model(folder: Path, image_size: int = 16, languages: tuple[str, ...] = ()) -> Path:
    """A random CoCa with a vocabulary of bytes, as a model folder."""
    tokenizer = train_tokenizer([text for own in CAPTIONS.values() for text in own], 300, languages=languages)
    config = CoCaConfig(
        embed_dim=16,
        image=ImageEncoderConfig(
            image_size=(image_size, image_size), patch_size=8, width=16, depth=1, num_heads=2, mlp_width=16
        ),
        pooler=PoolerConfig(num_queries=3, num_heads=2),
        text=TextConfig(
            vocab_size=tokenizer.vocab_size,
            context_length=24,
            width=16,
            unimodal_depth=1,
            multimodal_depth=1,
            num_heads=2,
            mlp_width=16,
        ),
    )
    torch.manual_seed(3)
    model = CoCa(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.3 * torch.randn_like(parameter))
    save_model_folder(folder, model, tokenizer, PreprocessConfig((image_size, image_size)))
    return folder


def draw(colour: tuple[int, int, int], seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 20, (24, 32, 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def write_colours(folder: Path) -> Path:
    """One PNG of each colour, named after it."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, colour) in enumerate(COLOURS.items()):
        draw(colour, seed).save(folder / f"{name}.png")
    return folder


def write_csv(path: Path, columns: list[str], rows: list[list[str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_captions(path: Path, names: list[str] | None = None) -> Path:
    rows = [[f"{name}.png", text] for name in names or COLOURS for text in CAPTIONS[name]]
    return write_csv(path, ["image", "caption"], rows)


def truncated_jpeg(path: Path) -> Path:
    draw((90, 90, 90)).resize((320, 240)).save(path, "JPEG", quality=95)
    path.write_bytes(path.read_bytes()[:3000])
    return path


def text_as_jpeg(path: Path) -> Path:
    path.write_text("this is not a photograph\n" * 20)
    return path


def huge_png(path: Path) -> Path:
    """A PNG of a few bytes whose header announces 60,000 x 60,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b""))
    return path


def run_with_stdout(stdout: str, arguments: list[str]) -> None:
    """Runs the command, in a process of its own, with this file or a closed pipe as standard output."""
    if stdout == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(stdout, os.O_WRONLY | os.O_CREAT)
    os.dup2(writer, 1)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (the one before knew another file)
    sys.exit(main(arguments))
