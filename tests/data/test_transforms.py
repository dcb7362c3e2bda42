import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opencoca.data import EvalTransform, PreprocessConfig, TrainTransform, decode_image, mentions_side, normalize
from opencoca.data.augment import OPERATIONS, rand_augment

from .helpers import encode, gradient

SIZE = (24, 40)  # height, width


def config(**changes):
    return PreprocessConfig(**{"image_size": SIZE, **changes})


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def resize_then_crop(image, size):
    """The textbook order: resize the whole image to cover the target, cut its centre out."""
    height, width = size
    if image.width * height > image.height * width:
        whole = image.resize((int(height * image.width / image.height), height), Image.Resampling.BICUBIC)
    else:
        whole = image.resize((width, int(width * image.height / image.width)), Image.Resampling.BICUBIC)
    left, top = round((whole.width - width) / 2), round((whole.height - height) / 2)
    return np.asarray(whole.crop((left, top, left + width, top + height)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.sampled_from([(32, 32), (24, 40), (50, 21)]))
def test_crop_equals_resize_then_crop(width, height, size):
    image = noise(width, height)
    result = EvalTransform(config(image_size=size)).to_uint8(image)
    assert result.shape == (*size, 3)
    aspect = (width / height) / (size[1] / size[0])
    if 1 / 15 < aspect < 15:  # strips are cut before they are resized
        np.testing.assert_array_equal(result, resize_then_crop(image, size))


@pytest.mark.parametrize("size", [(900, 30), (30, 900)])
def test_crop_of_a_strip_does_not_build_the_whole(size, monkeypatch):
    image = gradient(*size)
    expected = resize_then_crop(image, SIZE).astype(int)
    monkeypatch.setattr("opencoca.data.transforms._MAX_COVER_RATIO", 0)
    assert np.abs(EvalTransform(config()).to_uint8(image) - expected).max() <= 1
    monkeypatch.undo()
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, to, *a, **k: sizes.append(to) or resize(self, to, *a, **k))
    EvalTransform(config()).to_uint8(Image.new("RGB", (1, 5000)))
    assert sizes == [SIZE[::-1]]


