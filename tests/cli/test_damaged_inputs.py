"""Options of what is read: members of shards, sizes of images; and exit codes where a shard has lost an image."""

import json

import pytest

from cli_helpers import COLOURS, all_parsers, truncated_jpeg, write_captions, write_csv
from data.helpers import encode, gradient
from data.test_shards import sample, write_tar
from opencoca.cli import build_parser, main
from opencoca.data import images as images_module


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
    monkeypatch.setattr(images_module, "_allowed_pixels", 100)
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


@pytest.fixture
def lossy(tmp_path):
    """A shard that has lost an image, one that was cut within the second sample, and a table with an empty row."""
    lossy = tmp_path / "lossy"
    lossy.mkdir()
    write_tar(lossy / "a.tar", [*sample(1), *sample(2), ("00003.txt", b"a text")])
    whole = write_tar(lossy / "b.tar", [*sample(4), *sample(5)])
    whole.write_bytes(whole.read_bytes()[:-4000])
    return lossy


COMMANDS = [
    ["caption", "LOSSY", "--model", "MODEL"],
    ["caption", "LOSSY", "--model", "MODEL", "--out", "c.csv"],
    ["classify", "LOSSY", "--labels", "a,b", "--model", "MODEL"],
    ["embed", "LOSSY", "--out", "e.npz", "--model", "MODEL"],
    ["explain", "LOSSY", "--out", "e.png", "--model", "MODEL"],
    ["evaluate", "retrieval", "--images", "LOSSY", "--model", "MODEL", "--out", "r.json"],
    ["evaluate", "captioning", "--images", "LOSSY", "--model", "MODEL", "--out", "r.json"],
    ["evaluate", "zero-shot", "--images", "LOSSY", "--labels", "folders", "--model", "MODEL"],
    ["data", "check", "LOSSY"],
    ["data", "pack", "--images", "LOSSY", "--out", "packed"],
    ["data", "index", "LOSSY"],
    ["tokenizer", "train", "LOSSY", "--out", "t.json", "--vocab-size", "300"],
]


@pytest.mark.parametrize("argv", COMMANDS, ids=lambda argv: " ".join(argv[:2]))
def test_every_command_names_what_shards_lost_and_ends_with_2(argv, model, lossy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if "zero-shot" in argv:  # one that reads labels of shards
        argv = [*argv[:3], str(lossy), "--model", "MODEL"]
        for shard, first in (("a.tar", 1), ("b.tar", 4)):
            members = [
                *sample(first),
                (f"{first:05d}.cls", b"cat"),
                *sample(first + 1),
                (f"{first + 1:05d}.cls", b"dog"),
            ]
            write_tar(lossy / shard, [*members, ("00009.cls", b"cat")])
    argv = [{"LOSSY": str(lossy), "MODEL": model}.get(word, word) for word in argv]
    assert main(argv) == 2
    told = capsys.readouterr().err
    assert all(f"{name}.tar" in told for name in "ab"), told
    assert "left out" in told
    assert "Warning" not in told
    if "r.json" in argv:
        assert json.loads((tmp_path / "r.json").read_text())["counts"]["broken_images"] >= 1


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "retrieval", "--images", "IMAGES", "--captions", "CAPTIONS", "--model", "MODEL"],
        ["evaluate", "captioning", "--images", "IMAGES", "--captions", "CAPTIONS", "--model", "MODEL"],
        ["evaluate", "zero-shot", "--images", "IMAGES", "--labels", "LABELS", "--model", "MODEL"],
        ["quantize", "MODEL", "int8", "--images", "IMAGES", "--captions", "CAPTIONS", "--max-loss", "100"],
        ["data", "pack", "--images", "IMAGES", "--out", "packed"],
    ],
    ids=lambda argv: " ".join(argv[:2]),
)
def test_a_broken_image_of_a_data_set_is_named_once_and_the_exit_code_is_2(
    argv, model, images, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    truncated_jpeg(images / "red.png")
    labels = write_csv(tmp_path / "labels.csv", ["image", "label"], [[f"{name}.png", name] for name in COLOURS])
    places = {"IMAGES": images, "MODEL": model, "CAPTIONS": write_captions(tmp_path / "c.csv"), "LABELS": labels}
    assert main([str(places.get(word, word)) for word in argv]) == 2
    assert capsys.readouterr().err.count("red.png") == 1


def test_every_command_that_reads_images_has_the_options_of_reading():
    for parser in all_parsers(build_parser()):
        options = {option for action in parser._actions for option in action.option_strings}
        destinations = {action.dest for action in parser._actions}
        if {"images", "source", "shards"} & destinations and parser.prog != "opencoca plan":
            assert {"--image-member", "--text-member"} <= options, parser.prog
        if {"images", "source"} & destinations and parser.prog != "opencoca plan":
            assert "--max-pixels" in options, parser.prog


def test_classes_are_scored_on_chosen_members(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(images_module, "_allowed_pixels", 100)
    members = [*sample(1), ("00001.seg.png", encode(gradient(9, 7), "PNG")), ("00001.cls", b"cat")]
    argv = ["evaluate", "zero-shot", "--images", str(write_tar(tmp_path / "s.tar", members)), "--model", model]
    argv += ["--templates", "simple"]
    assert main(argv) == 2, "none of the images can be read"
    assert "--max-pixels" in capsys.readouterr().err
    assert main([*argv, "--image-member", "seg.png"]) == 0
    assert main([*argv, "--max-pixels", "2000"]) == 0


def test_control_characters_in_names_are_not_printed(tmp_path, capsys):
    (tmp_path / "a\nb\x1b[31m.jpg").write_bytes(b"\xff\xd8\xff")
    assert main(["data", "check", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "a\\nb\\x1b[31m.jpg: " in shown.out
    assert "\x1b" not in shown.out + shown.err
