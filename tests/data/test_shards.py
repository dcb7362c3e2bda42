import io
import json
import os
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoca.data import ImageError, TarShards, open_source
from opencoca.data.shards import index_shard, scan_shard

from .helpers import encode, gradient


def write_tar(path, members):
    """(name, bytes) in order, as a tar archive; `path` may be a file object."""
    target = {"fileobj": path} if isinstance(path, io.BytesIO) else {"name": path}
    with tarfile.open(mode="w", **target) as archive:
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
    """Whatever the length: no error, only whole samples, in order, and a reason for every one that is missing."""
    whole = write_tar(tmp_path / "whole.tar", [member for number in range(4) for member in sample(number)])
    data = whole.read_bytes()
    index = scan_shard(whole)
    assert (index.damage, index.lost) == ((), ())
    headers = [int(members[0, 0]) - 512 for members in index.members]
    ends = [int(members.sum(axis=1).max()) for members in index.members]
    path = tmp_path / "cut.tar"
    seen = set()
    last_data = max(offset for offset in range(0, len(data), 512) if data[offset : offset + 512].strip(b"\0")) + 512
    for length in [*range(0, last_data, 377), *range(0, last_data + 512, 512)]:
        path.write_bytes(data[:length])
        cut = scan_shard(path)
        assert len(cut.damage) == 1, length
        whole_before = sum(end <= length for end in ends)
        # Only of a lone sample, with no other to compare it to, can't it be told that its caption is missing.
        if len(cut.keys) > whole_before:
            assert cut.keys == ("00000",)
            continue
        assert cut.keys == index.keys[:whole_before], length
        np.testing.assert_array_equal(cut.members, index.members[:whole_before])
        named = [key for key, header in zip(index.keys, headers, strict=True) if header + 512 < length]
        lost = [sample.key for sample in cut.lost]
        assert lost in (named[whole_before:], named[whole_before:-1]), length  # an image cut short names no sample
        assert all("cut short" in lost.reason for lost in cut.lost)
        seen.add(len(cut.keys))
    assert seen == {0, 1, 2, 3, 4}


def damaged(data, offset, with_what=b"\xa5"):
    return data[:offset] + with_what * 512 + data[offset + 512 :]


@pytest.mark.parametrize("with_what", [b"\xa5", b"\0", b"7"])
def test_after_a_broken_header_the_shard_goes_on(tmp_path, with_what):
    """Each header of each member in turn: the sample it belongs to is lost and named, all others are as before."""
    whole = write_tar(tmp_path / "whole.tar", [member for number in range(5) for member in sample(number)])
    data = whole.read_bytes()
    index = scan_shard(whole)
    path = tmp_path / "broken.tar"
    for row, members in enumerate(index.members):
        for offset in members[:, 0].tolist():
            path.write_bytes(damaged(data, offset - 512, with_what))
            found = scan_shard(path)
            assert found.keys == index.keys[:row] + index.keys[row + 1 :]
            np.testing.assert_array_equal(found.members, np.delete(index.members, row, axis=0))
            assert [lost.key for lost in found.lost] == [index.keys[row]]
            assert found.damage == ((offset - 512, f"it is damaged at byte {offset - 512:,}"),)


def test_damage_within_the_data_is_left_to_the_decoder(tmp_path):
    whole = write_tar(tmp_path / "whole.tar", [member for number in range(3) for member in sample(number)])
    index = scan_shard(whole)
    path = tmp_path / "broken.tar"
    path.write_bytes(damaged(whole.read_bytes(), int(index.members[1, 0, 0])))
    assert scan_shard(path).keys == index.keys


