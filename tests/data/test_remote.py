import multiprocessing
import threading
import time
import warnings
from pathlib import Path

import pytest

from opencoca.data import (
    PreprocessConfig,
    RemoteReadError,
    RetryPolicy,
    ShardStorage,
    TarShards,
    TrainingLoader,
    TrainTransform,
    find_shards,
    index_shards,
    load_index,
    make_order,
    open_source,
    read_quarantine,
)
from opencoca.data.block_cache import BlockCache
from opencoca.data.remote import read_file, read_range, remote_status

from .flaky_server import FAULTS, serve
from .helpers import WordTokenizer
from .test_shards import sample, write_tar

PATIENT = RetryPolicy(attempts=12, first_pause_s=0.01, longest_pause_s=0.05, timeout_s=0.5)
SHARDS, SAMPLES = 3, 8


@pytest.fixture
def web(tmp_path):
    (tmp_path / "web").mkdir()
    for shard in range(SHARDS):
        numbers = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        members = [member for number in numbers for member in sample(number, f"caption {number}")]
        write_tar(tmp_path / "web" / f"{shard:05d}.tar", members)
    with serve(tmp_path / "web") as server:
        yield server


@pytest.fixture
def pattern(web):
    return f"{web.url}/{{00000..{SHARDS - 1:05d}}}.tar"


@pytest.fixture
def indexed(pattern, tmp_path):
    """An index folder for all shards of the server."""
    folder = tmp_path / "indexes"
    assert all(done.is_new for done in index_shards(find_shards(pattern), index_dir=folder))
    return str(folder)


def everything(source):
    return {source.key(index): source.read(index) for index in range(len(source))}


def test_the_same_samples_as_from_a_folder(web, pattern, indexed):
    source = open_source(pattern, storage=ShardStorage(index_dir=indexed))
    assert source.is_remote
    assert everything(source) == everything(open_source(web.folder))
    assert source.place(9).file == f"{web.url}/00001.tar"


def test_one_request_a_sample(web, pattern, indexed):
    source = open_source(pattern, storage=ShardStorage(index_dir=indexed))
    web.ranges.clear()
    source.read(5)
    assert len(web.ranges) == 1
    assert web.ranges[0][1].startswith("bytes=")


def test_a_shard_is_indexed_with_few_requests(web, pattern, tmp_path, monkeypatch):
    list(index_shards(find_shards(pattern), index_dir=tmp_path / "a"))
    gets = [path for path, wanted in web.ranges if wanted]
    assert len(gets) == SHARDS
    monkeypatch.setattr("opencoca.data.shard_index._READ_BYTES", 1000)
    pieces = [done.index.digest for done in index_shards(find_shards(pattern), index_dir=tmp_path / "b")]
    assert pieces == [load_index(path).digest for path in find_shards(str(web.folder))]


def test_without_an_index_the_error_names_the_command(web, pattern, indexed, tmp_path):
    with pytest.raises(ValueError, match=r"'http://.*/00000.tar' has no index; make one with `opencoca data index"):
        open_source(pattern)
    write_tar(Path(web.folder) / "00001.tar", sample(99))
    with pytest.raises(ValueError, match=r"00001.tar' has changed since its index was made.*--index-dir"):
        open_source(pattern, storage=ShardStorage(index_dir=indexed))
    assert [done.is_new for done in index_shards(find_shards(pattern), index_dir=indexed)] == [False, True, False]
    assert len(open_source(pattern, storage=ShardStorage(index_dir=indexed))) == 2 * SAMPLES + 1
    with pytest.raises(ValueError, match=r"nothing can be written beside 'http.*add --index-dir"):
        list(index_shards(find_shards(pattern)))


def test_names_on_web_servers_must_be_spelled_out(web):
    with pytest.raises(ValueError, match="a web server lists no files"):
        find_shards(f"{web.url}/*.tar")
    with pytest.raises(ValueError, match="a web server lists no files"):
        find_shards(web.url)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_survived(web, pattern, indexed, fault):
    storage = ShardStorage(index_dir=indexed, retries=PATIENT)
    source = TarShards(find_shards(pattern), storage=storage)
    expected = everything(open_source(web.folder))
    web.share, web.faults, web.stall_s = (0.2 if fault == "stall" else 0.4), (fault,), 0.8
    assert everything(source) == expected
    assert web.counts[fault]


