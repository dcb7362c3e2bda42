"""A whole run: the right captions in the files, and nothing written over or mixed up unasked."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from cli_helpers import save_tiny_model, text_as_jpeg
from opencoca.data import Sample, SampleSource
from opencoca.inference.loading import load
from opencoca.inference.pipeline import Pipeline
from opencoca.recaption import Captioner, Destination, FlagThresholds, RunReport, caption_to_files, open_inputs
from opencoca.recaption.captioner import caption_source

from .helpers import make_captioner, write_images, write_shard


def caption(captioner: Captioner, inputs: list[str], out: Path | None, beside: bool = False, **options) -> RunReport:
    source = open_inputs(inputs)
    return caption_to_files(captioner, source, Destination.of(source, out, beside), **options)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    return write_images(tmp_path / "images", 7)


@pytest.fixture
def captioner(pipeline: Pipeline) -> Captioner:
    return make_captioner(pipeline)


def test_captions_are_those_of_the_pipeline(pipeline: Pipeline, images: list[str], tmp_path: Path) -> None:
    options = {"num_beams": 3, "min_new_tokens": 2, "prefix": "a"}
    report = caption(make_captioner(pipeline, **options), images, tmp_path / "o.jsonl", batch_size=3)
    details = [own[0] for own in pipeline.caption_details(images, max_new_tokens=8, batch_size=3, **options)]
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert [row["image"] for row in rows] == images
    assert [row["caption"] for row in rows] == [detail.text for detail in details]
    assert [row["length"] for row in rows] == [detail.length for detail in details]
    assert [row["log_probability"] for row in rows] == pytest.approx([d.log_probability for d in details], abs=1e-3)
    assert (report.images, report.captions, report.unreadable) == (7, 7, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "o.jsonl", "o.jsonl.run.json"]


def test_every_format_has_the_same_rows(captioner: Captioner, images: list[str], tmp_path: Path) -> None:
    several = replace(captioner, options=replace(captioner.options, num_beams=3, num_captions=3))
    for suffix in ("jsonl", "csv", "parquet"):
        caption(several, images, tmp_path / f"o.{suffix}")
    rows = read_jsonl(tmp_path / "o.jsonl")
    assert pq.read_table(tmp_path / "o.parquet").to_pylist() == rows
    with open(tmp_path / "o.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["caption"] for row in table] == [row["caption"] for row in rows]
    assert [row["flags"].split() for row in table] == [row["flags"] for row in rows]
    assert [(row["image"], row["rank"]) for row in rows] == [(path, rank) for path in images for rank in range(3)]


def test_reranked_rows_have_their_similarity(captioner: Captioner, images: list[str], tmp_path: Path) -> None:
    beams = replace(captioner, options=replace(captioner.options, num_beams=4), rerank=True)
    caption(beams, images, tmp_path / "o.jsonl")
    rows = read_jsonl(tmp_path / "o.jsonl")
    details = beams.pipeline.caption_details(images, max_new_tokens=8, num_beams=4, rerank=True)
    assert [row["caption"] for row in rows] == [own[0].text for own in details]
    assert [row["similarity"] for row in rows] == pytest.approx([own[0].similarity for own in details], abs=1e-3)
    plain = [own[0].text for own in beams.pipeline.caption_details(images, max_new_tokens=8, num_beams=4)]
    assert [row["caption"] for row in rows] != plain
    with pytest.raises(ValueError, match="nothing to rerank"):
        replace(captioner, rerank=True)


def test_random_captions_belong_to_the_image(pipeline: Pipeline, images: list[str]) -> None:
    """Neither the batch nor the order nor what was done before changes them; the seed does."""

    def captions(inputs: list[str], seed: int, batch_size: int, start: int = 0) -> dict[str, str]:
        captioner = make_captioner(pipeline, temperature=1.0, seed=seed)
        batches = caption_source(captioner, open_inputs(inputs), batch_size, start=start)
        return {image.image: image.captions[0].text for batch in batches for image in batch}

    once = captions(images, 0, 7)
    assert len(set(once.values())) > 1
    assert captions(images[::-1], 0, 2) == once
    assert captions(images, 0, 3, start=4) == {path: once[path] for path in images[4:]}
    assert captions(images, 1, 7) != once


def test_unreadable_images_are_reported_and_the_others_done(
    captioner: Captioner, images: list[str], tmp_path: Path
) -> None:
    broken = str(text_as_jpeg(tmp_path / "broken.jpg"))
    told: list[str] = []
    inputs = [images[0], broken, *images[1:], "gone.png"]
    report = caption(captioner, inputs, tmp_path / "o.jsonl", batch_size=2, on_error=told.append)
    assert [row["image"] for row in read_jsonl(tmp_path / "o.jsonl")] == images
    errors = read_jsonl(tmp_path / "o.jsonl.errors.jsonl")
    assert [row["image"] for row in errors] == [broken, "gone.png"]
    assert [row["error"] for row in errors] == told
    assert "it is a text file, not an image" in told[0]
    assert "there is no such file" in told[1]
    assert (report.images, report.captions, report.unreadable) == (9, 7, 2)
    caption(captioner, images, tmp_path / "o.jsonl", overwrite=True)
    assert not (tmp_path / "o.jsonl.errors.jsonl").exists()


def test_nothing_but_unreadable_images(captioner: Captioner, tmp_path: Path) -> None:
    report = caption(captioner, ["gone.png"], tmp_path / "o.csv")
    assert (report.captions, report.unreadable) == (0, 1)
    assert (tmp_path / "o.csv").read_text() == '"image","caption","log_probability","length","flags"\n'


def test_flags_reach_the_file(captioner: Captioner, images: list[str], tmp_path: Path) -> None:
    strict = FlagThresholds(min_words=100, common_share=0.0, common_images=1)
    report = caption(captioner, images, tmp_path / "o.jsonl", thresholds=strict)
    assert all({"near-empty", "common"} <= set(row["flags"]) for row in read_jsonl(tmp_path / "o.jsonl"))
    assert report.flags["common"] == report.flags["near-empty"] == 7


def test_what_exists_is_not_written_over_unasked(captioner: Captioner, images: list[str], tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"o\.jsonl would be replaced; .* --overwrite"):
        caption(captioner, images, out)
    assert out.read_text() == "mine"
    caption(captioner, images, out, overwrite=True)
    assert len(read_jsonl(out)) == 7


def test_a_complete_run_is_not_repeated(captioner: Captioner, images: list[str], tmp_path: Path) -> None:
    out, told = tmp_path / "o.jsonl", []
    first = caption(captioner, [*images, "gone.png"], out)
    stamp = out.stat().st_mtime_ns
    assert caption(captioner, [*images, "gone.png"], out, on_note=told.append) == first
    assert "is complete already: 8 images" in told[0]
    assert out.stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="would be replaced"):
        caption(captioner, images, out)


def interrupt(captioner: Captioner, inputs: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends a run after its second batch of two images."""
    real = Captioner.__call__
    calls: list[int] = []

    def call(self: Captioner, pixels: torch.Tensor, names: list[str]) -> object:
        calls.append(len(names))
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(self, pixels, names)

    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "__call__", call)
        with pytest.raises(KeyboardInterrupt):
            caption(captioner, inputs, out, batch_size=2)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prefix": "a"}, 'prefix was "" and is "a" now'),
        ({"num_beams": 4, "temperature": None}, "num_beams was 1 and is 4 now; temperature was 0.5 and is not set now"),
        ({"seed": 7}, "seed was 0 and is 7 now"),
    ],
)
def test_changed_options_are_refused(
    pipeline: Pipeline,
    images: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict,
    sentence: str,
) -> None:
    out = tmp_path / "o.jsonl"
    captioner = make_captioner(pipeline, temperature=0.5)
    interrupt(captioner, images, out, monkeypatch)
    changed = replace(captioner, options=replace(captioner.options, **change))
    journal = (tmp_path / "o.jsonl.journal").read_bytes()
    with pytest.raises(ValueError, match="belongs to a run with other settings") as caught:
        caption(changed, images, out)
    assert f"settings: {sentence}; continue with" in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert (tmp_path / "o.jsonl.journal").read_bytes() == journal
    caption(changed, images, out, overwrite=True)
    assert len(read_jsonl(out)) == 7


