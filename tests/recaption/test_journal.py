"""What the journal promises: whole blocks, in order, whatever was cut off or damaged at its end."""

import errno
import json
from pathlib import Path

import pytest
import torch

from opencoca.recaption.journal import Journal, journal_threads
from opencoca.system.files import WriteError
from processes import start
from train.helpers import largest_file

HEADER = {"weights": "abc", "prefix": "a photo of", "thresholds": {"min_words": 2}}


def rows(start: int, count: int) -> list[dict]:
    return [
        {"image": f"{number}\n\u00e9.jpg", "captions": [{"caption": "x" * number}]}
        for number in range(start, start + count)
    ]


def write_journal(path: Path, sizes: list[int]) -> list[dict]:
    written: list[dict] = []
    with Journal(path, HEADER) as journal:
        for size in sizes:
            block = rows(len(written), size)
            journal.append(block, 4)
            written += block
    return written


def read_rows(journal: Journal) -> list[dict]:
    return list(journal.rows())


def test_the_number_of_threads_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "j"
    assert journal_threads(path) is None
    write_journal(path, [2])
    assert journal_threads(path) == torch.get_num_threads()
    path.write_bytes(path.read_bytes()[:20])
    assert journal_threads(path) is None


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = write_journal(tmp_path / "new" / "j", [3, 1, 4])
    with Journal(tmp_path / "new" / "j", {"other": 1}) as journal:
        assert journal.header == HEADER
        assert (journal.num_done, journal.last_batch_size) == (8, 4)
        assert read_rows(journal) == written


def test_a_cut_at_any_byte_keeps_all_whole_blocks(tmp_path: Path) -> None:
    """As a kill or a power cut may leave the file: every length is tried."""
    path = tmp_path / "j"
    written = write_journal(path, [2, 1, 3])
    content = path.read_bytes()
    ends = [position + 1 for position, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 4
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = sum(end <= length for end in ends)
        kept = [0, 0, 2, 3, 6][whole]
        with Journal(path, HEADER) as journal:
            assert journal.num_done == kept
            assert read_rows(journal) == written[:kept]
            journal.append(written[kept:], 4)
        with Journal(path, HEADER) as journal:
            assert read_rows(journal) == written


def test_damage_at_any_byte_is_never_taken_for_a_result(tmp_path: Path) -> None:
    """A disk that lost a page leaves zeros; what comes after the damage is done again."""
    path = tmp_path / "j"
    written = write_journal(path, [2, 1])
    content = path.read_bytes()
    header_end = content.index(b"\n") + 1
    for position in range(header_end, len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x15
        path.write_bytes(damaged)
        with Journal(path, HEADER) as journal:
            assert journal.num_done in (0, 2)
            assert read_rows(journal) == written[: journal.num_done]


def test_a_block_out_of_order_ends_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "j"
    written = write_journal(path, [2, 2, 2])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1], lines[3]]))
    with Journal(path, HEADER) as journal:
        assert read_rows(journal) == written[:2]


@pytest.mark.parametrize("content", ["image,caption\n", "a photograph", '{"format":"other"}\n', "0123456789"])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "j").write_text(content)
    with pytest.raises(ValueError, match="is no journal"):
        Journal(tmp_path / "j", HEADER)
    assert (tmp_path / "j").read_text() == content


def test_overwriting_begins_anew(tmp_path: Path) -> None:
    write_journal(tmp_path / "j", [2, 1])
    with Journal(tmp_path / "j", {"seed": 2}, overwrite=True) as journal:
        assert (journal.num_done, journal.header) == (0, {"seed": 2})
        assert read_rows(journal) == []


def open_journal(path: Path) -> None:
    Journal(path, {})


def test_two_processes_do_not_share_a_journal(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", {}) as journal:
        journal.append(rows(0, 1), 1)
        other = start(open_journal, tmp_path / "j", output=tmp_path / "printed.txt")
        other.join(60)
        assert other.exitcode == 1
        assert "another process is at work on" in (tmp_path / "printed.txt").read_text(encoding="utf-8")
        assert read_rows(journal) == rows(0, 1)


def test_a_full_disk_keeps_what_is_done(tmp_path: Path) -> None:
    """A real failure of the system: no file may grow over 4 kB."""
    path = tmp_path / "j"
    with largest_file(4096), Journal(path, {}) as journal:
        for _ in range(5):
            journal.append([{"image": "x" * 700}], 1)
        with pytest.raises(OSError, match="free some space; the 5 images that are done are kept") as error:
            journal.append([{"image": "x" * 700}], 1)
    assert str(path) in str(error.value)
    assert path.read_bytes().endswith(b"\n")
    with Journal(path, {}) as journal:
        assert journal.num_done == 5
        journal.append([{"image": "y"}], 1)
        assert read_rows(journal)[-1] == {"image": "y"}


def test_a_write_that_fails_half_way_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path / "j", HEADER) as journal:
        journal.append(rows(0, 2), 2)
        before = (tmp_path / "j").read_bytes()
        real = journal._file

        class Failing:
            def write(self, data: bytes) -> int:
                if len(data) < 20:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return real.write(data[: len(data) // 2])

            def __getattr__(self, name: str) -> object:
                return getattr(real, name)

        monkeypatch.setattr(journal, "_file", Failing())
        with pytest.raises(WriteError, match="No space left on device"):
            journal.append(rows(2, 2), 2)
        assert (tmp_path / "j").read_bytes() == before
        monkeypatch.undo()
        journal.append(rows(2, 3), 3)
        assert read_rows(journal) == rows(0, 5)


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .*file/j"):
        Journal(tmp_path / "file" / "j", HEADER)


def test_a_block_is_on_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    path = tmp_path / "j"
    monkeypatch.setattr("os.fsync", lambda descriptor: flushed.append(path.stat().st_size))
    with Journal(path, HEADER) as journal:
        for start in range(3):
            journal.append(rows(start, 1), 1)
            assert flushed[-1] == path.stat().st_size
    assert flushed == sorted(set(flushed))
    assert len(flushed) == 4
    assert json.loads(path.read_bytes().splitlines()[0][9:])["settings"] == HEADER
