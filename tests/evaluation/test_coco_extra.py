"""METEOR and SPICE: what is missing is named, a failing metric leaves the others, and METEOR runs where Java does."""

import shutil
import sys
import threading
from types import ModuleType

import pytest

from opencoca.evaluation.coco_extra import CocoMetricsError, coco_scores

CANDIDATES = {"a.jpg": "A dog runs in the snow.", "b.jpg": "two men sit on a bench"}
REFERENCES = {"a.jpg": ["a black dog is running through snow", "a dog"], "b.jpg": ["Two men are on a bench!"]}


class FakeScorer:
    """Stands for a wrapper of a Java program; keeps what it was given."""

    given: tuple | None = None

    def __init__(self):
        self.lock = threading.Lock()

    def compute_score(self, human, generated):
        type(self).given = (human, generated)
        return 0.25, [0.25] * len(generated)


class BrokenScorer(FakeScorer):
    last: "BrokenScorer"

    def compute_score(self, human, generated):
        type(self).last = self
        self.lock.acquire()
        raise BrokenPipeError("the program ended")


@pytest.fixture
def install(monkeypatch):
    """Puts scorers in the place of pycocoevalcap's, and a java on the PATH."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")

    def put(**scorers):
        for name in ("pycocoevalcap", "pycocoevalcap.meteor", "pycocoevalcap.spice"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        for metric, scorer in scorers.items():
            module = ModuleType(metric)
            setattr(module, metric.capitalize(), scorer)
            monkeypatch.setitem(sys.modules, f"pycocoevalcap.{metric}.{metric}", module)

    return put


def test_captions_reach_the_scorers_tokenized(install):
    install(meteor=FakeScorer, spice=FakeScorer)
    assert coco_scores(CANDIDATES, REFERENCES) == {"meteor": 0.25, "spice": 0.25}
    human, generated = FakeScorer.given
    assert generated == {0: ["a dog runs in the snow"], 1: ["two men sit on a bench"]}
    assert human == {0: ["a black dog is running through snow", "a dog"], 1: ["two men are on a bench"]}


def test_a_failing_metric_leaves_the_others(install):
    install(meteor=FakeScorer, spice=BrokenScorer)
    with pytest.raises(CocoMetricsError, match=r"SPICE failed \(BrokenPipeError.*Java 8 runtime") as error:
        coco_scores(CANDIDATES, REFERENCES)
    assert error.value.scores == {"meteor": 0.25}


def test_a_failing_meteor_does_not_hold_its_lock(install):
    install(meteor=BrokenScorer, spice=FakeScorer)
    with pytest.raises(CocoMetricsError, match="METEOR failed") as error:
        coco_scores(CANDIDATES, REFERENCES)
    assert error.value.scores == {"spice": 0.25}
    assert not BrokenScorer.last.lock.locked()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(ImportError, match=r"pip install 'opencoca\[coco-metrics\]'"):
        coco_scores(CANDIDATES, REFERENCES)


def test_without_java_the_runtime_is_named(install, monkeypatch):
    install(meteor=FakeScorer, spice=FakeScorer)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CocoMetricsError, match="METEOR and SPICE need a Java runtime") as error:
        coco_scores(CANDIDATES, REFERENCES)
    assert error.value.scores == {}


def test_unknown_metrics_and_captions_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no metric 'bleurt'"):
        coco_scores(CANDIDATES, REFERENCES, metrics=["bleurt"])
    with pytest.raises(ValueError, match="missing from the references"):
        coco_scores(CANDIDATES, {"a.jpg": ["x"]})


@pytest.mark.java
def test_meteor_prefers_the_right_captions(coco_peer):
    human = {key: captions[:1] for key, captions in REFERENCES.items()}
    perfect = coco_scores({key: captions[0] for key, captions in human.items()}, human, metrics=["meteor"])["meteor"]
    fair = coco_scores(CANDIDATES, REFERENCES, metrics=["meteor"])["meteor"]
    swapped = {"a.jpg": CANDIDATES["b.jpg"], "b.jpg": CANDIDATES["a.jpg"]}
    assert perfect == pytest.approx(1)
    assert 0 <= coco_scores(swapped, REFERENCES, metrics=["meteor"])["meteor"] < fair < 1
