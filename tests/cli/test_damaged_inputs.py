"""Options of what is read: members of shards, sizes of images; and exit codes where a shard has lost an image."""

import json

import pytest

from data.helpers import encode, gradient
from data.test_shards import sample, write_tar
from opencoca.cli import main
from opencoca.data import images


@pytest.fixture
def shard(tmp_path):
    members = [*sample(1, "a dog"), ("00001.seg.png", encode(gradient(9, 7), "PNG")), ("00001.alt.txt", b"a cat")]
    return write_tar(tmp_path / "s.tar", members)


def report_of(tmp_path, *arguments):
    code = main(["data", "check", *map(str, arguments), "--json", str(tmp_path / "r.json"), "--overwrite"])
    return code, json.loads((tmp_path / "r.json").read_text())


def test_members_are_chosen(shard, tmp_path, capsys):
    code, report = report_of(tmp_path, shard)
    assert (code, report["width"]["max"], report["formats"]) == (0, 48, {"JPEG": 1})
    code, report = report_of(tmp_path, shard, "--image-member", "seg.png", "--text-member", "alt.txt")
    assert (code, report["width"]["max"], report["formats"]) == (0, 9, {"PNG": 1})
    assert main(["data", "index", str(shard), "--image-member", "seg.png"]) == 0
    assert (tmp_path / "s.tar.seg.png+.index.npz").exists()


def test_larger_images_are_allowed(shard, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images, "_allowed_pixels", 100)
    code, report = report_of(tmp_path, shard)
    assert code == 2
    assert "allow more" in report["broken_images"][0][1]
    code, report = report_of(tmp_path, shard, "--max-pixels", 48 * 32)
    assert (code, report["broken_images"]) == (0, [])


def test_what_a_shard_lost_is_named_and_the_exit_code_is_2(shard, tmp_path, capsys):
    shard.write_bytes(shard.read_bytes()[:1500])
    write_tar(tmp_path / "whole.tar", [*sample(2), ("gone.txt", b"text")])
    assert main(["data", "check", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("s.tar': it is cut short") == 1
    assert "'gone' (it has no image) left out" in told
    assert "UserWarning" not in told


def test_control_characters_in_names_are_not_printed(tmp_path, capsys):
    (tmp_path / "a\nb\x1b[31m.jpg").write_bytes(b"\xff\xd8\xff")
    assert main(["data", "check", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "a\\nb\\x1b[31m.jpg: " in shown.out
    assert "\x1b" not in shown.out + shown.err
