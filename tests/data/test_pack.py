import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from opencoca.data import decode_image, open_source, pack_shards

from .helpers import encode, gradient, write_images

NAMES = ["b.jpg", "sub/a.png", "c.jpg", "sub/ü.jpg", "last.jpg"]


@pytest.fixture
def source(tmp_path):
    write_images(tmp_path / "images", NAMES, size=(120, 60))
    rows = [{"image": name, "captions": [f"caption {i} of {name}" for i in range(n)]} for n, name in enumerate(NAMES)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_source(tmp_path / "images", tmp_path / "t.jsonl")


def contents(source):
    return [(source.key(i), source.captions(i), source.open_bytes(i)) for i in range(len(source))]


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if ".index." not in path.name}


def test_round_trip_gives_the_same_keys_captions_and_bytes(source, tmp_path):
    summary = pack_shards(source, tmp_path / "out", samples_per_shard=2, progress=False)
    assert (summary.num_shards, summary.num_shards_written, summary.num_samples, summary.errors) == (3, 3, 5, ())
    assert contents(open_source(tmp_path / "out")) == contents(source)
    assert summary.size_bytes == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.tar"))
    # Shards made of shards are the same shards.
    pack_shards(open_source(tmp_path / "out"), tmp_path / "again", samples_per_shard=2, progress=False)
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_bytes_do_not_depend_on_threads_or_time(source, tmp_path):
    for number, options in enumerate([{"num_workers": 0}, {"num_workers": 3}]):
        pack_shards(source, tmp_path / str(number), resize=40, samples_per_shard=3, progress=False, **options)
        os.utime(source.root / "b.jpg")
    assert files(tmp_path / "0") == files(tmp_path / "1")


def test_resize_shrinks_but_never_enlarges(source, tmp_path):
    (source.root / "c.jpg").write_bytes(encode(gradient(30, 20)))
    exif = Image.Exif()
    exif[0x0112] = 6
    (source.root / "last.jpg").write_bytes(encode(gradient(1200, 600), exif=exif))
    expected = {name: decode_image(source.root / name) for name in NAMES}
    pack_shards(source, tmp_path / "out", resize=40, progress=False)
    packed = open_source(tmp_path / "out")
    for index, name in enumerate(NAMES):
        image = decode_image(packed.open_bytes(index))
        assert image.size == {"c.jpg": (30, 20), "last.jpg": (40, 80)}.get(name, (80, 40))
        reference = expected[name].resize(image.size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(image).astype(int) - np.asarray(reference).astype(int)).mean() < 3
    assert all(packed.open_bytes(i)[:2] == b"\xff\xd8" for i in range(5))


def test_formats_that_shards_do_not_name_become_png(tmp_path):
    (tmp_path / "images").mkdir()
    gradient().save(tmp_path / "images" / "x.ppm")
    gradient().save(tmp_path / "images" / "y.jp2")
    pack_shards(open_source(tmp_path / "images"), tmp_path / "out", progress=False)
    packed = open_source(tmp_path / "out")
    assert len(packed) == 2
    assert np.array_equal(np.asarray(decode_image(packed.open_bytes(0))), np.asarray(gradient()))


def test_a_stopped_run_continues(source, tmp_path, monkeypatch):
    for name in ("sub/a.png", "sub/ü.jpg"):
        (source.root / name).write_bytes(b"rubbish")
    pack_shards(source, tmp_path / "whole", samples_per_shard=2, progress=False)
    out = tmp_path / "out"
    read = source.read

    def fails_at(index, stop, *, images=True):
        if index == stop and images:
            raise KeyboardInterrupt
        return read(index, images=images)

    for stop in (0, 2, 3, 4):
        monkeypatch.setattr(source, "read", lambda index, stop=stop, **parts: fails_at(index, stop, **parts))
        with pytest.raises(KeyboardInterrupt):
            pack_shards(source, out, samples_per_shard=2, num_workers=0, progress=False)
        assert {path.name for path in out.glob("*.tar")} == {f"{n:05d}.tar" for n in range(stop // 2)}
        assert not list(out.glob(".*"))
    finished = (out / "00000.tar").stat().st_mtime_ns
    monkeypatch.setattr(source, "read", read)
    summary = pack_shards(source, out, samples_per_shard=2, progress=False)
    assert (summary.num_shards_written, summary.num_samples, len(summary.errors)) == (1, 3, 2)
    assert (out / "00000.tar").stat().st_mtime_ns == finished
    assert files(out) == files(tmp_path / "whole")
    assert pack_shards(source, out, samples_per_shard=2, progress=False).num_shards_written == 0


def test_errors_of_a_shard_that_never_appeared_are_found_again(source, tmp_path, monkeypatch):
    (source.root / "c.jpg").write_bytes(b"")
    out = tmp_path / "out"
    replace = Path.replace

    def fails_for_a_shard(path, target):
        if str(target).endswith("00001.tar"):
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fails_for_a_shard)
    with pytest.raises(OSError, match=r"cannot write .*00001\.tar \(No space left on device\)"):
        pack_shards(source, out, samples_per_shard=2, progress=False)
    monkeypatch.undo()
    assert len(pack_shards(source, out, samples_per_shard=2, progress=False).errors) == 1
    errors = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert errors == [{"shard": "00001.tar", "key": "c.jpg", "reason": "the file is empty"}]


def test_other_settings_or_another_source_need_another_folder(source, tmp_path):
    out = tmp_path / "out"
    pack_shards(source, out, samples_per_shard=2, progress=False)
    before = files(out)
    with pytest.raises(
        ValueError, match=r"out' was packed from other images, captions or labels, or with other settings"
    ):
        pack_shards(source, out, samples_per_shard=3, progress=False)
    with pytest.raises(ValueError, match="choose another one or empty it"):
        pack_shards(open_source(source.root), out, samples_per_shard=2, progress=False)
    assert files(out) == before
    (out / "pack.json").unlink()
    with pytest.raises(ValueError, match="holds other tar shards"):
        pack_shards(source, out, samples_per_shard=2, progress=False)


def test_mistakes(source, tmp_path):
    for options, message in [
        ({"samples_per_shard": 0}, "samples_per_shard must be 1 or more, got 0"),
        ({"resize": 0}, "resize must be 1 or more"),
        ({"quality": 101}, "quality must be in 1..100, got 101"),
    ]:
        with pytest.raises(ValueError, match=message):
            pack_shards(source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
