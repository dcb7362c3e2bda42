"""Files that others wrote: every form that weights come in, and what must not be opened, run or believed."""

import io
import json
import os
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opencoca.store.interop.checkpoint_files import _load_zip, read_checkpoint

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor(2.5), "c": torch.arange(3)}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor] = TENSORS) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert not found[name].requires_grad


WRAPPED = {
    "bare": TENSORS,
    "ordered": OrderedDict(TENSORS),
    "parameters": {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in TENSORS.items()},
    "under state_dict": {"epoch": 3, "state_dict": TENSORS, "optimizer": {"state": {0: torch.zeros(2)}}},
    "data-parallel": {"state_dict": {f"module.{name}": tensor for name, tensor in TENSORS.items()}},
    "data-parallel and compiled": {f"module._orig_mod.{name}": tensor for name, tensor in TENSORS.items()},
}


@pytest.mark.parametrize("ending", ["pt", "bin", "pth", "anything"])
@pytest.mark.parametrize("form", WRAPPED)
def test_what_torch_saves(tmp_path: Path, form: str, ending: str):
    torch.save(WRAPPED[form], tmp_path / f"weights.{ending}")
    assert_equal(read_checkpoint(tmp_path / f"weights.{ending}"))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_safetensors_whatever_the_ending(tmp_path: Path, ending: str):
    save_file({f"module.{name}": tensor for name, tensor in TENSORS.items()}, tmp_path / f"weights.{ending}")
    assert_equal(read_checkpoint(tmp_path / f"weights.{ending}"))


def test_tensors_are_the_files_pages(tmp_path: Path):
    file = tmp_path / "weights.pt"
    torch.save({"a": torch.zeros(1 << 20), "b": torch.zeros(1 << 20)}, file)
    tensors = read_checkpoint(file)
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(file) in mapped.read_text()
    tensors["a"].fill_(1.0)  # in memory alone
    assert read_checkpoint(file)["a"].sum() == 0


class RunsCode:
    """When unpickled the usual way, leaves a file behind."""

    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


class OfTheirs:
    """An object of a class that only its program has."""


