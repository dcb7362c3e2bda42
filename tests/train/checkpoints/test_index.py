"""The index says what it was written with, or is refused; and its rule of rows is PyTorch's."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opencoca.train.checkpoints.index import CheckpointIndex, Layout
from opencoca.train.checkpoints.shard_file import FileRecord

INDEX = CheckpointIndex(
    12,
    {"step": 12, "best": 0.1 + 0.2, "window": {"rows": [{"loss": 1e-30}], "é": float("inf")}},
    5,
    (FileRecord("rank-00000.safetensors", 100, 7), FileRecord("rank-00001.safetensors", 90, 8)),
    {"model/a": Layout((7, 3), (0, 1)), "model/b": Layout((), (1,)), "optimizer/step/a": Layout((), (0,))},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    INDEX.write(tmp_path)
    assert CheckpointIndex.read(tmp_path) == INDEX


def test_no_flipped_bit_changes_what_it_says(tmp_path: Path) -> None:
    INDEX.write(tmp_path)
    path = tmp_path / "index.json"
    data = path.read_bytes()
    refused = 0
    for byte in range(len(data)):
        damaged = bytearray(data)
        damaged[byte] ^= 1 << byte % 8
        path.write_bytes(damaged)
        try:
            assert CheckpointIndex.read(tmp_path) == INDEX  # a blank that became another kind of blank
        except ValueError as refusal:
            refused += str(path) in str(refusal)
    assert refused > 0.9 * len(data)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"crc32": 0, "content": {}}', "\udcff"])
def test_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        CheckpointIndex.read(tmp_path)
    (tmp_path / "index.json").unlink()
    with pytest.raises(ValueError, match=r"index\.json cannot be read"):
        CheckpointIndex.read(tmp_path)


def test_files_of_other_folders_are_refused(tmp_path: Path) -> None:
    CheckpointIndex(1, {}, 0, (FileRecord("../elsewhere", 1, 1),), {}).write(tmp_path)
    with pytest.raises(ValueError, match="other folders"):
        CheckpointIndex.read(tmp_path)


@given(st.integers(1, 40), st.integers(1, 9))
def test_rows_are_those_of_torch_chunk(rows: int, parts: int) -> None:
    whole = torch.arange(rows)
    layout = Layout((rows,), tuple(range(parts)))
    chunks = [*whole.chunk(parts), *[whole[:0]] * parts][:parts]
    for part, chunk in enumerate(chunks):
        assert torch.equal(whole[slice(*layout.rows(part))], chunk)
