import base64
import io
import os
import pickle
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from opencoca.data import ImageError, allow_pixels, decode_image, images, read_header, rgb, to_rgb

from .helpers import encode, gradient, huge_png


def assert_close(actual: Image.Image, expected: Image.Image, tolerance: float) -> None:
    assert actual.mode == "RGB"
    assert actual.size == expected.size
    difference = np.abs(np.asarray(actual).astype(float) - np.asarray(expected).astype(float))
    assert difference.mean() <= tolerance


@pytest.mark.parametrize(
    ("mode", "format", "tolerance"),
    [
        ("RGB", "PNG", 0),
        ("RGB", "JPEG", 3),
        ("RGB", "WEBP", 8),
        ("RGB", "TIFF", 0),
        ("RGB", "BMP", 0),
        ("RGB", "PPM", 0),
        ("P", "PNG", 20),
        ("P", "GIF", 20),
        ("RGBA", "PNG", 0),
        ("RGBA", "WEBP", 8),
        ("CMYK", "JPEG", 4),
        ("CMYK", "TIFF", 1),
        ("YCbCr", "JPEG", 3),
    ],
)
def test_every_colour_mode_keeps_its_colours(mode, format, tolerance):
    image = gradient()
    assert_close(decode_image(encode(image.convert(mode), format)), image, tolerance)


