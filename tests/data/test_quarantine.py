import json

import pytest

from opencoca.data import BadSample, Quarantine, TarShards, TrainingLoader, make_order, read_quarantine

from .helpers import WordTokenizer
from .test_shards import sample, write_tar


def bad(number):
    return number, BadSample(f"{number}", "s3://bucket/1.tar", 512 * number, f"cannot read the image '{number}': bent")


@pytest.mark.filterwarnings("ignore:cannot read")
@pytest.mark.filterwarnings("ignore:more than 20")
def test_each_is_listed_once_over_several_runs_and_a_torn_line_is_survived(tmp_path):
    path = tmp_path / "run" / "bad.jsonl"
    first = Quarantine(1000, path)
    first.add(dict([bad(1), bad(2)]))
    first.add(dict([bad(2), bad(3)]))
    with open(path, "a") as file:
        file.write('{"key": "torn')
    second = Quarantine(1000, path)
    second.add(dict([bad(3), bad(1)]))
    assert [entry.key for entry in read_quarantine(path)] == ["1", "2", "3"]
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {
        "key": "1",
        "file": "s3://bucket/1.tar",
        "offset": 512,
        "reason": "cannot read the image '1': bent",
    }


@pytest.mark.filterwarnings("ignore:cannot read")
@pytest.mark.filterwarnings("ignore:more than 20")
def test_too_many_stop_the_run_and_the_error_says_why(tmp_path):
    quarantine = Quarantine(1000, tmp_path / "bad.jsonl", max_share=0.02)
    quarantine.add(dict(bad(number) for number in range(4)))
    quarantine.check(50)  # too early to tell
    quarantine.check(200)
    quarantine.add(dict([bad(4)]))
    message = (
        r"5 images are broken, more than 2% of the 200 read so far "
        r"\(cannot read the image '0': bent; .*'1'.*'2': bent\); all are listed in '.*bad.jsonl'"
    )
    with pytest.raises(ValueError, match=message):
        quarantine.check(200)
    with pytest.raises(ValueError, match=r"must be in 0..1, got 1.5"):
        Quarantine(10, max_share=1.5)


def test_warnings_are_not_endless(recwarn):
    quarantine = Quarantine(10**6)
    for number in range(500):
        quarantine.add(dict([bad(number)]))
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == 21
    assert messages[-1] == "more than 20 images are bad"
    assert len(quarantine.by_index) == 500


def test_what_shards_have_lost_counts(tmp_path):
    members = [member for number in range(9) for member in sample(number)]
    source = TarShards([write_tar(tmp_path / "s.tar", [*members, ("a.txt", b"x"), ("b.txt", b"y")])])

    def loader(share, rank=0):
        order = make_order(source, 0)
        options = {"max_bad_share": share, "quarantine": tmp_path / "bad.jsonl", "rank": rank, "world_size": 2}
        return TrainingLoader(source, WordTokenizer(), None, order, 4, 1, 9, 0, load_pixels=False, **options)

    loader(0.5, rank=1)
    assert not (tmp_path / "bad.jsonl").exists()
    loader(0.5)
    assert [(entry.key, entry.reason) for entry in read_quarantine(tmp_path / "bad.jsonl")] == [
        ("a", "it has no image"),
        ("b", "it has no image"),
    ]
    with pytest.raises(ValueError, match=r"2 images are broken, more than 10% of the 11"):
        loader(0.1)
