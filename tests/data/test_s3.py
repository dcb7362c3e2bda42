"""An object store (moto's S3 server) behind a line that fails: needs `pip install 'moto[server]' s3fs`."""

import threading
import time
from pathlib import Path

import pytest

from opencoca.data import (
    RetryPolicy,
    ShardStorage,
    TarShards,
    find_shards,
    index_shards,
    load_index,
    open_source,
    read_quarantine,
)

from .flaky_server import serve
from .test_remote import loader
from .test_shards import sample, write_tar

pytestmark = pytest.mark.slow
SHARDS, SAMPLES = 6, 20
PATIENT = RetryPolicy(attempts=12, first_pause_s=0.02, longest_pause_s=0.5, timeout_s=2)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """An S3 bucket of shards, reached through a server that can be told to fail."""
    server_module = pytest.importorskip("moto.server", reason="moto is not installed: make test-slow installs it")
    s3fs = pytest.importorskip("s3fs")
    moto = server_module.ThreadedMotoServer(port=0)
    moto.start()
    host, port = moto.get_host_and_port()
    for name, value in [("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")]:
        monkeypatch.setenv(f"AWS_{name}", value)
    folder = tmp_path / "local"
    folder.mkdir()
    for shard in range(SHARDS):
        numbers = range(shard * SAMPLES, (shard + 1) * SAMPLES)
        members = [sample(number, f"caption {number}") for number in numbers]
        if shard == 1:
            members[3] = members[3][:1]  # no caption
        write_tar(folder / f"{shard:05d}.tar", [member for own in members for member in own])
    damage(folder)
    with serve(upstream=f"127.0.0.1:{port}") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        monkeypatch.setattr("opencoca.data.remote._filesystems", {})
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}".replace("0.0.0.0", "127.0.0.1"))
        store.mkdir("photos")
        for path in sorted(folder.glob("*.tar")):
            store.pipe_file(f"photos/{path.name}", path.read_bytes())
        yield proxy, folder
    moto.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def damage(folder: Path) -> None:
    """A damaged image in shard 0, a broken header in shard 2, shard 3 cut short, shard 4 empty."""
    for shard, row, member, shift in [(0, 2, 0, 0), (2, 5, 0, -512)]:
        path = folder / f"{shard:05d}.tar"
        offset = int(load_index(path).members[row, member, 0]) + shift
        data = path.read_bytes()
        path.write_bytes(data[:offset] + b"\xa5" * 512 + data[offset + 512 :])
    path = folder / "00003.tar"
    path.write_bytes(path.read_bytes()[: int(load_index(path).members[15, 1, 0]) + 3])
    (folder / "00004.tar").write_bytes(b"")
    for sidecar in folder.glob("*.npz"):
        sidecar.unlink()


@pytest.mark.filterwarnings("ignore")
def test_every_good_sample_comes_and_every_bad_one_is_counted(bucket, tmp_path):
    proxy, folder = bucket
    proxy.share, proxy.stall_s = 0.05, 4.0
    began = time.monotonic()
    paths = find_shards("s3://photos/*.tar")
    assert len(paths) == SHARDS
    assert all(done.is_new for done in index_shards(paths))  # beside the shards, in the bucket
    expected = list(loader(open_source(folder), batch_size=10, max_bad_share=0.5).batches(stop_epoch=2))
    # Of shard 3, whose end is missing, the samples behind the cut have no names any more.
    good = {f"{number:05d}" for number in range(SHARDS * SAMPLES)} - {"00002", "00023", "00045"}
    good -= {f"{number:05d}" for number in [*range(75, 80), *range(80, 100)]}
    for cache_dir in (None, str(tmp_path / "cache")):
        for num_workers in (0, 2):
            source = TarShards(paths, storage=ShardStorage(cache_dir=cache_dir, retries=PATIENT))
            bad = tmp_path / f"bad-{num_workers}-{cache_dir is None}.jsonl"
            batches = loader(source, batch_size=10, num_workers=num_workers, quarantine=bad, max_bad_share=0.5)
            got = list(batches.batches(stop_epoch=2))
            assert [batch.keys for batch in got] == [batch.keys for batch in expected]
            assert all(bool((a.images == b.images).all()) for a, b in zip(got, expected, strict=True))
            reasons = {entry.key: entry.reason for entry in read_quarantine(bad)}
            assert {key for batch in got for key in batch.keys} == good
            assert set(reasons) == {"00002", "00023", "00045", "00075", ""}
            damaged = {Path(entry.file).name for entry in read_quarantine(bad) if not entry.key}
            assert damaged == {"00002.tar", "00003.tar", "00004.tar"}
            assert "has no caption" in reasons["00023"]
            assert "it is damaged at byte" in reasons["00045"]
    assert sum(proxy.counts[fault] for fault in proxy.faults) > 20
    assert time.monotonic() - began < 300
    assert threading.active_count() < 200
