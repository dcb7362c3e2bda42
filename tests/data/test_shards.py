import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sys
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opencoca.data import ImageError, ShardStorage, TarShards, check_source, compressed, open_source
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
    with pytest.raises(FileNotFoundError, match=r"there is no table 'c\.csv'"):
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
    other = open_source(tmp_path, caption_column="blip")
    assert other.captions(list(contents(source)).index("folder/name.jpg")) == ("better",)
    with pytest.raises(ValueError, match=r"'bad' of .* has json that cannot be read"):
        other.captions(list(contents(source)).index("bad"))
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


def test_the_last_ending_of_a_name_counts(tmp_path):
    image = encode(gradient())
    members = [
        ("IMG_2023.05.01.jpg", image),
        ("IMG_2023.05.01.txt", b"first"),
        ("IMG_2023.05.02.JPG", image),
        ("IMG_2023.05.02.TXT", b"second"),
        ("a/v1.0/x.jpg", image),
        ("a/v1.0/x.txt", b"third"),
        ("plain.jpg", image),
        ("plain.1.jpg", image),  # nothing here has texts: a picture of its own
    ]
    expected = {"IMG_2023.05.01": ("first",), "IMG_2023.05.02": ("second",), "a/v1.0/x": ("third",)}
    source = TarShards([write_tar(tmp_path / "s.tar", members)])
    assert contents(source) == {**expected, "plain": (), "plain.1": ()}
    assert source.missing_images == ()


def test_more_members_of_a_sample_are_no_samples(tmp_path):
    image = encode(gradient())
    members = [*sample(1, "a dog"), ("00001.seg.png", image), ("00001.alt.txt", b"another"), ("00001.npy", b"numbers")]
    source = TarShards([write_tar(tmp_path / "s.tar", members)])
    assert contents(source) == {"00001": ("a dog",)}
    assert source.lost == ()


def test_members_can_be_chosen(tmp_path):
    first, second = encode(gradient(seed=1)), encode(gradient(seed=2))
    members = [("a.jpg", first), ("a.seg.png", second), ("a.txt", b"text"), ("a.alt.txt", b"other"), ("b.jpg", first)]
    path = write_tar(tmp_path / "s.tar", members)
    for _ in range(2):  # the second time out of the index
        chosen = TarShards([path], storage=ShardStorage(image_member="seg.png", text_member=".alt.TXT"))
        assert [(chosen.key(0), *chosen.read(0)[:2])] == [("a", (second,), ("other",))]
        assert len(chosen) == 1
        assert len(TarShards([path])) == 2


def test_pictures_of_several_formats(tmp_path):
    """Beside texts, the same picture in another format; without any, pictures that share a name."""
    jpeg, png = encode(gradient(seed=1)), encode(gradient(seed=2), "PNG")
    members = [("a.jpg", jpeg), ("a.png", png), ("a.txt", b"text"), ("b.jpg", jpeg), ("b.png", png)]
    source = TarShards([write_tar(tmp_path / "s.tar", members)])
    assert {source.key(i): source.open_bytes(i) for i in range(len(source))} == {"a": jpeg, "b": jpeg, "b#2": png}


