"""Captions photographs with the graphs beside this file: python caption.py PHOTO...

Needs onnxruntime, numpy and, to read photographs, Pillow. `Captioner` can be imported and taken apart.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


class Captioner:
    """The graphs of a folder, and how to use them together."""

    def __init__(self, folder):
        folder = Path(folder)
        self.config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.words = read_words(folder / "tokenizer.json")
        self.image_encoder = onnxruntime.InferenceSession(folder / "image_encoder.onnx")
        self.decoder_step = onnxruntime.InferenceSession(folder / "decoder_step.onnx")

    def caption(self, pixels, max_new_tokens=30):
        """pixels (images, 3, height, width) of `load_pixels` -> one greedy caption for each."""
        return [self.to_text(ids) for ids in self.token_ids(pixels, max_new_tokens)]

    def token_ids(self, pixels, max_new_tokens=30):
        """The same as lists of token ids, start token (and language) included, end token not."""
        decoding = self.config["decoding"]
        (image_cache,) = self.image_encoder.run(["image_cache"], {"pixels": pixels})
        prompt = decoding["prompt_ids"]
        ids = np.tile(np.array(prompt, dtype=np.int64), (len(pixels), 1))
        caches = [empty(decoding[f"empty_{half}_cache"], len(pixels)) for half in ("unimodal", "multimodal")]
        ended = np.zeros(len(pixels), dtype=bool)
        for _ in range(min(max_new_tokens, decoding["context_length"] - len(prompt))):
            inputs = {"token_ids": ids, "unimodal_cache": caches[0], "multimodal_cache": caches[1]}
            outputs = self.decoder_step.run(None, {**inputs, "image_cache": image_cache})
            logits, *caches = map(np.asarray, outputs)
            logits[:, decoding["suppressed_ids"]] = -np.inf
            next_ids = np.where(ended, decoding["eos_id"], logits.argmax(axis=1))
            ids = np.concatenate((ids, next_ids[:, None]), axis=1)
            ended |= next_ids == decoding["eos_id"]
            if ended.all():
                break
        rows = ids.tolist()
        return [row[: row.index(decoding["eos_id"])] if decoding["eos_id"] in row else row for row in rows]

    def to_text(self, ids):
        """Token ids without the end token -> text."""
        prompt = self.config["decoding"]["prompt_ids"]
        text = b"".join(self.words[token_id] for token_id in ids if token_id not in prompt)
        return text.decode("utf-8", errors="replace").strip(" ")


def empty(shape, batch_size):
    """A cache without words; its third axis is the batch."""
    return np.zeros((*shape[:2], batch_size, *shape[3:]), dtype=np.float32)


def load_pixels(path, preprocess):
    """A photograph as (1, 3, height, width), by the preprocessing that config.json describes."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = fit(image.convert("RGB"), preprocess)
    values = np.asarray(image, dtype=np.float32) / 255
    values = (values - np.float32(preprocess["mean"])) / np.float32(preprocess["std"])
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def fit(image, preprocess):
    """Brought to the model's size: squashed, or cropped at the shorter side, or padded at it."""
    height, width = preprocess["image_size"]
    mode = preprocess["resize_mode"]
    if mode == "squash":
        return image.resize((width, height), Image.Resampling.BICUBIC)
    scales = width / image.width, height / image.height
    if mode == "crop":
        scale = max(scales)
        size = max(width, int(image.width * scale + 1e-6)), max(height, int(image.height * scale + 1e-6))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - width) / 2), round((size[1] - height) / 2)
        return image.crop((left, top, left + width, top + height))
    scale = min(scales)
    size = min(width, max(1, round(image.width * scale))), min(height, max(1, round(image.height * scale)))
    background = Image.new("RGB", (width, height), tuple(round(255 * value) for value in preprocess["mean"]))
    place = (width - size[0]) // 2, (height - size[1]) // 2
    background.paste(image.resize(size, Image.Resampling.BICUBIC), place)
    return background


def read_words(tokenizer_file):
    """The bytes that each token id stands for, from tokenizer.json."""
    model = json.loads(Path(tokenizer_file).read_text(encoding="utf-8"))["model"]
    # Bytes that cannot be seen are written as characters from U+0100 on, in order.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    word_end = model.get("end_of_word_suffix") or ""
    words = {}
    for token, token_id in model["vocab"].items():
        ends_word = bool(word_end) and token.endswith(word_end)
        token = token.removesuffix(word_end) if ends_word else token
        words[token_id] = bytes(byte_of.get(char, 0x3F) for char in token) + b" " * ends_word
    return words


def main(paths):
    captioner = Captioner(Path(__file__).parent)
    for path in paths:
        pixels = load_pixels(path, captioner.config["preprocess"])
        print(f"{path}\t{captioner.caption(pixels)[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