def zip_of(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def with_a_larger_shape() -> bytes:
    """A tensor of 1,000 numbers that says it has 65,535."""
    content = saved({"a": torch.zeros(1000)})
    number = b"M" + struct.pack("<H", 1000)
    at = content.index(number, content.index(number) + 1)
    return content[:at] + b"M\xff\xff" + content[at + 3 :]


def calling(function: str) -> bytes:
    """A pickle that calls a function with an expression when it is opened."""
    module, name = function.rsplit(".", 1)
    return b"\x80\x02c%s\n%s\n(X\x03\x00\x00\x001+1tR." % (module.encode(), name.encode())


def safetensors_of(header: bytes, body: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def overlapping() -> bytes:
    part = {"dtype": "F32", "shape": [2]}
    header = {"a": {**part, "data_offsets": [0, 8]}, "b": {**part, "data_offsets": [4, 12]}}
    return safetensors_of(json.dumps(header).encode(), bytes(12))


DAMAGED = {
    "empty": (b"", "is neither safetensors nor"),
    "noise": (b"no weights at all" * 10, "is neither safetensors nor"),
    "old pickle": (pickle.dumps({"a": 1}), "is neither safetensors nor"),
    "cut zip": (saved(TENSORS)[:900], "is damaged or cut short"),
    "zip without its end": (saved(TENSORS)[:-30], "is damaged or cut short"),
    "cut pickle": (zip_of(b"\x80\x02}q"), "is damaged or cut short"),
    "compressed bomb": (zip_of(b"\x80\x02" + b"N0" * 10_000_000 + b"N.", zipfile.ZIP_DEFLATED), "is compressed"),
    "endless description": (zip_of(b"\x80\x02" + b"N0" * 50_000_000 + b"N."), "of its tensors of 100,000,004 bytes"),
    "eval": (zip_of(calling("builtins.eval")), r"more than tensors \(eval\), which could run code"),
    "torch.load": (zip_of(calling("torch.load")), r"more than tensors \(torch.load\), which could run code"),
    "larger than its storage": (with_a_larger_shape(), "is damaged or cut short"),
    "an object": (saved({"a": torch.zeros(2), "b": OfTheirs()}), r"more than tensors \(.*OfTheirs\)"),
    "a list": (saved([torch.zeros(2)]), "holds a list, not named tensors"),
    "numbers as names": (saved({0: torch.zeros(2)}), "holds a dict, not named tensors"),
    "nothing": (saved({}), "holds no tensors"),
    "a number": (saved({"a": torch.zeros(2), "epoch": 3}), "holds 'epoch', which is no tensor but a int"),
    "sparse": (saved({"a": torch.eye(3).to_sparse()}), "the tensor 'a' is sparse, quantized or without values"),
    "without values": (saved({"a": torch.zeros(3, device="meta")}), "the tensor 'a' is sparse, quantized or without"),
    "safetensors, cut header": (safetensors_of(b'{"a": {}}')[:12], "is damaged or cut short"),
    "safetensors, 100 MB header": (safetensors_of(b"{" + b" " * 99_999_998 + b"}"), "a header of 100,000,000 bytes"),
    "safetensors, overlapping": (overlapping(), "is damaged or cut short"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_damaged_and_malicious_files_are_one_clear_error_at_once(tmp_path: Path, case: str, ending: str):
    content, sentence = DAMAGED[case]
    if ending == "safetensors" and not case.startswith("safetensors"):
        sentence = "is damaged or cut short|is damaged or no model's"  # whoever names it so means it
    file = tmp_path / f"weights.{ending}"
    file.write_bytes(content)
    started = time.process_time()
    with pytest.raises(ValueError, match=sentence) as caught:
        read_checkpoint(file)
    assert time.process_time() - started < 2
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(file))


def test_code_in_a_file_is_not_run(tmp_path: Path):
    witness = tmp_path / "witness"
    torch.save({"a": torch.zeros(2), "b": RunsCode(witness)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="which could run code when opened, so it was not"):
        read_checkpoint(tmp_path / "weights.pt")
    assert not witness.exists()
    torch.load(tmp_path / "weights.pt", weights_only=False)  # the trap itself works
    assert witness.exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_programs_are_not_run(tmp_path: Path):
    scripted = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    scripted.save(str(tmp_path / "program.pt"))
    with pytest.raises(ValueError, match="is a TorchScript program, which is not run here"):
        read_checkpoint(tmp_path / "program.pt")


def test_missing_files_and_folders(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*missing\.pt"):
        read_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match=f"{tmp_path} is not a file"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("number", [np.int64(-3), np.float64(1e-5), np.float32(0.5), np.bool_(True), np.uint8(7)])
def test_numpy_numbers_beside_the_weights_are_plain_data(tmp_path: Path, number: np.generic):
    torch.save({"epoch": number, "state_dict": TENSORS, "optimizer": {"lr": [number]}}, tmp_path / "a.pt")
    assert_equal(read_checkpoint(tmp_path / "a.pt"))
    assert _load_zip(tmp_path / "a.pt")["optimizer"]["lr"] == [number.item()]


@pytest.mark.parametrize("value", [np.str_("x"), np.datetime64("2020-01-01"), np.zeros(2, dtype="O")])
def test_what_else_numpy_has_is_refused(tmp_path: Path, value: object):
    torch.save({"more": value, "state_dict": TENSORS}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_types_that_cannot_be_computed_with_are_named(tmp_path: Path, dtype: torch.dtype):
    torch.save({"a": torch.ones(2).to(dtype)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"'a' is torch\.\w+, which is not supported"):
        read_checkpoint(tmp_path / "a.pt")
