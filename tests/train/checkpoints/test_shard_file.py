"""What is written is what is read, and any change of a file is noticed."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from opencoca.train.checkpoints.shard_file import ShardFile, check_file, write_shard

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16]
DTYPES += [torch.int8, torch.uint8, torch.bool]


@st.composite
def some_tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    found = {}
    for number in range(draw(st.integers(0, 6))):
        shape = draw(st.lists(st.integers(1, 5), max_size=3))
        values = torch.randint(-100, 100, shape, generator=generator).to(draw(st.sampled_from(DTYPES)))
        found[draw(st.text('ab/é"', max_size=3)) + str(number)] = values
    return found


def same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.dtype == second.dtype and torch.equal(first, second)


@given(some_tensors())
def test_both_readers_give_back_the_same(tmp_path_factory: pytest.TempPathFactory, tensors) -> None:
    path = tmp_path_factory.mktemp("shard") / "file"
    record = write_shard(path, tensors)
    check_file(path.parent, record)
    assert record.size_bytes == path.stat().st_size
    theirs = load_file(path)  # the library that defines the format
    ours = ShardFile(path)
    assert theirs.keys() == ours.keys == tensors.keys()
    for key, tensor in tensors.items():
        assert same(theirs[key], tensor)
        assert same(ours.read(key), tensor)
        if tensor.ndim:
            assert same(ours.rows(key, 1, len(tensor)), tensor[1:])


def test_views_are_written_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    write_shard(tmp_path / "file", {"columns": whole[:, ::2], "turned": whole.T, "row": whole[2]})
    read = load_file(tmp_path / "file")
    assert same(read["columns"], whole[:, ::2])
    assert same(read["turned"], whole.T)
    assert same(read["row"], whole[2])


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    write_shard(tmp_path / "file", {"a": torch.ones(3)})
    with pytest.raises(FileExistsError):
        write_shard(tmp_path / "file", {"a": torch.zeros(3)})
    assert same(ShardFile(tmp_path / "file").read("a"), torch.ones(3))


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    record = write_shard(path, {"a": torch.randn(5), "b": torch.ones(2, dtype=torch.bfloat16)})
    data = path.read_bytes()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"file is damaged: the checksum of its content"):
            check_file(tmp_path, record)
    path.write_bytes(data)
    check_file(tmp_path, record)


@pytest.mark.parametrize("keep", [0, 7, 8, 50, -1])
def test_a_file_that_was_cut_or_lost_is_found(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "file"
    record = write_shard(path, {"a": torch.randn(50)})
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(ValueError, match=rf"file is damaged: it has {len(data[:keep])} bytes and not {len(data)}"):
        check_file(tmp_path, record)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        check_file(tmp_path, record)
    path.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        check_file(tmp_path, record)