@pytest.mark.parametrize(("mode", "format"), [("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("1", "PNG"), ("1", "TIFF")])
def test_grey_modes_become_equal_channels(mode, format):
    grey = gradient().convert(mode)
    assert_close(decode_image(encode(grey, format)), grey.convert("L").convert("RGB"), 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_to_rgb_accepts_every_mode_and_returns_a_new_image(mode):
    source = gradient().convert("L").convert(mode) if mode in ("I", "F", "I;16") else gradient().convert(mode)
    result = to_rgb(source)
    assert result.mode == "RGB"
    assert result is not source


def test_16_bit_grey_is_scaled_not_cut():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.rint(ramp / 257.0)
    for format in ("PNG", "TIFF"):
        result = np.asarray(decode_image(encode(Image.fromarray(ramp), format)))
        assert np.abs(result[..., 0] - expected).max() <= 1
    big_endian = Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes())
    assert np.abs(np.asarray(to_rgb(big_endian))[..., 1] - expected).max() <= 1


def test_32_bit_and_float_grey():
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    expected = np.rint(ramp * 255)
    for values in (ramp.astype(np.float32), (ramp * 255).astype(np.float32), (ramp * 65535).astype(np.int32)):
        assert np.abs(np.asarray(decode_image(encode(Image.fromarray(values), "TIFF")))[..., 2] - expected).max() <= 1
    holes = ramp.astype(np.float32)
    holes[0, :3] = [np.nan, np.inf, -np.inf]
    assert np.asarray(to_rgb(Image.fromarray(holes)))[0, :3].max() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_onto_white(mode):
    image = Image.new(mode, (4, 2), (0,) * len(mode))
    image.putpixel((0, 0), (0,) * (len(mode) - 1) + (255,))
    image.putpixel((1, 0), (0,) * (len(mode) - 1) + (128,))
    pixels = np.asarray(decode_image(encode(image, "PNG")))
    assert pixels[0, 0].tolist() == [0, 0, 0]
    assert np.abs(pixels[0, 1].astype(int) - 127).max() <= 1
    assert pixels[1, 3].tolist() == [255, 255, 255]


def test_transparent_palette_colour_becomes_white():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 762)
    image.putpixel((2, 2), 0)
    pixels = np.asarray(decode_image(encode(image, "PNG", transparency=0)))
    assert pixels[2, 2].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() == [200, 100, 50]
    rgb_key = encode(Image.new("RGB", (2, 2), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert np.asarray(decode_image(rgb_key)).min() == 255


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    pixels = np.asarray(decode_image(encode(frames[0], format, save_all=True, append_images=frames[1:])))
    assert pixels[..., 0].min() > 200
    assert pixels[..., 2].max() < 60


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(gradient(), format, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        expected = ImageOps.exif_transpose(image).convert("RGB")
    upright = decode_image(data)
    assert upright.tobytes() == expected.tobytes()
    assert upright.size == ((32, 48) if orientation >= 5 else (48, 32))
    header = read_header(data)
    assert (header.width, header.height) == upright.size
    assert 0x0112 not in upright.getexif()


@pytest.mark.filterwarnings("error")
def test_damaged_exif_does_not_lose_the_picture():
    data = encode(gradient(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xee" * 30)
    assert decode_image(data).size == (48, 32)


@pytest.mark.parametrize("orientation", [1, 6])
def test_draft_is_small_enough_and_never_too_small(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = gradient(1600, 800)
    data = encode(image, "JPEG", exif=exif)
    size = (190, 90) if orientation == 1 else (90, 190)
    draft = decode_image(data, draft_size=size)
    assert draft.width >= size[0]
    assert draft.height >= size[1]
    assert draft.width * draft.height <= 1600 * 800 / 64
    full = decode_image(data).resize(draft.size, Image.Resampling.BOX)
    assert_close(draft, full, 3)
    png = encode(image, "PNG")
    assert decode_image(png, draft_size=size).size == (1600, 800)


def test_truncated_files_are_refused(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        data = encode(noise, format)
        path = tmp_path / f"cut.{format.lower()}"
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ImageError, match=r"^cannot read the image '.*/cut\.") as caught:
            decode_image(path)
        assert "\n" not in str(caught.value)
        assert str(path) == caught.value.name


HEIC = """
    AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAA
    AAAERAAAEAAQAAAAABoQABAAAAAAAAAHkAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA/WlwcnAA
    AADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkA
    AAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAA
    AAAoY2xhcAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBpeGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAI
    FtZGF0AAAAdSgBrwT4cWTTt/+Jd///85Dey/tNRPfIP66GlL/dXC//836f2nLXmn+id2T8mooZS4kn6RhqOIkwOX5fJPdzj0u8p6/8DnoUmQzW
    3pY+ASmU3HqXC44vnoVeDtRzm6QJrzD/4M8vf1o1T4vyVWjOpmcfQel9gA==
"""  # 64 x 48 pixels, red on the left and blue on the right


def test_heic_as_phones_write_it():
    data = base64.b64decode(HEIC)
    expected = Image.new("RGB", (64, 48), (200, 30, 40))
    expected.paste((20, 40, 220), (32, 0, 64, 48))
    assert_close(decode_image(data), expected, 8)
    assert read_header(data).format == "HEIF"
    with pytest.raises(ImageError, match=r"damaged|end of file"):
        decode_image(data[:450])


def test_heic_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(images, "_formats", lambda: ("JPEG", "PNG"))
    with pytest.raises(ImageError, match=r"pip install 'opencoca\[heif\]'"):
        decode_image(base64.b64decode(HEIC))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"I am no photograph.\n" * 20, "it is a text file, not an image"),
        (b"<!DOCTYPE html><html><body>404</body></html>", r"it is a web page \(HTML\)"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "Pillow does not support the format SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64, r"pip install 'opencoca\[heif\]'|damaged"),
        (b"\xff\x0a" + b"\x81" * 64, "Pillow does not support the format JPEG XL"),
        (b"\x93\x81\x00\x05" * 30, "not an image in a format that Pillow supports"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image|text file"),
        (b"P6\n0 5\n255\n", "."),
    ],
)
def test_what_is_no_image_says_what_it_is(data, reason, tmp_path):
    with pytest.raises(ImageError, match=reason):
        decode_image(data)
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=f"^cannot read the image '{path}': .*({reason})"):
        decode_image(path)
    assert issubclass(ImageError, ValueError)


def test_missing_file_folder_and_name(tmp_path):
    with pytest.raises(ImageError, match=r"'absent\.jpg': there is no such file"):
        decode_image("absent.jpg")
    with pytest.raises(ImageError, match="directory"):
        decode_image(tmp_path)
    with pytest.raises(ImageError, match="'third': the file is empty"):
        decode_image(b"", name="third")
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "it is bad")))
    assert (error.name, error.reason) == ("a.jpg", "it is bad")


@pytest.mark.filterwarnings("error")
def test_decompression_bomb_is_refused_from_the_header():
    data = huge_png()
    began = time.process_time()
    with pytest.raises(ImageError, match="pixels"):
        decode_image(data, name="bomb.png")
    assert time.process_time() - began < 1.0
    with pytest.raises(ImageError, match="13000 x 13000 pixels are more than the 100,000,000 allowed"):
        decode_image(huge_png(13_000, 13_000), max_pixels=10**8)
    with pytest.raises(ImageError, match="48 x 32 pixels are more than the 1,000 allowed"):
        decode_image(encode(gradient()), max_pixels=1000)
    with pytest.raises(ImageError, match="1,000 allowed"):
        read_header(encode(gradient()), max_pixels=1000)


def test_more_pixels_are_allowed_by_name(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    monkeypatch.setattr(images, "_allowed_pixels", 1000)
    data = encode(gradient())
    with pytest.raises(ImageError, match="make it smaller, or allow more"):
        decode_image(data)
    allow_pixels(48 * 32)
    assert decode_image(data).size == (48, 32)


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "LA"])
def test_memory_counts_what_conversion_takes(mode, monkeypatch):
    """Eight bytes a pixel: four of the image, and four of the RGB image made of it."""
    data = encode(gradient().convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    monkeypatch.setattr(images, "_MAX_MEMORY_BYTES", 48 * 32 * 8)
    assert decode_image(data).size == (48, 32)
    monkeypatch.setattr(images, "_MAX_MEMORY_BYTES", 48 * 32 * 8 - 1)
    with pytest.raises(ImageError, match=f"to decode its 48 x 32 pixels .* {mode}.* more than the .* allowed"):
        decode_image(data)
    assert decode_image(encode(gradient())).size == (48, 32)  # RGB needs half


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "colour"), [(16, 0), (8, 0), (8, 2), (1, 0)])
def test_memory_at_the_limit_of_pixels(depth, colour):
    side = 13_377
    row = b"\0" + b"\x80" * (side * depth * {0: 1, 2: 3}[colour] // 8 + 1)
    packer = zlib.compressobj(1)
    packed = b"".join([packer.compress(row[: -1 if depth > 1 else None]) for _ in range(side)] + [packer.flush()])
    data = png(side, side, depth, colour, packed)
    del packed
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_bytes()
    assert decode_image(data).size == (side, side)
    assert peak_bytes() - before < 1.2e9


def peak_bytes():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "HSV", "I", "F", "I;16"])
def test_strips_change_nothing(mode, monkeypatch):
    source = gradient().convert("L").convert(mode) if mode in ("I", "F", "I;16") else gradient().convert(mode)
    if mode in ("P", "I;16"):
        source.info["transparency"] = 7
    whole = to_rgb(source)
    monkeypatch.setattr(rgb, "_STRIP_PIXELS", 48 * 5)
    assert to_rgb(source).tobytes() == whole.tobytes()


