"""Token ids and pixels equal open_clip's: against stored facts of it, and (marker peers) against the package.

`make_open_clip_facts.py` wrote the facts.
"""

import io
import json
import random
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_clip_cases import IMAGE_SIZE, encoded_images, texts
from opencoca.data import EvalTransform, PreprocessConfig, iterate_images
from opencoca.inference.preprocess import Preprocess
from opencoca.tokenizer import Tokenizer

FACTS = json.loads(Path(__file__).with_name("open_clip_facts.json").read_text())
IMAGES = encoded_images()
AS_STORED = PreprocessConfig(IMAGE_SIZE, mean=(0.0,) * 3, std=(1.0,) * 3, decoding="as_stored")
UPRIGHT = replace(AS_STORED, decoding="upright")
# Where a file is not an upright opaque picture in 8 bits and grey or RGB, open_clip's order of conversion shows.
PLAIN = [name for name in IMAGES if name in ("rgb", "grey") or " x " in name]
PHOTOS = sorted((Path(__file__).parents[1] / "demo" / "photos").glob("*.jpg"))


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


def pixels_of(data: bytes, config: PreprocessConfig) -> np.ndarray:
    """(H, W, 3) in 0..255"""
    return (Preprocess(config)(data)[0].permute(1, 2, 0) * 255).numpy()


def expected_pixels(name: str) -> np.ndarray:
    return np.array(FACTS["pixels"][name]).reshape(*IMAGE_SIZE, 3)


def test_token_ids_of_random_texts_are_open_clips(clip):
    expected = FACTS["token_ids"]
    pairs = zip(texts(len(expected)), expected, strict=True)
    assert [text for text, ids in pairs if clip.encode(text)[1:-1] != ids] == []


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("cafÃ© â€œhiâ€\x9d", 'café "hi"'),
        ("\x1b[31ma red\x1b[0m dog", "a red dog"),
        ("ﬁnd ＦＵＬＬ", "find full"),
        ("ΣΊΣΥΦΟΣ", "σίσυφος"),
        ("fish &amp;amp; chips", "fish & chips"),
        (" a\u2028 dog\x07 in\r\nthe\u3000snow\n", "a dog in the snow"),
    ],
)
def test_texts_are_cleaned_as_clips_were(clip, text, same):
    assert clip.normalize(text) == same
    assert clip.encode(text) == clip.encode(same)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("name", IMAGES)
def test_pixels_as_stored_are_open_clips(name):
    np.testing.assert_allclose(pixels_of(IMAGES[name], AS_STORED), expected_pixels(name), atol=0.01)


@pytest.mark.parametrize("name", PLAIN)
def test_upright_pixels_of_plain_images_are_open_clips(name):
    np.testing.assert_allclose(pixels_of(IMAGES[name], UPRIGHT), expected_pixels(name), atol=0.01)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_the_choice_reaches_whole_data_sets(tmp_path):
    files = []
    for number, data in enumerate(IMAGES.values()):
        files.append(tmp_path / f"{number}.img")
        files[-1].write_bytes(data)
    (batch,) = iterate_images(files, EvalTransform(AS_STORED), len(files))
    assert batch.errors == ()
    for pixels, name in zip(batch.pixels, IMAGES, strict=True):
        np.testing.assert_allclose(pixels.permute(1, 2, 0) * 255, expected_pixels(name), atol=0.01)


def test_upright_is_what_the_picture_shows():
    rotated = pixels_of(IMAGES["exif rotated"], UPRIGHT)
    assert np.abs(np.rot90(pixels_of(IMAGES["rgb"], UPRIGHT), -1) - rotated).max() <= 1  # rounding of two passes
    deep = pixels_of(IMAGES["16 bit"], UPRIGHT)
    assert np.abs(deep - pixels_of(IMAGES["grey"], UPRIGHT)).max() <= 1
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    np.testing.assert_allclose(Preprocess(UPRIGHT)(clear), 1.0)


def test_an_unknown_decoding_is_refused():
    with pytest.raises(ValueError, match="decoding must be one of"):
        replace(UPRIGHT, decoding="sideways")


def test_older_configurations_are_read_as_upright():
    stored = UPRIGHT.to_dict()
    del stored["decoding"]
    assert PreprocessConfig.from_dict(stored) == UPRIGHT


@pytest.mark.peers
def test_random_texts_against_the_package(clip):
    peer = import_module("open_clip").SimpleTokenizer()
    differing = [text for text in texts(3000, seed=1) if clip.encode(text)[1:-1] != peer.encode(text)]
    assert differing == []


@pytest.mark.peers
@pytest.mark.parametrize("size", [224, 288])
def test_photographs_against_the_package(size):
    transform = import_module("open_clip").image_transform(size, is_train=False)
    ours = Preprocess(PreprocessConfig((size, size)))
    stored = Preprocess(PreprocessConfig((size, size), decoding="as_stored"))
    rng = random.Random(0)
    for photo in PHOTOS:
        with Image.open(photo) as image:
            shapes = [image, *(image.resize((rng.randint(20, 900), rng.randint(20, 900))) for _ in range(3))]
            for shape in shapes:
                expected = transform(shape.copy())
                assert (ours(shape)[0] - expected).abs().max() < 1e-5
    for data in IMAGES.values():
        expected = transform(Image.open(io.BytesIO(data)))
        assert (stored(data)[0] - expected).abs().max() < 1e-5
