"""METEOR and SPICE through pycocoevalcap: the two scores of MSCOCO's tables that need Java programs.

The one module that imports pycocoevalcap (the extra ``opencoca[coco-metrics]``). METEOR runs wherever Java does. SPICE
downloads Stanford CoreNLP (400 MB) when it is first used, and its program was written for Java 8: with a newer one, or
without a network, it fails.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence

from opencoca.evaluation.caption_metrics import Key, check_captions
from opencoca.evaluation.ptb_tokenizer import ptb_tokenize

COCO_METRICS = ("meteor", "spice")

_REMEDY = {
    "meteor": "it needs a Java runtime (8 or newer) and 2 GB of memory",
    "spice": "it needs a Java 8 runtime, 8 GB of memory and, the first time, a network to download Stanford CoreNLP",
}

Captions = dict[int, list[str]]


class CocoMetricsError(RuntimeError):
    """A metric could not be computed; ``scores`` holds those that could."""

    def __init__(self, message: str, scores: Mapping[str, float] | None = None):
        super().__init__(message)
        self.scores = dict(scores or {})


def coco_scores(
    candidates: Mapping[Key, str],
    references: Mapping[Key, Sequence[str]],
    metrics: Sequence[str] = COCO_METRICS,
) -> dict[str, float]:
    """METEOR and SPICE of generated captions, between 0 and 1 (tables print them times 100).

    Args:
        candidates: the generated caption of each image, by any key.
        references: the human captions of the same images, by the same keys.
        metrics: which of ``meteor`` and ``spice`` to compute.

    Raises:
        ValueError: captions that do not fit together (see ``caption_scores``) or an unknown metric.
        ImportError: pycocoevalcap is not installed; the message names the extra.
        CocoMetricsError: there is no Java runtime, or a metric failed; the other metrics are computed nonetheless and
            are in the error's ``scores``.
    """
    unknown = [metric for metric in metrics if metric not in COCO_METRICS]
    if unknown:
        raise ValueError(f"There is no metric {unknown[0]!r}: choose from {', '.join(COCO_METRICS)}.")
    check_captions(candidates, references)
    scorers = {metric: _import_scorer(metric) for metric in metrics}
    if shutil.which("java") is None:
        raise CocoMetricsError(
            f"{' and '.join(metric.upper() for metric in metrics)} need a Java runtime and there is none on the "
            "PATH (java): install one, Java 8 for SPICE."
        )
    generated, human = _tokenized(candidates, references)
    scores, problems = {}, []
    for metric, scorer in scorers.items():
        try:
            scores[metric] = scorer(human, generated)
        except Exception as error:  # the wrappers raise whatever their subprocess makes of a broken pipe
            problems.append(f"{metric.upper()} failed ({type(error).__name__}: {error}): {_REMEDY[metric]}.")
    if problems:
        raise CocoMetricsError(" ".join(problems), scores)
    return scores


def _tokenized(candidates: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> tuple[Captions, Captions]:
    """Both sides as pycocoevalcap takes them: tokens joined by spaces, lists of captions by number."""
    generated, human = {}, {}
    for number, key in enumerate(candidates):
        generated[number] = [" ".join(ptb_tokenize(candidates[key]))]
        human[number] = [" ".join(ptb_tokenize(caption)) for caption in references[key]]
    return generated, human


def _import_scorer(metric: str) -> Callable[[Captions, Captions], float]:
    try:
        if metric == "meteor":
            from pycocoevalcap.meteor.meteor import Meteor

            return lambda human, generated: _meteor(Meteor, human, generated)
        from pycocoevalcap.spice.spice import Spice

        return lambda human, generated: float(Spice().compute_score(human, generated)[0])
    except ImportError as error:
        raise ImportError(
            f"{metric.upper()} comes from pycocoevalcap, which cannot be imported ({error}): "
            "install it with pip install 'opencoca[coco-metrics]'."
        ) from error


def _meteor(make_scorer: Callable, human: Captions, generated: Captions) -> float:
    scorer = make_scorer()
    try:
        return float(scorer.compute_score(human, generated)[0])
    finally:
        if scorer.lock.locked():  # its destructor takes the lock and would wait for ever after a failure
            scorer.lock.release()