def test_other_images_and_another_model_are_refused(
    captioner: Captioner, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o.jsonl"
    interrupt(captioner, images, out, monkeypatch)
    with pytest.raises(ValueError, match="there were 7 images and there are 6 now"):
        caption(captioner, images[:6], out)
    with pytest.raises(ValueError, match="the list of images is different"):
        caption(captioner, images[::-1], out)
    other = load(save_tiny_model(tmp_path / "other"), "cpu")
    assert caption(replace(captioner, pipeline=other), images, tmp_path / "same.jsonl").captions == 7
    with torch.no_grad():
        other.model.unimodal_decoder.token_embed.weight[5, 3] += 1e-3
    with pytest.raises(ValueError, match="the model is a different one"):
        caption(replace(captioner, pipeline=other), images, out)
    half = load(tmp_path / "other", "cpu", "bfloat16")
    with pytest.raises(ValueError, match='dtype was "float32" and is "bfloat16" now'):
        caption(replace(captioner, pipeline=half), images, out)


def test_a_batch_that_does_not_fit_says_what_to_do(
    captioner: Captioner, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "__call__", fail)
        with pytest.raises(ValueError, match=r"4 images at a time do not fit into .*--batch-size 2 continues"):
            caption(captioner, images, tmp_path / "o.jsonl", batch_size=4)
    caption(captioner, images, tmp_path / "o.jsonl", batch_size=2)
    assert len(read_jsonl(tmp_path / "o.jsonl")) == 7


def test_texts_beside_the_images(captioner: Captioner, images: list[str], tmp_path: Path) -> None:
    several = replace(captioner, options=replace(captioner.options, num_beams=2, num_captions=2))
    mine = Path(images[3]).with_suffix(".txt")
    mine.write_text("mine\n")
    with pytest.raises(ValueError, match=r"\.txt would be replaced"):
        caption(several, images, None, beside=True)
    assert mine.read_text() == "mine\n"
    mine.unlink()
    caption(several, images, None, beside=True)
    expected = several.pipeline.caption(images, max_new_tokens=8, num_beams=2, num_captions=2)
    for path, texts in zip(images, expected, strict=True):
        lines = Path(path).with_suffix(".txt").read_text().split("\n")
        assert lines == [*(" ".join(text.split()) for text in texts), ""]
    left = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert left == ["a", "b", "opencoca-captions.run.json"]


def test_both_a_file_and_texts(captioner: Captioner, images: list[str], tmp_path: Path) -> None:
    report = caption(captioner, images, tmp_path / "o.csv", beside=True)
    assert report.captions == 7
    assert all(Path(path).with_suffix(".txt").exists() for path in images)
    with pytest.raises(ValueError, match="cannot tell the format"):
        Destination.of(open_inputs(images), tmp_path / "o.xls", False)


def test_shards(captioner: Captioner, tmp_path: Path) -> None:
    for number in range(2):
        write_shard(tmp_path / f"{number}.tar", [number, number + 10])
    caption(captioner, [str(tmp_path)], tmp_path / "o.jsonl", batch_size=3)
    names = [f"{tmp_path}/{number}.tar/{seed:05d}" for number in range(2) for seed in (number, number + 10)]
    assert [row["image"] for row in read_jsonl(tmp_path / "o.jsonl")] == names


def test_decoding_is_ahead_of_the_model_and_bounded(captioner: Captioner, images: list[str]) -> None:
    read: list[int] = []

    class Watched(SampleSource):
        def __len__(self) -> int:
            return 70

        def key(self, index: int) -> str:
            return f"{index}"

        def read(self, index: int, **parts: bool) -> Sample:
            read.append(index)
            return Sample((Path(images[index % 7]).read_bytes(),))

    batches = caption_source(captioner, Watched(), 4, num_workers=1)
    assert len(next(batches)) == 4
    assert 4 < len(read) <= 4 * 6
    batches.close()
    done = len(read)
    assert done < 70