def test_a_flaky_server_costs_no_sample_of_a_run(web, pattern, indexed, tmp_path):
    """5% faults of all kinds: the batches are those of the local shards, and nothing is taken for damaged."""
    storage = ShardStorage(index_dir=indexed, retries=PATIENT, cache_dir=str(tmp_path / "c"), block_samples=3)
    local = TarShards(find_shards(str(web.folder)), storage=ShardStorage(block_samples=3))
    remote = TarShards(find_shards(pattern), storage=storage)
    web.share, web.stall_s = 0.05, 1.0
    expected = list(loader(local).batches(stop_epoch=3))
    for num_workers in (0, 2):
        got = list(loader(remote, num_workers=num_workers).batches(stop_epoch=3))
        assert [batch.keys for batch in got] == [batch.keys for batch in expected]
        assert all(bool((a.images == b.images).all()) for a, b in zip(got, expected, strict=True))


def loader(source, *, num_workers=0, batch_size=4, **options):
    transform = TrainTransform(PreprocessConfig(image_size=(16, 16)))
    order = make_order(source, 5, by_blocks=True, window_blocks=3, drop_last=False)
    return TrainingLoader(
        source, WordTokenizer(), transform, order, batch_size, 1, 20, 5, num_workers=num_workers, **options
    )


def test_a_dead_server_stops_the_run_instead_of_replacing_samples(web, pattern, indexed):
    hasty = RetryPolicy(attempts=3, first_pause_s=0.01, longest_pause_s=0.01, timeout_s=0.5)
    source = TarShards(find_shards(pattern), storage=ShardStorage(index_dir=indexed, retries=hasty))
    web.share, web.faults = 1.0, ("error",)
    for num_workers in (0, 1):
        with pytest.raises(RemoteReadError, match=r"after 3 attempts \(.*\); check the connection and start again"):
            list(loader(source, num_workers=num_workers).batches(stop_epoch=1))


def test_a_shard_that_is_gone_is_no_reason_to_wait(web, pattern, indexed):
    source = TarShards(find_shards(pattern), storage=ShardStorage(index_dir=indexed))
    (Path(web.folder) / "00001.tar").unlink()
    began = time.monotonic()
    with pytest.raises(RemoteReadError, match=r"00001.tar': there is no such file"):
        source.read(SAMPLES)
    assert time.monotonic() - began < 5
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*00001.tar'"):
        remote_status(f"{web.url}/00001.tar")


def test_reads(web):
    data = (Path(web.folder) / "00000.tar").read_bytes()
    url = f"{web.url}/00000.tar"
    assert read_file(url) == data
    assert read_range(url, 1000, 17) == data[1000:1017]
    assert remote_status(url).size == len(data)
    with pytest.raises(RemoteReadError, match="after 2 attempts"):
        read_range(url, len(data) - 5, 10, RetryPolicy(attempts=2, first_pause_s=0))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("opencoca.data.remote._filesystems", {})

    def absent(*args, **kwargs):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.filesystem", absent)
    with pytest.raises(ImportError, match=r"s3://.*Install s3fs.*pip install 'opencoca\[remote\]'"):
        read_file("s3://bucket/key")
    with pytest.raises(ImportError, match="opencoca"):
        read_file("nonsense://bucket/key")


def test_pauses_grow_to_a_limit():
    policy = RetryPolicy(first_pause_s=1, longest_pause_s=8)
    for failures, most in [(1, 1), (2, 2), (3, 4), (4, 8), (9, 8)]:
        assert most / 2 <= policy.pause_s(failures) <= most


# the cache


def test_blocks_are_fetched_once(web, pattern, indexed, tmp_path):
    storage = ShardStorage(index_dir=indexed, cache_dir=str(tmp_path / "cache"), block_samples=3)
    source = open_source(pattern, storage=storage)
    web.ranges.clear()
    first = everything(source)
    assert len(web.ranges) == SHARDS * 3  # blocks of 3, 3 and 2
    assert everything(open_source(pattern, storage=storage)) == first == everything(open_source(web.folder))
    assert sum(bool(wanted) for _, wanted in web.ranges) == SHARDS * 3  # the rest asked for sizes


def test_the_cache_keeps_to_its_limit_and_drops_what_was_not_used(tmp_path):
    cache = BlockCache(tmp_path, 1000)
    fetched = []

    def read(name):
        def fetch():
            fetched.append(name)
            return name.encode() * 100

        assert cache.read(name, 100 * len(name), fetch, 50, 20) == (name.encode() * 100)[50 : 50 + 20]
        time.sleep(0.002)  # the file system's clock

    for name in ("a", "b", "c", "d", "e", "f", "g", "h"):
        read(name)
        read("a")
    assert fetched == list("abcdefgh")
    read("ii")  # 200 bytes: 1,000 in all
    assert cache.size_bytes() == 1000
    read("j")
    assert cache.size_bytes() <= 1000
    fetched.clear()
    read("a")
    read("j")
    assert fetched == []
    read("b")
    assert fetched == ["b"]


