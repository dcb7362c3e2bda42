import io
import json
import os
import stat
import tarfile
import warnings

import pytest

from opencoca.data import open_source
from opencoca.data.shards import scan_shard

from .helpers import encode, gradient


def write_tar(path, members):
    """(name, bytes) in order, as a tar archive."""
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(number, caption="a dog", image_suffix="jpg"):
    data = encode(gradient(seed=number))
    key = f"{number:05d}"
    details = json.dumps({"caption": caption, "url": "http://example.org"}).encode()
    return [(f"{key}.{image_suffix}", data), (f"{key}.txt", caption.encode()), (f"{key}.json", details)]


def contents(source):
    return {source.key(index): source.captions(index) for index in range(len(source))}


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        members = [member for number in range(4) for member in sample(shard * 4 + number, f"caption {number}")]
        write_tar(tmp_path / f"{shard:05d}.tar", members)
    return tmp_path


def test_samples_in_order_with_their_bytes(shards):
    source = open_source(shards)
    assert list(contents(source)) == [f"{number:05d}" for number in range(12)]
    assert source.captions(6) == ("caption 2",)
    for index in (11, 0, 5):
        assert source.open_bytes(index) == encode(gradient(seed=index))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("*.tar", 12),
        ("{00000..00001}.tar", 8),
        ("{00000,00002}.tar", 8),
        ("00001.tar", 4),
        ("{00000,0000[12]}.tar", 12),
    ],
)
def test_patterns(shards, pattern, count):
    assert len(open_source(f"{shards}/{pattern}")) == count


def test_patterns_that_match_nothing(shards):
    with pytest.raises(FileNotFoundError, match=r"there are no tar shards '.*00003\.tar'"):
        open_source(f"{shards}/{{00001..00004}}.tar")
    with pytest.raises(FileNotFoundError, match=r"x\*\.tar"):
        open_source(f"{shards}/x*.tar")
    with pytest.raises(ValueError, match=r"leave 'c\.csv' out"):
        open_source(f"{shards}/*.tar", "c.csv")


@pytest.mark.filterwarnings("ignore:the sample 'bad'")
def test_where_captions_come_from(tmp_path):
    image = encode(gradient())
    members = [
        ("list.jpg", image),
        ("list.json", b'{"captions": ["one", "two"], "caption": "one"}'),
        ("list.txt", b"ignored"),
        ("text.jpeg", image),
        ("text.txt", b" only text \n"),
        ("null.png", image),
        ("null.json", b'{"caption": null}'),
        ("null.txt", b"from text"),
        ("own.jpg", image),
        ("own.json", b'{"key": "folder/name.jpg", "caption": "x", "blip": "better"}'),
        ("none.jpg", image),
        ("blank.jpg", image),
        ("blank.txt", b" "),
        ("orphan.txt", b"no image"),
        ("bad.jpg", image),
        ("bad.json", b"{"),
        ("bad.txt", b"still here"),
        ("a/._x.jpg", b"resource fork"),
    ]
    write_tar(tmp_path / "s.tar", members)
    with pytest.warns(UserWarning, match="'bad' of .*s.tar' has json that cannot be read"):
        source = open_source(tmp_path)
    assert contents(source) == {
        "list": ("one", "two"),
        "text": ("only text",),
        "null": ("from text",),
        "folder/name.jpg": ("x",),
        "none": (),
        "blank": (),
        "bad": ("still here",),
    }
    assert source.missing_images == ("orphan",)
    assert source.blank_captions == ("blank",)
    assert contents(open_source(tmp_path, caption_column="blip"))["folder/name.jpg"] == ("better",)
    assert contents(open_source(tmp_path))["folder/name.jpg"] == ("x",)