def add_link(archive, kind, name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    archive.addfile(info)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_in_a_shard_lead_to_their_file(tmp_path, format):
    data = encode(gradient())
    folder = "long/" * 15 if format == tarfile.USTAR_FORMAT else "long/" * 60
    with tarfile.open(tmp_path / "s.tar", "w", format=format) as archive:
        for name, content in ((f"{folder}a.jpg", data), (f"{folder}a.txt", b"text")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        add_link(archive, tarfile.LNKTYPE, "hard.jpg", f"{folder}a.jpg")
        add_link(archive, tarfile.LNKTYPE, "hard.txt", f"{folder}a.txt")
        add_link(archive, tarfile.SYMTYPE, f"{folder}soft.jpg", "./a.jpg")
        add_link(archive, tarfile.SYMTYPE, f"{folder}twice.jpg", "soft.jpg")
        add_link(archive, tarfile.SYMTYPE, "nowhere.jpg", "../elsewhere.jpg")
        add_link(archive, tarfile.SYMTYPE, "round.jpg", "round.jpg")
    with pytest.warns(UserWarning, match=r"'nowhere' \('nowhere.jpg' is a link to .* and 1 others left out"):
        source = TarShards([tmp_path / "s.tar"])
    assert contents(source) == {f"{folder}a": ("text",), "hard": ("text",), f"{folder}soft": (), f"{folder}twice": ()}
    assert all(source.open_bytes(index) == data for index in range(len(source)))
    assert source.missing_images == ("nowhere", "round")


def test_a_sample_without_its_image_is_named(tmp_path):
    members = [*sample(1), ("gone.txt", b"no image"), ("README", b"not of a sample")]
    with pytest.warns(UserWarning, match=r"the 1 whole samples .* used, and 'gone' \(it has no image\) left out"):
        source = TarShards([write_tar(tmp_path / "s.tar", members)])
    assert [lost.key for lost in source.lost] == ["gone"]


def test_keys_are_unique_whatever_names_a_shard_has(tmp_path):
    members = []
    for name, key in (("0", "a"), ("1", "a"), ("2", "a#2"), ("3", "s/a")):
        members += [(f"{name}.jpg", encode(gradient())), (f"{name}.json", json.dumps({"key": key}).encode())]
    paths = [write_tar(folder / "s.tar", members) for folder in (tmp_path / "1", tmp_path / "2") if not folder.mkdir()]
    source = TarShards(paths)
    keys = [source.key(index) for index in range(len(source))]
    assert keys[:4] == ["a", "a#2", "a#2#2", "s/a"]
    assert len(set(keys)) == 8


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("a cat".encode("utf-8-sig"), "a cat"),
        ("a cat".encode("utf-16"), "a cat"),
        ("Füchse".encode(), "Füchse"),
        ("a café".encode("cp1252"), None),
    ],
)
def test_encodings_of_texts(tmp_path, data, text):
    source = TarShards([write_tar(tmp_path / "s.tar", [("a.jpg", encode(gradient())), ("a.txt", data)])])
    if text is not None:
        assert source.captions(0) == (text,)
        return
    with pytest.raises(ValueError, match=r"'a' of .* has a text that is not UTF-8; save it as UTF-8"):
        source.captions(0)
    report = check_source(source, num_workers=0, progress=False)
    assert [key for key, _ in report.unusable_captions] == ["a"]
    assert list(report.errors) == ["unusable captions"]


@pytest.mark.parametrize("details", [b"[" * 100_000, b"{", b"\xff", b"1" * 5000])
def test_json_that_cannot_be_read_costs_its_sample_alone(tmp_path, details):
    members = [("a.jpg", encode(gradient())), ("a.json", details), *sample(1)]
    with pytest.warns(UserWarning, match="'a' of .* has json that cannot be read"):
        source = TarShards([write_tar(tmp_path / "s.tar", members)])
    assert source.open_bytes(0) == encode(gradient())
    with pytest.raises(ValueError, match=r"'a' of .* has json that cannot be read"):
        source.captions(0)
    assert source.captions(1) == ("a dog",)


def packed(path, pack):
    path.write_bytes(pack(path.read_bytes()))
    return path


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz"])
def test_compressed_shards_are_read(tmp_path, pack, name):
    path = packed(write_tar(tmp_path / name, sample(1, "one") + sample(2, "two")), pack)
    source = open_source(tmp_path)
    assert contents(source) == {"00001": ("one",), "00002": ("two",)}
    assert source.place(0).file == str(path)
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)
    kept = tmp_path / "kept"
    for _ in range(2):
        again = TarShards([path], storage=ShardStorage(cache_dir=str(kept)))
        assert again.open_bytes(1) == encode(gradient(seed=2))
    assert len(list(kept.glob("*.tar"))) == 1
    with pytest.raises(ValueError, match=r"is compressed with .*; unpack it first"):
        scan_shard(path)


def test_a_compressed_shard_cut_short_keeps_its_beginning(tmp_path):
    path = packed(write_tar(tmp_path / "s.tar", sample(1) + sample(2)), gzip.compress)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.warns(UserWarning, match="cut short"):
        assert TarShards([path]).key(0) == "00001"


def test_a_shard_that_unpacks_to_very_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "_SMALL_BYTES", 1000)
    path = tmp_path / "s.tar.gz"
    path.write_bytes(gzip.compress(bytes(5_000_000)))
    with pytest.raises(ValueError, match="unpacks to more than 1 MB"):
        TarShards([path], storage=ShardStorage(cache_dir=str(tmp_path / "kept")))
    assert not list((tmp_path / "kept").iterdir())


def test_zstd(tmp_path):
    import zstandard  # pyright: ignore[reportMissingImports]

    head = b"\x28\xb5\x2f\xfd"

    path = packed(write_tar(tmp_path / "s.tar.zst", sample(1)), zstandard.ZstdCompressor().compress)
    assert path.read_bytes().startswith(head)
    assert contents(TarShards([path])) == {"00001": ("a dog",)}
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged: nothing of it can be unpacked"):
        TarShards([path])


def test_zstd_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "s.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
    with pytest.raises(ValueError, match=r"pip install 'opencoca\[zstd\]'"):
        TarShards([tmp_path / "s.tar.zst"])