def test_a_cached_block_that_was_cut_short_is_fetched_again(tmp_path):
    cache = BlockCache(tmp_path, 10**6)
    assert cache.read("x", 4, lambda: b"data", 1, 2) == b"at"
    (path,) = tmp_path.glob("*/*.block")
    path.write_bytes(b"da")
    assert cache.read("x", 4, lambda: b"data", 1, 2) == b"at"
    assert path.read_bytes() == b"data"


def test_a_cache_that_cannot_be_written_costs_only_the_cache(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    cache = BlockCache(tmp_path, 10**6)
    with pytest.warns(UserWarning, match="remote data are not kept: cannot write"):
        assert cache.read("x", 4, lambda: b"data", 1, 2) == b"at"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read("y", 4, lambda: b"data", 0, 4) == b"data"


def _hammer(folder, seed, results):
    """Reads blocks at random out of a cache that holds a third of them; every answer must be right."""
    import random

    cache, draw = BlockCache(folder, 3000), random.Random(seed)
    for _ in range(150):
        name = str(draw.randrange(9))
        if cache.read(name, 1000, lambda n=name: n.encode() * 1000, 10, 5) != name.encode() * 5:
            results.put(f"wrong bytes of {name}")
            return
    results.put("good")


def test_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_hammer, args=(tmp_path, seed, results)) for seed in range(3)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == ["good"] * 3
    for process in processes:
        process.join(10)
    assert BlockCache(tmp_path, 3000).size_bytes() <= 3000


def test_a_block_is_fetched_by_one_and_awaited_by_the_others(tmp_path):
    cache, fetched = BlockCache(tmp_path, 10**6), []

    def fetch():
        fetched.append(1)
        time.sleep(0.1)
        return b"data"

    threads = [threading.Thread(target=cache.read, args=("x", 4, fetch, 0, 4)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


def test_damaged_remote_samples_are_quarantined(web, pattern, tmp_path):
    """Of one shard an image is damaged, of another a header, of the third a caption is missing: all named, once."""
    folder = Path(web.folder)
    indexes = {shard: load_index(folder / f"{shard:05d}.tar") for shard in range(SHARDS)}
    data = bytearray((folder / "00000.tar").read_bytes())
    offset = int(indexes[0].members[2, 0, 0])
    data[offset : offset + 512] = b"\xa5" * 512
    (folder / "00000.tar").write_bytes(data)
    data = bytearray((folder / "00001.tar").read_bytes())
    offset = int(indexes[1].members[3, 1, 0]) - 512
    data[offset : offset + 512] = b"\xa5" * 512
    (folder / "00001.tar").write_bytes(data)
    members = [sample(number, f"caption {number}") for number in range(16, 24)]
    members[4] = members[4][:1]
    write_tar(folder / "00002.tar", [member for own in members for member in own])
    list(index_shards(find_shards(pattern), index_dir=tmp_path / "i"))
    with pytest.warns(UserWarning, match="it is damaged at byte"):
        source = TarShards(find_shards(pattern), storage=ShardStorage(index_dir=str(tmp_path / "i"), retries=PATIENT))
    web.share, web.stall_s = 0.05, 1.0
    quarantine = tmp_path / "bad.jsonl"
    for _ in range(2):  # the second run adds nothing
        with pytest.warns(UserWarning, match="takes its place"):
            batches = list(loader(source, quarantine=quarantine, max_bad_share=0.2).batches(stop_epoch=2))
        keys = [key for batch in batches for key in batch.keys]
        good = {f"{n:05d}" for n in range(24)} - {"00002", "00011", "00020"}
        assert set(keys) == good
        assert len(quarantine.read_text().splitlines()) == 4
    bad = {entry.key: entry for entry in read_quarantine(quarantine)}
    assert set(bad) == {"00002", "00011", "00020", ""}
    assert bad[""].reason == f"it is damaged at byte {offset:,}"
    assert "not an image" in bad["00002"].reason
    assert "the shard lost a part of it: it is damaged at byte" in bad["00011"].reason
    assert "has no caption" in bad["00020"].reason
    assert bad["00020"].file == f"{web.url}/00002.tar"
    assert bad["00002"].offset == int(indexes[0].members[2, 0, 0])
