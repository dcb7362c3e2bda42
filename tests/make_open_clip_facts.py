"""Writes open_clip_facts.json: what open_clip 3.3.0 makes of the texts and images in open_clip_cases.py.

Run where open_clip_torch and its torchvision are installed: python tests/make_open_clip_facts.py
"""

import io
import json
from importlib import import_module
from pathlib import Path

import torch
from PIL import Image

from open_clip_cases import IMAGE_SIZE, encoded_images, texts

NUM_TEXTS = 300


def main() -> None:
    open_clip = import_module("open_clip")
    tokenizer = open_clip.SimpleTokenizer()
    transform = open_clip.image_transform(IMAGE_SIZE[0], is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3)
    images = {}
    for name, data in encoded_images().items():
        pixels = (transform(Image.open(io.BytesIO(data))) * 255).round().to(torch.uint8)
        images[name] = pixels.permute(1, 2, 0).flatten().tolist()
    ids = [tokenizer.encode(text) for text in texts(NUM_TEXTS)]
    target = Path(__file__).with_name("open_clip_facts.json")
    target.write_text(json.dumps({"token_ids": ids, "pixels": images}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
