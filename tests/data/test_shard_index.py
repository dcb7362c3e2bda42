import json
import os
import stat
import warnings
from pathlib import Path

import numpy as np
import pytest

from opencoca.data import TarShards, index_shards, load_index, open_source
from opencoca.data.shard_index import INDEX_SUFFIX, sidecar_place
from opencoca.data.shards import ChosenMembers, scan_shard

from .test_shards import sample, write_tar


@pytest.fixture
def shard(tmp_path):
    members = [member for number in range(4) for member in sample(number, f"caption {number}")]
    return write_tar(tmp_path / "00000.tar", [*members, ("lost.txt", b"no image")])


def same(a, b):
    return np.array_equal(a.members, b.members) and (a.keys, a.lost, a.damage, a.size, a.digest) == (
        b.keys,
        b.lost,
        b.damage,
        b.size,
        b.digest,
    )


def test_what_is_read_is_what_was_scanned(shard, monkeypatch):
    scanned = scan_shard(shard)
    assert same(load_index(shard), scanned)
    monkeypatch.setattr("opencoca.data.shard_index.scan_shard", None)  # not called again
    assert same(load_index(shard), scanned)
    assert [lost.key for lost in scanned.lost] == ["lost"]
    assert not list(shard.parent.glob(".*")), "temporary files were left behind"


def test_a_changed_shard_is_scanned_again(shard):
    assert load_index(shard).keys[0] == "00000"
    write_tar(shard, sample(7))
    assert load_index(shard).keys == ("00007",)
    write_tar(shard, sample(8))  # as long as the one before, only later
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert load_index(shard).keys == ("00008",)


@pytest.mark.parametrize("rubbish", [b"", b"{}", b"PK\x03\x04 rubbish", bytes(1000)])
def test_a_damaged_index_is_made_anew(shard, rubbish):
    whole = load_index(shard)
    sidecar = Path(str(shard) + INDEX_SUFFIX)
    good = sidecar.read_bytes()
    sidecar.write_bytes(rubbish)
    assert same(load_index(shard), whole)
    assert len(sidecar.read_bytes()) == len(good)
    for place in range(0, len(good), 97):  # a flipped bit anywhere is found, or harmless
        sidecar.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        assert same(load_index(shard), whole)


def test_an_index_that_cannot_be_written_stays_in_memory(shard, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "read-only file system")

    monkeypatch.setattr(Path, "replace", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*'lost' .it has no image. left out")
        assert len(open_source(shard)) == 4
    assert [path.name for path in shard.parent.iterdir()] == ["00000.tar"]
    assert stat.S_ISREG(shard.stat().st_mode)
    with pytest.raises(OSError, match=r"cannot write .*00000\.tar\.index\.npz"):
        list(index_shards([shard]))


def test_indexes_in_a_folder_of_their_own(shard, tmp_path):
    folder = tmp_path / "indexes"
    (done,) = index_shards([shard], index_dir=folder)
    assert done.is_new
    assert not Path(str(shard) + INDEX_SUFFIX).exists()
    assert [path.suffix for path in folder.rglob("*") if path.is_file()] == [".npz"]
    (again,) = index_shards([shard], index_dir=folder)
    assert not again.is_new
    (forced,) = index_shards([shard], index_dir=folder, force=True)
    assert forced.is_new


def test_no_name_leads_out_of_the_index_folder(tmp_path):
    for name in ("s3://bucket/../../x.tar", "https://host:80/a/b.tar?x=../..", "/a/../../x.tar"):
        place = Path(sidecar_place(name, tmp_path)).resolve()
        assert place.is_relative_to(tmp_path)
    places = {sidecar_place(f"{host}/x.tar", tmp_path) for host in ("s3://a", "s3://b", "gs://a", "/a")}
    assert len(places) == 4


def test_a_stopped_run_continues(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / f"{n}.tar", sample(n)) for n in range(5)]
    runs = index_shards(paths, num_workers=0)
    assert [next(runs).is_new for _ in range(3)] == [True] * 3
    runs.close()
    assert [done.is_new for done in index_shards(paths, num_workers=2)] == [False] * 3 + [True] * 2


def test_many_shards_do_not_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("opencoca.data.tar_source._SHARDS_IN_MEMORY", 2)
    paths = [write_tar(tmp_path / f"{n}.tar", sample(n, f"text {n}")) for n in range(6)]
    source = TarShards(paths)
    assert len(source._indexes) == 2
    assert [source.captions(index) for index in range(6)] == [(f"text {n}",) for n in range(6)]
    assert len(source._indexes) == 2


def test_keys_of_very_many_samples_carry_their_shard(tmp_path, monkeypatch):
    paths = [write_tar(tmp_path / f"{n}.tar", sample(1)) for n in range(3)]
    assert [TarShards(paths).key(n) for n in range(3)] == ["00001", "1/00001", "2/00001"]
    monkeypatch.setattr("opencoca.data.tar_source._MAX_SAMPLES_TO_COMPARE", 2)
    assert [TarShards(paths).key(n) for n in range(3)] == ["0/00001", "1/00001", "2/00001"]


def rewrite_index(shard, change):
    """Stores the shard's index with some of its content changed; it still fits the shard by size and time."""
    load_index(shard)
    sidecar = Path(str(shard) + INDEX_SUFFIX)
    with np.load(sidecar) as arrays:
        facts, members = json.loads(arrays["facts"].tobytes()), arrays["members"].copy()
    members = change(facts, members)
    text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    with open(sidecar, "wb") as file:
        np.savez_compressed(file, facts=text, members=members)


@pytest.mark.parametrize(
    "change",
    [
        lambda facts, members: members + np.int64(2**62) * (members[..., :1] > 0),
        lambda facts, members: np.where(members > 0, -members, 0),
        lambda facts, members: members.astype(float),
        lambda facts, members: members * 1000,
        lambda facts, members: members * np.array([0, 1]),
        lambda facts, members: facts.update(keys=[[]] * len(members)) or members,
        lambda facts, members: facts.update(keys=["same"] * len(members)) or members,
        lambda facts, members: facts.update(lost=[[["k"], 0, "r"]]) or members,
        lambda facts, members: facts.update(damage=[["0", "r"]]) or members,
        lambda facts, members: facts.update(note="x" * 5_000_000) or members,
    ],
)
def test_an_index_that_makes_no_sense_is_made_anew(shard, change):
    rewrite_index(shard, lambda facts, members: members)
    right = load_index(shard)
    rewrite_index(shard, change)
    assert same(load_index(shard), right)


def test_an_index_that_is_a_pipe_is_not_waited_for(shard):
    os.mkfifo(f"{shard}{INDEX_SUFFIX}")
    assert len(load_index(shard).keys) == 4


def test_each_choice_of_members_has_an_index_of_its_own(shard):
    places = {sidecar_place(shard, None, ChosenMembers(*chosen)) for chosen in ((None, None), ("seg.png", None))}
    assert places == {f"{shard}{INDEX_SUFFIX}", f"{shard}.seg.png+{INDEX_SUFFIX}"}
