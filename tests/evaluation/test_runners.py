"""The runners over a model and a source equal the metrics of what the pipeline gives, whatever is in the way."""

from pathlib import Path

import pytest
import torch

from cli_helpers import CAPTIONS, COLOURS, draw, save_tiny_model, text_as_jpeg, truncated_jpeg, write_colours, write_csv
from opencoca.data import ImageFolder, SampleSource, Subset, open_labelled, open_source
from opencoca.evaluation.caption_metrics import caption_scores
from opencoca.evaluation.captioning import evaluate_captioning
from opencoca.evaluation.prompts import SIMPLE_TEMPLATES
from opencoca.evaluation.retrieval import evaluate_retrieval
from opencoca.evaluation.retrieval_metrics import retrieval_scores
from opencoca.evaluation.zero_shot import evaluate_zero_shot, read_class_names
from opencoca.generation import GenerationOptions
from opencoca.inference.loading import load
from opencoca.inference.pipeline import Pipeline

NAMES = [f"{name}.png" for name in COLOURS]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return load(save_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_colours(tmp_path / "images")


def captioned(
    images: Path, keys: list[str] | None = None, extra: dict[str, tuple[str, ...]] | None = None
) -> ImageFolder:
    captions = {f"{name}.png": tuple(own) for name, own in CAPTIONS.items()}
    captions["red.png"] = (*captions["red.png"], "a third caption", "and a fourth")
    captions |= extra or {}
    return ImageFolder(images, keys or list(captions), captions)


def damaged_too(images: Path) -> tuple[SampleSource, list[str]]:
    """The captioned images with two damaged ones among them, and one that has no caption."""
    truncated_jpeg(images / "cut.jpg")
    text_as_jpeg(images / "text.jpg")
    draw((10, 10, 10)).save(images / "bare.png")
    keys = ["cut.jpg", *NAMES[:2], "text.jpg", "bare.png", *NAMES[2:]]
    extra = {"cut.jpg": ("cut",), "text.jpg": ("text",)}
    return captioned(images, keys, extra), ["cut.jpg", "text.jpg"]


def test_retrieval_is_that_of_all_embeddings(pipeline: Pipeline, images: Path) -> None:
    source = captioned(images)
    captions = [source.captions(index) for index in range(len(source))]
    image_of_text = torch.tensor([row for row, own in enumerate(captions) for _ in own])
    expected = retrieval_scores(
        pipeline.embed_images([images / name for name in NAMES]),
        pipeline.embed_texts([text for own in captions for text in own]),
        image_of_text,
    )
    assert expected.num_texts == 10
    for batch_size in (1, 3, 32):
        report = evaluate_retrieval(pipeline, source, batch_size=batch_size)
        assert report.scores == expected
        assert (report.broken_images, report.num_images_without_captions) == ((), 0)


def test_captioning_is_that_of_the_pipelines_captions(pipeline: Pipeline, images: Path) -> None:
    source = captioned(images)
    options = GenerationOptions(max_new_tokens=8, min_new_tokens=3)
    report = evaluate_captioning(pipeline, source, options, batch_size=3)
    texts = pipeline.caption([images / name for name in NAMES], max_new_tokens=8, min_new_tokens=3)
    assert report.captions == dict(zip(NAMES, texts, strict=True))
    assert report.references == {source.key(index): source.captions(index) for index in range(len(source))}
    assert report.scores == caption_scores(report.captions, report.references)
    human = {key: own[0] for key, own in report.references.items()}
    assert caption_scores(human, report.references).cider_d > report.scores.cider_d


@pytest.mark.parametrize(
    "options",
    [GenerationOptions(num_beams=3, max_new_tokens=8), GenerationOptions(temperature=1.5, seed=3, max_new_tokens=8)],
)
@pytest.mark.parametrize("rerank", [False, 0.9])
def test_captioning_takes_every_way_of_decoding(
    pipeline: Pipeline, images: Path, options: GenerationOptions, rerank: bool | float
) -> None:
    source = captioned(images)
    report = evaluate_captioning(pipeline, source, options, rerank=rerank, batch_size=3)
    pixels = pipeline.preprocess([images / name for name in NAMES])
    expected = pipeline.caption_pixels(pixels, options, names=NAMES, rerank=rerank)
    assert report.captions == {name: own[0].text for name, own in zip(NAMES, expected, strict=True)}


def test_captioning_refuses_to_rerank_one_caption(pipeline: Pipeline, images: Path) -> None:
    with pytest.raises(ValueError, match="nothing to rerank"):
        evaluate_captioning(pipeline, captioned(images), GenerationOptions(), rerank=True)


def test_damaged_and_uncaptioned_images_change_nothing_but_the_counts(pipeline: Pipeline, images: Path) -> None:
    source, damaged = damaged_too(images)
    clean = captioned(images)
    for batch_size in (1, 2, 32):
        retrieval = evaluate_retrieval(pipeline, source, batch_size=batch_size)
        captioning = evaluate_captioning(pipeline, source, batch_size=batch_size)
        for report in (retrieval, captioning):
            assert [broken.image for broken in report.broken_images] == damaged
            assert "cut short" in report.broken_images[0].reason
            assert "text file" in report.broken_images[1].reason
            assert report.num_images_without_captions == 1
        assert retrieval.scores == evaluate_retrieval(pipeline, clean).scores
        assert captioning.captions == evaluate_captioning(pipeline, clean).captions


def test_nothing_to_score_is_a_users_mistake(pipeline: Pipeline, images: Path) -> None:
    source, damaged = damaged_too(images)
    broken = Subset(source, [index for index in range(len(source)) if source.key(index) in damaged])
    for evaluate in (evaluate_retrieval, evaluate_captioning):
        with pytest.raises(ValueError, match=r"no images that can be read.*cut\.jpg"):
            evaluate(pipeline, broken)
        with pytest.raises(ValueError, match="no images that can be read and have captions"):
            evaluate(pipeline, ImageFolder(images, NAMES))


def labelled(images: Path, labels: dict[str, str]) -> ImageFolder:
    return ImageFolder(images, list(labels), targets=labels)


def test_zero_shot_is_the_pipelines_classification(pipeline: Pipeline, images: Path) -> None:
    labels = sorted(COLOURS)
    predicted = pipeline.classify([images / name for name in NAMES], labels, list(SIMPLE_TEMPLATES))
    first = {name: scores[0].label for name, scores in zip(NAMES, predicted, strict=True)}
    last = {name: scores[-1].label for name, scores in zip(NAMES, predicted, strict=True)}
    names = {label: label for label in labels}
    for batch_size in (1, 3, 32):
        right = evaluate_zero_shot(pipeline, labelled(images, first), SIMPLE_TEMPLATES, names, batch_size=batch_size)
        wrong = evaluate_zero_shot(pipeline, labelled(images, last), SIMPLE_TEMPLATES, names, batch_size=batch_size)
        assert (right.scores.top1, right.scores.mean_per_class, right.scores.confusions) == (1, 1, ())
        assert (wrong.scores.top1, wrong.scores.mean_per_class) == (0, 0)
    truncated_jpeg(images / "blue.png")
    damaged = evaluate_zero_shot(pipeline, labelled(images, first), SIMPLE_TEMPLATES, names)
    assert (damaged.scores.top1, damaged.scores.num_images) == (1, 3)
    assert [broken.image for broken in damaged.broken_images] == ["blue.png"]


def test_class_names_are_what_prompts_say(pipeline: Pipeline, images: Path, tmp_path: Path) -> None:
    names = {"0": "red", "1": "deep_green", "2": "blue", "3": "white"}
    source = labelled(images, dict(zip(NAMES, names, strict=True)))
    table = write_csv(tmp_path / "names.csv", ["label", "name"], [list(pair) for pair in names.items()])
    assert read_class_names(table) == names
    named = evaluate_zero_shot(pipeline, source, SIMPLE_TEMPLATES, names)
    assert (named.labels, named.names) == (tuple(names), tuple(names.values()))
    direct = labelled(images, dict(zip(NAMES, names.values(), strict=True)))
    same = {name: name for name in names.values()}
    assert evaluate_zero_shot(pipeline, direct, SIMPLE_TEMPLATES, same).scores == named.scores
    assert "deep green" in evaluate_zero_shot(pipeline, direct, SIMPLE_TEMPLATES).names
    with pytest.raises(ValueError, match="no class name: 3"):
        evaluate_zero_shot(pipeline, source, SIMPLE_TEMPLATES, {"0": "red", "1": "green", "2": "blue"})


def test_labels_may_share_a_name(pipeline: Pipeline, images: Path) -> None:
    names = {"other": "blue", "crane": "red", "machine": "red"}
    source = labelled(images, {"red.png": "crane", "blue.png": "machine"})
    for by in ("similarity", "likelihood"):
        scores = evaluate_zero_shot(pipeline, source, SIMPLE_TEMPLATES, names, by=by).scores
        # Equal names are equally likely, so that the first is taken: the second is never right.
        assert (scores.num_labels, scores.mean_per_class) in ((3, 0.0), (3, 0.5))


def test_labels_that_no_image_has_are_to_choose_from(pipeline: Pipeline, images: Path) -> None:
    source = labelled(images, {"red.png": "red"})
    assert evaluate_zero_shot(pipeline, source, SIMPLE_TEMPLATES).scores.num_labels == 1
    more = evaluate_zero_shot(pipeline, source, SIMPLE_TEMPLATES, {"red": "red", "green": "green"})
    assert more.scores.num_labels == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("label,title\na,b\n", "no column 'name'"),
        ("label,name\n", "is empty"),
        ("label,name\na,\n", "lacks"),
        ("label,name\na\n", "has 1 fields"),
    ],
)
def test_unusable_class_names(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "names.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_class_names(tmp_path / "names.csv")
    with pytest.raises(FileNotFoundError, match=r"no\.csv"):
        read_class_names(tmp_path / "no.csv")


def test_labelled_sources(images: Path, tmp_path: Path) -> None:
    rows = [[name, name.removesuffix(".png")] for name in NAMES]
    source = open_labelled(images, write_csv(tmp_path / "labels.csv", ["image", "label"], rows))
    assert [(source.key(index), source.target(index)) for index in range(4)] == [(key, own) for key, own in rows]
    twice = write_csv(tmp_path / "twice.csv", ["image", "label"], [*rows, ["red.png", "green"]])
    with pytest.raises(ValueError, match=r"'red\.png' has 2 labels \(red, green\)"):
        open_labelled(images, twice)
    with pytest.raises(ValueError, match="sub-folder named after its class"):
        open_labelled(images)
    (tmp_path / "classes").mkdir()
    images.rename(tmp_path / "classes" / "colour")
    source = open_labelled(tmp_path / "classes")
    assert {source.target(index) for index in range(len(source))} == {"colour"}
    assert isinstance(open_source(tmp_path / "classes"), ImageFolder)