@pytest.mark.filterwarnings("ignore:the sample")
@given(st.data())
def test_any_damage_is_survived(data):
    """Blocks of rubbish or zeros anywhere, in any number: what is found is as in the whole shard, and nothing twice."""
    members = [member for number in range(6) for member in sample(number)]
    buffer = io.BytesIO()
    write_tar(buffer, members)
    content = buffer.getvalue()
    whole = index_bytes(content)
    places = {key: place.tolist() for key, place in zip(whole.keys, whole.members, strict=True)}
    for block in data.draw(st.lists(st.integers(0, len(content) // 512 - 1), max_size=6)):
        content = damaged(content, 512 * block, data.draw(st.sampled_from([b"\0", b"\xff", b"0"])))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    found = index_bytes(content)
    assert len(set(found.keys)) == len(found.keys)
    for key, place in zip(found.keys, found.members.tolist(), strict=True):
        kept = [(there, was) for there, was in zip(place, places[key], strict=True) if there[0]]
        assert all(there == was for there, was in kept)
    assert len(found.keys) == 6 or found.damage


def index_bytes(content):
    return index_shard(lambda offset, size: content[offset : offset + size], len(content), "memory")


def test_names_that_need_more_than_a_plain_header(tmp_path):
    """Long names in GNU's and in POSIX's form, and modification times as webdataset's writer stores them."""
    key = "folder/" + "x" * 150
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "s.tar", "w", format=format) as archive:
            for name, data in [(f"{key}.jpg", encode(gradient())), (f"{key}.txt", "Füchse".encode())]:
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(data), 1700000000.25  # pyright: ignore[reportAttributeAccessIssue]
                archive.addfile(info, io.BytesIO(data))
        index = scan_shard(tmp_path / "s.tar")
        assert (index.keys, index.damage, index.lost) == ((key,), (), ())
        source = TarShards([tmp_path / "s.tar"])
        assert source.read(0) == ((encode(gradient()),), ("Füchse",), None)


def test_doubled_keys_in_a_shard_are_all_kept(tmp_path):
    members = sample(1, "first") + sample(2, "other") + sample(1, "second") + sample(1, "third")
    source = TarShards([write_tar(tmp_path / "s.tar", members)])
    assert contents(source) == {
        "00001": ("first",),
        "00002": ("other",),
        "00001#2": ("second",),
        "00001#3": ("third",),
    }


def test_members_in_any_order_find_together(tmp_path):
    members = [member for number in range(4) for member in sample(number, f"caption {number}")]
    by_kind = sorted(members, key=lambda member: member[0].rpartition(".")[2])
    source = TarShards([write_tar(tmp_path / "s.tar", by_kind)])
    assert contents(source) == {f"{number:05d}": (f"caption {number}",) for number in range(4)}
    assert source.read(2).images[0] == encode(gradient(seed=2))


def test_damage_is_warned_of_every_time(tmp_path):
    path = write_tar(tmp_path / "s.tar", [member for number in range(4) for member in sample(number)])
    data = path.read_bytes()
    third = int(scan_shard(path).members[2, 0, 0])
    path.write_bytes(data[: third + 100])
    for _ in range(2):  # the second time out of the index
        with pytest.warns(UserWarning, match=r"'.*s\.tar': it is cut short within '00002.jpg'; the 2 whole samples"):
            assert len(open_source(tmp_path)) == 2
    path.write_bytes(data[: third - 512] + b"\xa5" * 512 + data[third:])
    with pytest.warns(UserWarning, match=r"'.*s\.tar': it is damaged at byte [\d,]+; the 3 whole samples"):
        source = open_source(tmp_path)
    assert list(contents(source)) == ["00000", "00001", "00003"]
    assert source.missing_images == ("00002",)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match="hold no images"):
        open_source(tmp_path)
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match="the file is empty"), pytest.raises(ValueError, match="hold no images"):
        open_source(tmp_path)


def test_an_image_overwritten_while_in_use(shards):
    source = open_source(shards)
    with open(shards / "00001.tar", "r+b") as file:
        file.write(b"\xa5" * 512)
    with pytest.raises(ImageError, match=r"00004 in .*00001\.tar, byte 512.*header is damaged, or the shard has"):
        source.open_bytes(4)


def test_a_shard_that_shrinks_while_in_use(shards):
    source = open_source(shards)
    os.truncate(shards / "00002.tar", 700)
    with pytest.raises(OSError, match=r"00002\.tar' became shorter"):
        source.open_bytes(11)


def test_a_sample_cut_within_its_caption_is_dropped(tmp_path):
    path = write_tar(tmp_path / "s.tar", sample(0, "a caption"))
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"a caption") + 3])
    cut = scan_shard(path)
    assert cut.keys == ()
    assert "cut short within '00000.txt'" in cut.damage[0][1]
    assert [lost.key for lost in cut.lost] == ["00000"]
