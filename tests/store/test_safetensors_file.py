"""Files that nobody vouches for: whatever is wrong with them is one sentence, found before the weights are read."""

import json
import os
import stat
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_helpers import save_tiny_model
from opencoca.store.model_folder import load_model_folder
from opencoca.store.safetensors_file import (
    MAX_HEADER_BYTES,
    TensorInfo,
    non_finite,
    read_tensor_infos,
    read_tensors,
    write_tensors,
)

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor([1, 2]),
    "c": torch.tensor(0.5, dtype=torch.bfloat16),
    "d": torch.zeros(0, 4, dtype=torch.float16),
}
SECONDS = 2.0  # that an error may take, however large the file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "folder")


def write(file: Path, header: object, size: int = 0, length: int | None = None) -> None:
    """A file with this header, which says that it is `length` long, and `size` bytes of nothing (no disk is used)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(struct.pack("<Q", len(text) if length is None else length) + text)
        stream.truncate(8 + len(text) + size)


def entry(start: int, end: int, shape: tuple[int, ...] = (4,), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_all_comes_back(file: Path) -> None:
    infos = read_tensor_infos(file)
    assert infos == {
        name: TensorInfo(tuple(t.shape), "float" if t.is_floating_point() else str(t.dtype))
        for name, t in TENSORS.items()
    }
    found = read_tensors(file)
    assert found.keys() == TENSORS.keys()
    assert all(found[name].equal(tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


def test_writing_to_a_tensor_leaves_the_file(file: Path) -> None:
    before = file.read_bytes()
    read_tensors(file)["a"].fill_(7)
    assert file.read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 1234, 4999])
def test_numbers_that_are_none_are_found_anywhere(dtype: torch.dtype, value: float, position: int) -> None:
    tensor = torch.full((50, 100), torch.finfo(dtype).max, dtype=dtype)  # a sum would overflow
    tensors = {"fine": tensor, "broken": tensor.clone(), "int": torch.tensor([1]), "empty": tensor[:0]}
    assert non_finite(tensors) == []
    tensors["broken"].view(-1)[position] = value
    assert non_finite(tensors) == ["broken"]


@pytest.mark.parametrize(
    ("header", "size"),
    [
        ({"a": entry(0, 16), "b": entry(8, 24)}, 24),  # they overlap
        ({"a": entry(0, 16), "b": entry(0, 16)}, 16),
        ({"a": entry(0, 16), "b": entry(20, 36)}, 36),  # a gap
        ({"a": entry(0, 16)}, 20),  # more bytes than tensors
        ({"a": entry(0, 16)}, 12),  # fewer
        ({"a": entry(0, 12)}, 12),  # the shape needs 16
        ({"a": entry(16, 0)}, 16),
        ({"a": entry(0, 2**63)}, 16),
        ({"a": entry(0, 16, (2**40, 2**40))}, 16),
        ({"a": entry(0, 16, dtype="F99")}, 16),
        ({"a": {"dtype": "F32"}}, 16),
        (b"\x80\x04cposix\nsystem\n", 16),  # a pickle
        (b'{"a":' * 100_000, 0),
        (b"\xff\xfe", 0),
    ],
)
@pytest.mark.parametrize("read", [read_tensor_infos, read_tensors])
def test_damaged_headers_are_one_sentence(tmp_path: Path, header: object, size: int, read: Callable) -> None:
    write(tmp_path / "x.safetensors", header, size)
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged or cut short .* copy or download it again"):
        read(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [0, 5, 7])
def test_a_file_of_a_few_bytes_is_damaged(tmp_path: Path, length: int) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"\0" * length)
    with pytest.raises(ValueError, match="end before its header does"):
        read_tensors(tmp_path / "x.safetensors")


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 100_000_000, 2**63])
def test_a_huge_header_is_not_read(tmp_path: Path, length: int) -> None:
    many = b'{"' + b"a" * 1000  # what it holds does not matter: it is refused by its length
    write(tmp_path / "x.safetensors", many, size=4_000_000_000, length=length)
    started = time.process_time()
    with pytest.raises(ValueError, match="is damaged or"):
        read_tensor_infos(tmp_path / "x.safetensors")
    assert time.process_time() - started < SECONDS / 10


# The same in a model's folder


def test_a_large_file_of_wrong_shapes_is_refused_unread(folder: Path) -> None:
    """Four gigabytes, on a disk and in a memory that need not have them."""
    names = sorted(load_file(folder / "model.safetensors"))
    size = 4_000_000_000 // len(names) // 4 * 4
    header = {name: entry(i * size, (i + 1) * size, (size // 4,)) for i, name in enumerate(names)}
    write(folder / "model.safetensors", header, size * len(names))
    started = time.process_time()
    with pytest.raises(ValueError, match=rf"{len(names)} of another shape"):
        load_model_folder(folder)
    assert time.process_time() - started < SECONDS


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model["image"].update(depth=10**9), "depth 1000000000 must be at most 512"),
        (lambda model: model["text"].update(unimodal_depth=500), r"asks for \d+ layers, but there are \d+ tensors"),
        (lambda model: model["text"].update(width=10**30, num_heads=1), "describes no model"),
        (lambda model: model["text"].update(vocab_size=10**18), "describes no model|of another shape"),
        (lambda model: model["image"].update(name="timm:hf-hub:someone/model"), "is more than a name"),
        (lambda model: model["image"].update(name="timm:local-dir:/tmp/x"), "is more than a name"),
        (lambda model: model["image"].update(name="../../x"), "is more than a name"),
    ],
)
def test_a_configuration_that_would_take_long_or_reach_outside_is_refused(
    folder: Path, change: Callable[[dict], object], message: str
) -> None:
    change_config(folder, lambda config: change(config["model"]))
    started = time.process_time()
    with pytest.raises(ValueError, match=message):
        load_model_folder(folder)
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_huge_texts_are_not_read(folder: Path, name: str) -> None:
    with open(folder / name, "wb") as stream:
        stream.truncate(10_000_000_000)
    started = time.process_time()
    with pytest.raises(ValueError, match=f"{name} is damaged or no model's: it has 10,000,000,000 bytes"):
        load_model_folder(folder)
    assert time.process_time() - started < SECONDS


def test_deeply_nested_texts_are_damaged(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 500_000)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_model_folder(folder)


def test_a_pickle_in_the_weights_place_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"x": Evil()}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model_folder(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions of this kind exist on POSIX systems")
def test_others_may_read_what_is_written_where_they_may_read_other_files(folder: Path) -> None:
    write_tensors(folder / "more.safetensors", TENSORS)
    (folder / "plain").write_text("plain")
    expected = stat.S_IMODE((folder / "plain").stat().st_mode)
    for file in folder.iterdir():  # `more.safetensors`, and the whole of a saved model
        assert stat.S_IMODE(file.stat().st_mode) == expected, file.name