def test_squash_uses_the_whole_image():
    image = noise(100, 30)
    expected = np.asarray(image.resize(SIZE[::-1], Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(EvalTransform(config(resize_mode="squash")).to_uint8(image), expected)


@pytest.mark.parametrize(("size", "inside"), [((80, 24), (12, 40)), ((24, 48), (24, 12)), ((400, 1), (1, 40))])
def test_pad_keeps_the_aspect_ratio_and_fills_with_the_mean(size, inside):
    cfg = config(resize_mode="pad", mean=(0.0, 0.0, 1.0))
    result = EvalTransform(cfg).to_uint8(Image.new("RGB", size, (255, 255, 0)))
    yellow = (result == [255, 255, 0]).all(-1)
    rows, columns = np.where(yellow)
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == inside
    assert (result[~yellow] == [0, 0, 255]).all()
    assert abs((SIZE[0] - 1 - rows.max()) - rows.min()) <= 1
    assert abs((SIZE[1] - 1 - columns.max()) - columns.min()) <= 1


@pytest.mark.parametrize("mode", ["crop", "pad", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (1, 20_000), (20_000, 1), SIZE[::-1]])
def test_extreme_shapes(mode, size):
    result = EvalTransform(config(resize_mode=mode)).to_uint8(Image.new("RGB", size, (124, 116, 104)))
    assert result.shape == (*SIZE, 3)
    assert np.abs(result.astype(int) - [124, 116, 104]).max() <= 2


def test_an_image_of_the_right_size_is_left_alone():
    image = noise(*SIZE[::-1])
    for mode in ("crop", "pad", "squash"):
        np.testing.assert_array_equal(EvalTransform(config(resize_mode=mode)).to_uint8(image), np.asarray(image))


def test_normalisation():
    cfg = config(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    image = noise(*SIZE[::-1])
    result = EvalTransform(cfg)(image)
    expected = (np.asarray(image).astype(np.float64) / 255 - cfg.mean) / cfg.std
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    np.testing.assert_allclose(result.numpy(), expected.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)


def test_config_round_trip_and_mistakes():
    cfg = config(resize_mode="pad")
    assert PreprocessConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    for changes, message in [
        ({"image_size": (0, 5)}, "image_size must be two whole numbers from 1"),
        ({"image_size": (5,)}, "image_size must have 2 values"),
        ({"std": (0, 1, 1)}, "std must be positive"),
        ({"resize_mode": "zoom"}, "resize_mode must be one of .* got 'zoom'"),
    ]:
        with pytest.raises(ValueError, match=message):
            config(**changes)
    with pytest.raises(ValueError, match="unknown settings: size"):
        PreprocessConfig.from_dict({"size": 3})


FULL = {"color_jitter": 0.4, "rand_augment": (2, 15)}


@pytest.mark.parametrize("options", [{}, FULL])
def test_training_is_a_function_of_the_seed(options):
    transform = TrainTransform(config(), **options)
    image = gradient(90, 70)
    once, again = (transform(image, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(once, again)
    assert once.shape == (3, *SIZE)
    others = [transform(image, np.random.default_rng(seed)) for seed in range(6, 12)]
    assert not any(torch.equal(once, other) for other in others)


@pytest.mark.parametrize("options", [{}, FULL])
def test_flip_mirrors_and_changes_nothing_else(options):
    """With the same seed, only the mirroring may differ: later draws must not depend on it."""
    transform = TrainTransform(config(), **{**options, "rand_augment": None})
    image = gradient(90, 70)
    for seed in range(5):
        plain = transform(image, np.random.default_rng(seed), flip=False)
        mirrored = transform(image, np.random.default_rng(seed), flip=True)
        assert torch.allclose(plain.flip(-1), mirrored, atol=0.02)
        assert not torch.allclose(plain, mirrored, atol=0.1)
        drawn = transform(image, np.random.default_rng(seed))
        assert torch.equal(drawn, plain) or torch.equal(drawn, mirrored)


def test_flip_probability():
    image = gradient(40, 24)
    data = encode(image, "PNG")
    for probability, low, high in [(0.0, 0, 0), (1.0, 200, 200), (0.5, 70, 130)]:
        transform = TrainTransform(config(), scale=(1, 1), ratio=(1, 1), flip_probability=probability)
        plain = np.asarray(image).astype(int)
        flips = 0
        for seed in range(200):
            result = transform.decode_uint8(data, np.random.default_rng(seed)).astype(int)
            flips += np.abs(result - plain).sum() > np.abs(result[:, ::-1] - plain).sum()
        assert low <= flips <= high


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(0, 10**6),
    st.floats(0.05, 1.0),
    st.sampled_from([(1.0, 1.0), (0.75, 4 / 3), (0.1, 0.2)]),
)
def test_crops_lie_within_the_image_and_the_ranges(width, height, seed, smallest, ratio):
    transform = TrainTransform(config(), scale=(smallest, 1.0), ratio=ratio)
    left, top, right, bottom = transform._draw_box((width, height), np.random.default_rng(seed))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    if min(width, height) > 200:
        aspect = (right - left) / (bottom - top) / (SIZE[1] / SIZE[0])
        assert ratio[0] * 0.9 <= aspect <= ratio[1] * 1.1
        area, whole = (right - left) * (bottom - top), width * height
        fills = right - left == width or bottom - top == height  # the largest box, where none was found
        assert fills or area >= smallest * whole * 0.95


def test_decode_equals_transform_of_the_decoded_image():
    """From a large JPEG: the same crop, up to the coarser decoding. From a PNG: the same pixels."""
    transform = TrainTransform(config(), color_jitter=0.3)
    image = gradient(1000, 800)
    exif = Image.Exif()
    exif[0x0112] = 6
    for data, tolerance in [
        (encode(image), 0.05),
        (encode(image, exif=exif), 0.05),
        (encode(image, "PNG"), 1e-6),
        (encode(gradient(45, 30)), 1e-6),
    ]:
        for seed in range(4):
            direct = normalize(transform.decode_uint8(data, np.random.default_rng(seed)), transform.config)
            decoded = transform(decode_image(data), np.random.default_rng(seed))
            assert (direct - decoded).abs().mean() <= tolerance


def test_decode_uses_draft(monkeypatch):
    sizes = []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, *a, **k: sizes.append(self.size) or resize(self, *a, **k))
    TrainTransform(config()).decode_uint8(encode(Image.new("RGB", (1600, 960))), np.random.default_rng(0))
    assert sizes == [(200, 120)]


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("strength", [-1.0, -0.3, 0.0, 1.0])
def test_every_operation_keeps_mode_and_size(operation, strength):
    image = gradient()
    result = operation(image, strength, (9, 9, 9))
    assert result.mode == "RGB"
    assert result.size == image.size


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - {"auto_contrast", "equalize", "sharpness"}))
def test_no_strength_is_no_change_and_full_strength_is_one(name):
    image = gradient(64, 64)
    still = np.asarray(OPERATIONS[name](image, 0.0, (9, 9, 9))).astype(int)
    assert np.abs(still - np.asarray(image)).max() <= 1
    if name != "identity":
        moved = np.asarray(OPERATIONS[name](image, 1.0, (9, 9, 9))).astype(int)
        assert np.abs(moved - np.asarray(image)).mean() > 2


def test_geometric_operations_move_the_way_they_say():
    image = Image.new("RGB", (40, 40), (0, 0, 0))
    image.paste((255, 255, 255), (18, 18, 22, 22))

    def centre(result):
        rows, columns = np.where(np.asarray(result)[..., 0] > 128)
        return rows.mean(), columns.mean()

    assert centre(OPERATIONS["translate_x"](image, 0.5, (0, 0, 0))) == pytest.approx((19.5, 10.5))
    assert centre(OPERATIONS["translate_y"](image, -0.5, (0, 0, 0))) == pytest.approx((28.5, 19.5))
    for name in ("rotate", "shear_x", "shear_y"):  # all about the centre
        assert centre(OPERATIONS[name](image, 1.0, (0, 0, 0))) == pytest.approx((19.5, 19.5), abs=0.6)
    opened = np.asarray(OPERATIONS["translate_x"](image, 1.0, (7, 8, 9)))
    assert (opened[:, -10:] == [7, 8, 9]).all()


def test_rand_augment_draws_every_operation(monkeypatch):
    called = set()
    fakes = {str(n): lambda image, strength, fill, n=n: called.add((n, strength)) or image for n in range(14)}
    monkeypatch.setattr("opencoca.data.augment.OPERATIONS", fakes)
    rand_augment(gradient(), np.random.default_rng(0), 300, 15, fill=(0, 0, 0))
    assert called == {(n, strength) for n in range(14) for strength in (-0.5, 0.5)}


def test_mistakes():
    for options, message in [
        ({"scale": (0.0, 1.0)}, "scale must be a range within 0..1"),
        ({"scale": (0.9, 0.5)}, "scale must be"),
        ({"ratio": (-1, 1)}, "ratio must be"),
        ({"flip_probability": 1.5}, "flip_probability must be in 0..1, got 1.5"),
        ({"color_jitter": -1}, "color_jitter must be"),
        ({"rand_augment": (2, 31)}, "rand_augment must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainTransform(config(), **options)


@pytest.mark.parametrize(
    "caption", ["a dog on the left", "Left of a tree", "the right-hand man", "its leftmost seat", "turns rightward ."]
)
def test_mentions_side(caption):
    assert mentions_side(caption)


@pytest.mark.parametrize("caption", ["a bright light", "copyright", "a cleft rock", "aright", "upright piano", ""])
def test_mentions_no_side(caption):
    assert not mentions_side(caption)
