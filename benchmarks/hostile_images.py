"""Images of all usual formats, each changed by a rule drawn from a seed: in its bytes, its sizes, or its end."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import trials
from PIL import Image, PngImagePlugin

from opencoca.data import decode_image

MAX_SECONDS, MAX_BYTES = 2.0, 1.5e9
_SIZES = (0, 1, 2, 255, 4096, 13_377, 16_384, 65_535, 2**31 - 1, 2**32 - 1)


def attempt(seed: int, first: int, count: int) -> list[trials.Trial]:
    """Decodes the images from number `first` on."""
    return [_decoded(seed, number) for number in range(first, first + count)]


def _decoded(seed: int, number: int) -> trials.Trial:
    name, data = malformed(seed, number)
    return trials.attempt(f"{number} {name}", lambda: decode_image(data, name="image"), MAX_SECONDS, MAX_BYTES)


def malformed(seed: int, number: int) -> tuple[str, bytes]:
    """One image: what was done to it, and its bytes. The same seed and number give the same image."""
    rng = random.Random(seed * 1_000_003 + number)
    kind = rng.choice(list(_SOUND))
    data = bytearray(_SOUND[kind](rng))
    change = rng.choice([_flip, _overwrite, _cut_out, _repeat, _insert, _truncate, _resize, _extreme, _splice])
    for _ in range(rng.choice([1, 1, 2, 5])):
        if data:
            change(data, rng)
    if kind.startswith("png") and rng.random() < 0.7:
        _correct_checksums(data)
    return f"{kind}, {change.__name__.strip('_')}", bytes(data)


def _picture(rng: random.Random, mode: str = "RGB") -> Image.Image:
    width, height = rng.choice([1, 7, 32, 61, 200]), rng.choice([1, 5, 32, 47, 160])
    values = np.random.default_rng(rng.getrandbits(32)).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    picture = Image.fromarray(values, "RGBA").resize((width, height), Image.Resampling.BILINEAR)
    return picture.convert("RGB").convert(mode) if mode != "RGBA" else picture


def _encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def _jpeg(rng: random.Random) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = rng.randint(0, 9)
    options = {"progressive": rng.random() < 0.4, "exif": exif, "icc_profile": rng.randbytes(3000)}
    return _encoded(_picture(rng, rng.choice(["RGB", "L", "CMYK"])), "JPEG", **options)


def _png(rng: random.Random) -> bytes:
    mode = rng.choice(["RGB", "L", "LA", "RGBA", "1", "P"])
    transparency = {"transparency": rng.randint(0, 255)} if mode in ("L", "P") and rng.random() < 0.5 else {}
    return _encoded(_picture(rng, mode), "PNG", **transparency)


def _png_16(rng: random.Random) -> bytes:
    """Grey, colour, and both with alpha, of 16 bits."""
    colour = rng.choice([0, 2, 4, 6])
    width, height = rng.choice([1, 9, 50]), rng.choice([1, 8, 40])
    row = 2 * width * {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    pixels = b"".join(b"\0" + rng.randbytes(row) for _ in range(height))
    transparent = _chunk(b"tRNS", rng.randbytes({0: 2, 2: 6}[colour])) if colour in (0, 2) else b""
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    chunks = _chunk(b"IHDR", header) + transparent + _chunk(b"IDAT", zlib.compress(pixels)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _png_with_text(rng: random.Random) -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text(rng.choice(["prompt", "Raw profile type exif"]), "a" * rng.choice([10, 3_000_000]), zip=True)
    info.add_itxt(rng.choice(["workflow", "XML:com.adobe.xmp"]), "b" * rng.choice([10, 3_000_000]), zip=True)
    return _encoded(_picture(rng), "PNG", pnginfo=info, icc_profile=b"\0" * rng.choice([100, 3_000_000]))


def _gif(rng: random.Random) -> bytes:
    frames = [_picture(rng, "P") for _ in range(rng.choice([1, 3]))]
    return _encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"c" * rng.choice([0, 9000]))


def _webp(rng: random.Random) -> bytes:
    return _encoded(_picture(rng, rng.choice(["RGB", "RGBA"])), "WEBP", lossless=rng.random() < 0.5)


def _bmp(rng: random.Random) -> bytes:
    return _encoded(_picture(rng, rng.choice(["RGB", "L", "1", "P"])), "BMP")


def _tiff(rng: random.Random) -> bytes:
    mode = rng.choice(["RGB", "L", "RGBA", "CMYK", "1", "F", "I;16"])
    picture = _picture(rng, "L").convert("I").convert("I;16") if mode == "I;16" else None
    picture = picture or (_picture(rng, "L").convert("F") if mode == "F" else _picture(rng, mode))
    packing = rng.choice(["raw", "tiff_lzw", "tiff_deflate", "packbits"])
    return _encoded(picture, "TIFF", compression=packing if mode not in ("F", "I;16") else "raw")


_SOUND = {
    "jpeg": _jpeg,
    "png": _png,
    "png of 16 bits": _png_16,
    "png with text": _png_with_text,
    "gif": _gif,
    "webp": _webp,
    "bmp": _bmp,
    "tiff": _tiff,
}


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _overwrite(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    length = min(rng.choice([1, 4, 40]), len(data) - start)
    data[start : start + length] = rng.randbytes(length)


def _cut_out(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.choice([1, 3, 50])]


def _repeat(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = data[start : start + rng.choice([2, 20, 200])] * rng.choice([1, 10, 300])


def _insert(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(min(len(data), 400))
    piece = rng.choice([b"\xff", b"\0", b"\xff\xd8", b"\xff\xda", b"\xff\xe0\0\2"])
    data[start:start] = piece * rng.choice([1, 100, 9999])


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def _resize(data: bytearray, rng: random.Random) -> None:
    """Writes other sizes where the format has its own, or near there."""
    places = {0x89: (16, ">I"), 0x47: (6, "<H"), 0x42: (18, "<I")}  # PNG, GIF, BMP
    start, form = places.get(data[0], (rng.randrange(min(len(data), 64)), ">H"))
    length = struct.calcsize(form)
    for place in (start, start + length):
        data[place : place + length] = struct.pack(form, rng.choice(_SIZES) % 256**length)


def _extreme(data: bytearray, rng: random.Random) -> None:
    """Writes an extreme number somewhere in the header."""
    start = rng.randrange(min(len(data), 300))
    data[start : start + 4] = struct.pack(rng.choice([">I", "<I"]), rng.choice(_SIZES))


def _splice(data: bytearray, rng: random.Random) -> None:
    other = _SOUND[rng.choice(list(_SOUND))](rng)
    start = rng.randrange(len(data))
    data[start:] = other[min(start, len(other) - 1) :]


def _correct_checksums(data: bytearray) -> None:
    """Gives a PNG's chunks the checksums of what is in them now, so that a decoder looks further."""
    place = 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(data):
            return
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