def text_chunks(size):
    return [
        png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"n" * size)),
        png_chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"n" * size)),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"n" * size)),
        png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"n" * size)),
        png_chunk(b"pHYs", b"\0"),  # too short
    ]


@pytest.mark.parametrize("size", [100, 3_000_000])
def test_texts_and_profiles_of_a_png_do_not_matter(size):
    data = encode(gradient(), "PNG")
    header, end = data[:33], data[-12:]
    noisy = header + b"".join(text_chunks(size)) + data[33:-12] + b"".join(text_chunks(size)) + end
    assert decode_image(noisy).tobytes() == gradient().tobytes()
    assert read_header(noisy).width == 48


def test_orientation_in_a_png_s_xmp_still_counts():
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    chunk = png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    data = encode(gradient(), "PNG")
    turned = decode_image(data[:33] + chunk + data[33:])
    assert turned.tobytes() == gradient().transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize("fill", [b"\xff", b"\0", b"\xff\0"])
def test_bytes_between_the_segments_of_a_jpeg_take_no_time(fill):
    data = encode(gradient(), "JPEG", progressive=True)
    at = 4 + int.from_bytes(data[4:6], "big")  # behind the first segment
    began = time.process_time()
    found = decode_image(data[:at] + fill * (3_000_000 // len(fill)) + data[at:])
    assert time.process_time() - began < 0.6
    assert found.tobytes() == decode_image(data).tobytes()


def test_files_of_very_many_parts_are_refused_at_once():
    jpeg, plain = encode(gradient()), encode(gradient(), "PNG")
    for data, reason in (
        (jpeg[:2] + b"\xff\xe1\0\2" * 30_000 + jpeg[2:], "more than 20,000 parts"),
        (plain[:33] + png_chunk(b"teXt", b"") * 300_000 + plain[33:], "more than 200,000 parts"),
        (jpeg[:-2] + b"\xff\xda\0\x0c" * 300 + jpeg[-2:], "more than 256 scans"),
    ):
        with pytest.raises(ImageError, match=reason):
            decode_image(data)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent", "expected"),
    [
        (16, 0, b"\x12\x34\x80\x00", b"\x12\x34", [(255, 255, 255), (128, 128, 128)]),
        (16, 2, b"\x12\x34\x56\x78\x9a\xbc\0\0\xff\xff\0\0", b"\x12\x34\x56\x78\x9a\xbc", [(255,) * 3, (0, 255, 0)]),
        (2, 0, b"\x60", b"\0\1", [(255, 255, 255), (170, 170, 170)]),
        (4, 0, b"\x36", b"\0\3", [(255, 255, 255), (102, 102, 102)]),
        (1, 0, b"\x40", b"\0\0", [(255, 255, 255), (255, 255, 255)]),
    ],
)
def test_the_transparent_colour_of_every_depth(depth, colour, row, transparent, expected):
    data = png(2, 1, depth, colour, zlib.compress(b"\0" + row), png_chunk(b"tRNS", transparent))
    image = decode_image(data)
    assert [image.getpixel((x, 0)) for x in range(2)] == expected


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, packed, more=b""):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_devices_and_large_files_are_not_read(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    (tmp_path / "zeros.jpg").symlink_to("/dev/zero")
    for path in (pipe, tmp_path / "zeros.jpg"):
        with pytest.raises(ImageError, match="it is a pipe or a device, not an ordinary file"):
            decode_image(path)
    (tmp_path / "photo.jpg").write_bytes(encode(gradient()))
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 100)
    with pytest.raises(ImageError, match=r"its [\d,]+ bytes are more than the 100 allowed"):
        decode_image(tmp_path / "photo.jpg")
    with pytest.raises(ImageError, match="null"):
        decode_image("a\0b.jpg")


def test_messages_are_short_and_printable():
    for name in ("x" * 5000, "new\nline\x1b[31m.jpg"):
        with pytest.raises(ImageError) as caught:
            decode_image(b"\xff\xd8\xff\xe0" * 9, name=name)
        assert len(str(caught.value)) <= 300
        assert str(caught.value).isprintable()


@pytest.mark.skipif(not features.check("jpg_2000"), reason="this Pillow has no JPEG 2000")
def test_jpeg_2000():
    assert_close(decode_image(encode(gradient(), "JPEG2000")), gradient(), 2)
