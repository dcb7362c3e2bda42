"""A state dict that is handed over is read by the rules of one in a file, and every tensor of it is accounted for."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from opencoca.store.interop.tensor_reader import TensorReader

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "steps": torch.tensor(3)}


def sources(content: object, folder: Path) -> tuple[object, Path]:
    """What a program holds, and the same in a file."""
    torch.save(content, folder / "weights.pt")
    return content, folder / "weights.pt"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_state_dict_and_a_file_of_it_give_the_same(tmp_path: Path, prefix: str, wrapped: bool) -> None:
    tensors = {prefix + name: tensor for name, tensor in TENSORS.items()}
    for source in sources({"state_dict": tensors, "epoch": 3} if wrapped else tensors, tmp_path):
        reader = TensorReader(source)  # type: ignore[arg-type]
        assert set(reader.tensors) == set(TENSORS)
        assert torch.equal(reader.take("a.weight", 2, 3), TENSORS["a.weight"])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "holds no tensors"),
        ({"a": torch.zeros(2), "epoch": 3}, "holds 'epoch', which is no tensor but a int"),
        ({3: torch.zeros(2)}, "holds a dict, not named tensors"),
        ({"a": torch.eye(3).to_sparse()}, "the tensor 'a' is sparse, quantized or without values"),
        ({"a": torch.zeros(3, device="meta")}, "the tensor 'a' is sparse, quantized or without values"),
    ],
)
def test_what_is_no_state_dict_is_one_sentence_either_way(tmp_path: Path, content: dict, sentence: str) -> None:
    for source, label in zip(sources(content, tmp_path), ("the state dict", str(tmp_path)), strict=True):
        with pytest.raises(ValueError, match=sentence) as caught:
            TensorReader(source)  # type: ignore[arg-type]
        assert str(caught.value).startswith(label)
        assert "\n" not in str(caught.value)


def test_what_is_taken_is_the_callers_own() -> None:
    tensors = {"a": torch.zeros(2, 3).t()}
    taken = TensorReader(tensors).take("a", 3, 2)
    taken += 1
    assert taken.is_contiguous()
    assert not tensors["a"].any()


def test_what_nobody_takes_is_named() -> None:
    reader = TensorReader(TENSORS)
    reader.take("a.bias", 2)
    reader.skip("steps")
    with pytest.raises(ValueError, match=r"1 tensors that the model has no place for: a\.weight"):
        reader.finish()
    reader.take("a.weight", 2, 3)
    reader.finish()


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("a", None, "the state dict has no tensor a"),
        ("a", torch.zeros(3), r"a has shape \(3,\), where \(2,\) is expected"),
        ("a", torch.zeros(2, dtype=torch.int64), "a is of type torch.int64, where a floating-point one is expected"),
        ("a", torch.tensor([0.0, torch.inf]), "a holds numbers that are infinite or not a number"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(name: str, tensor: Tensor | None, sentence: str) -> None:
    tensors = {"b": torch.zeros(1)} if tensor is None else {name: tensor}
    with pytest.raises(ValueError, match=sentence):
        TensorReader(tensors).take(name, 2)