def test_equal_keys_in_two_shards_become_unique(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_tar(tmp_path / name, sample(1) + sample(2))
    assert list(contents(open_source(tmp_path))) == ["00001", "00002", "b/00001", "b/00002"]


def test_a_shard_cut_anywhere_yields_the_samples_before(tmp_path):
    """Whatever the length: no error, a warning that names the shard, and only whole samples, in order."""
    whole = write_tar(tmp_path / "whole.tar", [member for number in range(4) for member in sample(number)])
    data = whole.read_bytes()
    index = scan_shard(whole)
    assert index.damage is None
    ends = [place.offset + place.size for place in index.samples]
    path = tmp_path / "cut.tar"
    seen = set()
    last_data = max(offset for offset in range(0, len(data), 512) if data[offset : offset + 512].strip(b"\0")) + 512
    for length in [*range(600, last_data, 377), *range(512, last_data + 512, 512)]:
        path.write_bytes(data[:length])
        cut = scan_shard(path)
        assert cut.damage is not None, length
        # Only of a lone sample, with no other to compare it to, can't it be told that its caption is missing.
        assert cut.samples == index.samples[: len(cut.samples)] or [s.captions for s in cut.samples] == [()]
        finished = sum(end <= length for end in ends)
        assert finished - 1 <= len(cut.samples) <= finished
        seen.add(len(cut.samples))
    assert seen == {0, 1, 2, 3, 4}


def test_damage_is_warned_of_every_time(tmp_path):
    path = write_tar(tmp_path / "s.tar", [member for number in range(4) for member in sample(number)])
    data = path.read_bytes()
    third = scan_shard(path).samples[2].offset
    path.write_bytes(data[: third + 100])
    for _ in range(2):  # the second time out of the index
        with pytest.warns(UserWarning, match=r"'.*s\.tar': it is cut short within '00002.jpg'; the 2 samples before"):
            assert len(open_source(tmp_path)) == 2
    path.write_bytes(data[: third - 512] + b"\xa5" * 512 + data[third:])
    with pytest.warns(UserWarning, match=r"'.*s\.tar': it is damaged after byte"):
        assert len(open_source(tmp_path)) == 2
    path.write_bytes(b"no tar at all" * 100)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="hold no images"):
        open_source(tmp_path)


def test_the_index_is_kept_used_and_renewed(shards):
    open_source(shards)
    sidecar = shards / "00000.tar.index.json"
    stored = json.loads(sidecar.read_text())
    assert [row["key"] for row in stored["samples"]] == ["00000", "00001", "00002", "00003"]
    stored["samples"][0]["captions"] = ["out of the index"]
    sidecar.write_text(json.dumps(stored))
    assert open_source(shards).captions(0) == ("out of the index",)
    shard = shards / "00000.tar"
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert open_source(shards).captions(0) == ("caption 0",)
    write_tar(shard, sample(0, "rewritten"))
    assert open_source(shards).captions(0) == ("rewritten",)
    for rubbish in ("", "{}", "[]", '{"version": 1}', "null"):
        sidecar.write_text(rubbish)
        assert open_source(shards).captions(0) == ("rewritten",)
    assert not list(shards.glob(".*")), "temporary files were left behind"


def test_an_index_that_cannot_be_written_stays_in_memory(shards, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "read-only file system")

    monkeypatch.setattr("opencoca.data.files.os.replace", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_source(shards)) == 12
    assert not list(shards.glob("*.json"))
    assert not list(shards.glob(".*"))
    assert stat.S_ISREG((shards / "00000.tar").stat().st_mode)


def test_a_shard_that_shrinks_while_in_use(shards):
    source = open_source(shards)
    os.truncate(shards / "00002.tar", 700)
    with pytest.raises(OSError, match=r"00002\.tar' became shorter"):
        source.open_bytes(11)


def test_a_sample_cut_within_its_caption_is_dropped(tmp_path):
    path = write_tar(tmp_path / "s.tar", sample(0, "a caption"))
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"a caption") + 3])
    cut = scan_shard(path)
    assert cut.samples == ()
    assert "cut short within '00000.txt'" in (cut.damage or "")
