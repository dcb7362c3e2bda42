"""Prompts and classification scores, against plain references."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from opencoca.data.labels import fill_templates
from opencoca.evaluation.prompts import (
    SIMPLE_TEMPLATES,
    classification_scores,
    load_imagenet_class_names,
    load_templates,
)


def test_the_clip_set_has_80_different_templates():
    templates = load_templates("clip")
    assert len(set(templates)) == len(templates) == 80
    assert all(template.count("{}") == 1 for template in templates)
    assert templates == load_templates()
    assert "a photo of a {}." in templates


def test_the_simple_set_is_one_sentence():
    assert load_templates("simple") == SIMPLE_TEMPLATES == ("a photo of a {}.",)


def test_imagenet_has_1000_names_in_order_of_its_classes():
    names = load_imagenet_class_names()
    assert len(names) == 1000
    assert (names[0], names[1], names[999]) == ("tench", "goldfish", "toilet paper")


@pytest.mark.peers
def test_assets_equal_open_clip():
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.fail("Tests marked peers need open_clip: pip install open_clip_torch.")
    path = Path(spec.origin).with_name("zero_shot_metadata.py")  # the package itself would import torchvision
    metadata_spec = importlib.util.spec_from_file_location("zero_shot_metadata", path)
    metadata = importlib.util.module_from_spec(metadata_spec)
    metadata_spec.loader.exec_module(metadata)
    assert load_imagenet_class_names() == tuple(metadata.IMAGENET_CLASSNAMES)
    for label in ("dog", "kite (bird of prey)"):
        theirs = [template(label) for template in metadata.OPENAI_IMAGENET_TEMPLATES]
        assert fill_templates(label, load_templates("clip")) == theirs


def test_templates_come_from_a_file(tmp_path):
    path = tmp_path / "templates.txt"
    path.write_text("\ufeffa photo of {}\n\n  ein Foto: {}! \r\n", encoding="utf-8")
    assert load_templates(str(path)) == ("a photo of {}", "ein Foto: {}!")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a photo of a dog\n", r"templates.txt: the prompt template 'a photo of a dog' must contain \{\} once"),
        (b"{} and {}\n", "must contain"),
        (b"\n \n", "templates.txt: there are no prompt templates"),
        (b"a caf\xe9 {}", r"the templates in .*templates.txt': it is not UTF-8 text \(line 1 .*iconv -f cp1252"),
    ],
)
def test_bad_template_files_are_refused(tmp_path, content, message):
    path = tmp_path / "templates.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_templates(str(path))


def test_an_unknown_name_is_refused(tmp_path):
    for name in ("openai", str(tmp_path)):
        with pytest.raises(ValueError, match="give clip, simple or a text file"):
            load_templates(name)


@given(st.text(min_size=1).filter(str.strip))
def test_any_label_is_put_in_as_it_is(label):
    assert fill_templates(label, ["{}", "{x} a {}."]) == [label, f"{{x}} a {label}."]


def test_bad_labels_and_templates_are_refused():
    with pytest.raises(ValueError, match="label ' ' is empty"):
        fill_templates(" ", SIMPLE_TEMPLATES)
    with pytest.raises(ValueError, match="single text"):
        fill_templates("dog", "a {}")
    with pytest.raises(ValueError, match="no prompt templates"):
        fill_templates("dog", [])


@st.composite
def logits_and_targets(draw):
    num_images, num_labels = draw(st.integers(1, 30)), draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    high = draw(st.sampled_from([1, 3, 1000]))  # few values: many ties
    logits = torch.randint(0, high, (num_images, num_labels), generator=generator).float()
    return logits, torch.randint(0, num_labels, (num_images,), generator=generator)


@given(logits_and_targets())
def test_classification_scores_equal_sorting(case):
    logits, targets = case
    order = np.argsort(-logits.double().numpy(), axis=1, kind="stable")  # the first of equal labels first
    target = targets.numpy()
    correct = order[:, 0] == target
    scores = classification_scores(logits, targets)
    assert scores.top1 == pytest.approx(correct.mean())
    assert scores.top5 == pytest.approx((order[:, :5] == target[:, None]).any(axis=1).mean())
    per_class = [correct[target == label].mean() for label in np.unique(target)]
    assert scores.mean_per_class == pytest.approx(np.mean(per_class))
    assert (scores.num_images, scores.num_labels) == tuple(logits.shape)
    assert all(confusion.target != confusion.predicted for confusion in scores.confusions)
    if logits.shape[1] <= 3:  # few enough pairs that all of them are listed
        assert sum(confusion.count for confusion in scores.confusions) == (~correct).sum()


def test_confusions_name_the_most_frequent_mistakes_first():
    predicted = [1, 1, 1, 0, 2, 2, 0, 2]
    targets = [0, 0, 0, 1, 1, 1, 2, 2]
    scores = classification_scores(F.one_hot(torch.tensor(predicted), 3).float(), torch.tensor(targets))
    assert [tuple(confusion) for confusion in scores.confusions] == [(0, 1, 3), (1, 2, 2), (1, 0, 1), (2, 0, 1)]
    assert scores.top1 == pytest.approx(1 / 8)
    assert scores.mean_per_class == pytest.approx(0.5 / 3)


def test_equal_logits_score_like_guessing():
    scores = classification_scores(torch.zeros(20, 10), torch.arange(20) % 10)
    assert (scores.top1, scores.top5) == pytest.approx((0.1, 0.5))


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0]), r"\(2, 3\).*\(1,\)"),
        (torch.zeros(0, 3), torch.tensor([], dtype=torch.long), r"\(0, 3\)"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "one integer label"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "Image 1 has the target 3, but there are 3 labels"),
        (torch.tensor([[0.0, 1], [torch.nan, 0]]), torch.tensor([0, 1]), "logits of image 1 are not finite"),
    ],
)
def test_classification_of_nonsense_is_refused(logits, targets, message):
    with pytest.raises(ValueError, match=message):
        classification_scores(logits, targets)
