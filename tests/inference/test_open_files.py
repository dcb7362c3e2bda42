import io

import pytest
from PIL import Image

from opencoca.data import ImageError, PreprocessConfig
from opencoca.inference.preprocess import Preprocess, as_list


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").save(path)  # with bytes 0x0A in it
    return path


def test_an_open_file_is_one_image(photo):
    prepare = Preprocess(PreprocessConfig((8, 8)))
    expected, data = prepare(photo), photo.read_bytes()
    with open(photo, "rb") as file:
        assert prepare(file).equal(expected)
    assert prepare(io.BytesIO(data)).equal(expected)
    assert prepare([io.BytesIO(data), photo]).equal(prepare([photo, photo]))
    assert len(as_list(io.BytesIO(data))) == 1


def test_files_that_are_no_image_are_named(photo):
    prepare = Preprocess(PreprocessConfig((8, 8)))
    with open(photo, encoding="latin-1") as file, pytest.raises(ImageError, match=r'photo.png.*open it with mode "rb"'):
        prepare(file)
    with pytest.raises(ImageError, match=r"'number 1 \(file\)': the file is empty"):
        prepare([photo, io.BytesIO()])
