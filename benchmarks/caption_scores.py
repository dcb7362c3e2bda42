"""Captions of a validation set by every way of decoding, scored; the rerank weight chosen on one half of it.

    python benchmarks/caption_scores.py --images DIR --captions val.csv [--out results/captioning.json] [--work DIR]

Images are encoded once; the captions of each setting are kept in the --work folder, so that an interrupted run goes on
where it was. Prints and writes BLEU, ROUGE-L, CIDEr-D and how often a caption finds its own image among all images of
the set (R@1, by cosine). The weight of similarity in reranking is the one with the highest CIDEr-D on the first half of
the images; what it gains is reported on the second half, which had no part in the choice.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import machine
from torch import Tensor
from tqdm import tqdm

import opencoca
from opencoca.data import open_source
from opencoca.evaluation.caption_metrics import caption_scores
from opencoca.evaluation.encoding import encode_images
from opencoca.evaluation.retrieval import with_captions
from opencoca.generation import GeneratedCaption, GenerationOptions, generate
from opencoca.generation.rerank import DEFAULT_RERANK_WEIGHT, mixed_scores
from opencoca.system.files import atomic_write

SEARCHES = {
    "greedy": GenerationOptions(),
    "beam 2": GenerationOptions(num_beams=2, num_captions=2),
    "beam 4": GenerationOptions(num_beams=4, num_captions=4),
    "beam 8": GenerationOptions(num_beams=8, num_captions=8),
    "beam 4, length penalty 0": GenerationOptions(num_beams=4, num_captions=4, length_penalty=0.0),
    "beam 4, length penalty 2": GenerationOptions(num_beams=4, num_captions=4, length_penalty=2.0),
    "8 samples": GenerationOptions(temperature=0.7, num_captions=8),
}
RERANKED = ("beam 4", "beam 8", "8 samples")
WEIGHTS = tuple(step / 50 for step in range(51))
METRICS = ("bleu_1", "bleu_4", "rouge_l", "cider_d", "own_image_r1")
_ENCODE_BATCH, _GENERATE_BATCH = 32, 50

Candidates = list[tuple[GeneratedCaption, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--captions", required=True)
    parser.add_argument("--model", help="name or folder (default: the shipped one)")
    parser.add_argument("--work", default="runs/caption_scores", type=Path, help="where finished settings are kept")
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES), metavar="NAME")
    parser.add_argument("--out", type=Path, help="JSON file; a table of the same name with .md goes beside it")
    arguments = parser.parse_args()

    pipeline = opencoca.load(arguments.model)
    source = with_captions(open_source(arguments.images, arguments.captions))
    references = [source.captions(index) for index in range(len(source))]
    tokens, embeds = encoded(pipeline, source, arguments.work)
    found = {name: captions_of(pipeline, tokens, name, arguments.work) for name in arguments.searches}
    result = scores_of(found, references, embeds, pipeline.model.logit_scale.item())
    result |= {"num_images": len(source), "seconds": seconds_of(arguments.work), "machine": machine()}
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(table(result), encoding="utf-8")


def encoded(pipeline: opencoca.Pipeline, source: Any, work: Path) -> tuple[Tensor, Tensor]:
    """Image tokens (I, Q, D) and embeddings (I, E) of the whole set."""
    path = work / "encoded.pt"
    if not path.exists():
        started = time.perf_counter()
        batches = list(encode_images(pipeline, source, _ENCODE_BATCH, progress=True))
        content = {"tokens": torch.cat([b.tokens for b in batches]), "embed": torch.cat([b.embed for b in batches])}
        assert len(content["embed"]) == len(source), "some images cannot be read; take them out of the table"
        save(path, content | {"seconds": time.perf_counter() - started})
    content = torch.load(path)
    return content["tokens"], content["embed"]


def captions_of(pipeline: opencoca.Pipeline, tokens: Tensor, name: str, work: Path) -> Candidates:
    """The candidates of every image by one search, best first, with their text embeddings."""
    path = work / f"{name.replace(' ', '_').replace(',', '')}.pt"
    if not path.exists():
        started = time.perf_counter()
        found: Candidates = []
        for start in tqdm(range(0, len(tokens), _GENERATE_BATCH), desc=name):
            part = tokens[start : start + _GENERATE_BATCH]
            seeds = range(start, start + len(part))
            found += generate(
                pipeline.model,
                part,
                pipeline.tokenizer,
                SEARCHES[name],
                image_seeds=seeds,
                with_text_embed=True,
                session=pipeline.session,
            )
        rows = [[caption.__dict__ for caption in own] for own in found]
        save(path, {"captions": rows, "seconds": time.perf_counter() - started})
    return [tuple(GeneratedCaption(**caption) for caption in own) for own in torch.load(path)["captions"]]


def save(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        torch.save(content, partial)


def seconds_of(work: Path) -> dict[str, float]:
    return {path.stem: round(torch.load(path)["seconds"], 1) for path in sorted(work.glob("*.pt"))}


def scores_of(
    found: dict[str, Candidates], references: list[tuple[str, ...]], embeds: Tensor, logit_scale: float
) -> dict[str, Any]:
    half = len(references) // 2
    parts = {"first half": range(half), "second half": range(half, len(references)), "all": range(len(references))}
    tables = {name: Table(candidates, references, embeds, logit_scale) for name, candidates in found.items()}
    rows: dict[str, dict[str, Any]] = {}
    rows |= {name: {part: own.scores(own.best(0), at) for part, at in parts.items()} for name, own in tables.items()}
    sources = [name for name in RERANKED if name in tables]
    curves = {name: [tables[name].mean_cider(weight, parts["first half"]) for weight in WEIGHTS] for name in sources}
    chosen = {name: WEIGHTS[curve.index(max(curve))] for name, curve in curves.items()}
    together = [sum(values) for values in zip(*curves.values(), strict=True)]
    default = WEIGHTS[together.index(max(together))] if sources else DEFAULT_RERANK_WEIGHT
    for name in sources:
        own = tables[name]
        for title, weight in (("mean log-probability", 0.0), ("both", default), ("similarity alone", 1.0)):
            picked = own.reranked(weight)
            label = f"{name}, reranked: {title}"
            rows[label] = {part: own.scores(picked, at) for part, at in parts.items()} | {"weight": weight}
        picks = own.best_possible()
        rows[f"{name}, the best candidate by its CIDEr-D"] = {p: own.scores(picks, at) for p, at in parts.items()}
    held_out = {
        name: {str(weight): tables[name].mean_cider(weight, parts["second half"]) for weight in WEIGHTS[::5]}
        for name in sources
    }
    return {
        "default_weight": default,
        "best_weight_of_source": chosen,
        "cider_d_of_weight_first_half": {
            name: dict(zip(map(str, WEIGHTS[::5]), curve[::5], strict=True)) for name, curve in curves.items()
        },
        "cider_d_of_weight_second_half": held_out,
        "settings": {name: asdict(SEARCHES[name]) for name in found},
        "scores": rows,
    }


class Table:
    """The candidates of one search with all that choosing among them needs."""

    def __init__(
        self, candidates: Candidates, references: list[tuple[str, ...]], embeds: Tensor, logit_scale: float
    ) -> None:
        self.candidates, self.references, self.embeds, self.logit_scale = candidates, references, embeds, logit_scale
        texts = {(i, k): caption.text for i, own in enumerate(candidates) for k, caption in enumerate(own)}
        # Every image counted as often as it has candidates: relative frequencies, and so CIDEr-D, stay as they are.
        assert len({len(own) for own in candidates}) == 1, "images have different numbers of candidates"
        self.cider = caption_scores(texts, {key: references[key[0]] for key in texts}).cider_d_of_image

    def best(self, place: int) -> list[int]:
        return [place] * len(self.candidates)

    def best_possible(self) -> list[int]:
        return [max(range(len(own)), key=lambda k, i=i: self.cider[i, k]) for i, own in enumerate(self.candidates)]

    def reranked(self, weight: float) -> list[int]:
        """The place of each image's best candidate by the mixed score."""
        return [int(self._mixed(i, weight).argmax()) for i in range(len(self.candidates))]

    def _mixed(self, image: int, weight: float) -> Tensor:
        own = self.candidates[image]
        log_probs = torch.tensor([caption.log_probability for caption in own])
        lengths = torch.tensor([float(caption.length) for caption in own])
        similarities = torch.stack([caption.text_embed for caption in own]) @ self.embeds[image]  # pyright: ignore
        return mixed_scores(log_probs, lengths, similarities, self.logit_scale, weight)

    def mean_cider(self, weight: float, images: range) -> float:
        """CIDEr-D of the captions picked for these images; n-grams are weighed by the references of the whole set."""
        picked = [int(self._mixed(i, weight).argmax()) for i in images]
        return sum(self.cider[i, k] for i, k in zip(images, picked, strict=True)) / len(images)

    def scores(self, picked: list[int], images: range) -> dict[str, float]:
        captions = {i: self.candidates[i][picked[i]] for i in images}
        scores = caption_scores(
            {i: caption.text for i, caption in captions.items()}, {i: self.references[i] for i in captions}
        )
        embeds = torch.stack([caption.text_embed for caption in captions.values()])  # pyright: ignore
        nearest = (embeds @ self.embeds.T).argmax(dim=1)
        found = (nearest == torch.tensor(list(images))).float().mean().item()
        lengths = [caption.length for caption in captions.values()]
        values = {name: getattr(scores, name) for name in METRICS if hasattr(scores, name)}
        return values | {"own_image_r1": found, "mean_tokens": sum(lengths) / len(lengths)}


_TEXT = """# Captions by every way of decoding, and reranked

{images} images; `python benchmarks/caption_scores.py --images DIR/images --captions DIR/val.csv --out
results/captioning.json`; commit {commit} and the files of its day; {date}; {cpu}, {threads} thread, torch {torch},
float32, other work on the machine.

Scores times 100. Own image R@1: how often the caption's embedding is nearer to its own image's than to any other's of
the whole set. Reranked: of all candidates the one with the highest (1 - weight) x mean log-probability of a token +
weight x logit scale x cosine; the weight in brackets. A weight of 0 is the mean log-probability alone. The default
weight, {default:g}, is the one of 51 with the highest CIDEr-D on the first half of the images, summed over the
candidates of {sources}; the second half had no part in the choice. The similarity is the model's own, so that own
image R@1 is what reranking aims at; CIDEr-D and the other scores know nothing of it. The best candidate by its
CIDEr-D is picked with the references' help: a bound for any ranking.
"""


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    names = ("BLEU-1", "BLEU-4", "ROUGE-L", "CIDEr-D", "own image R@1")
    curves = result["cider_d_of_weight_second_half"]
    keys = {key: result["machine"][key] for key in ("commit", "date", "cpu", "threads", "torch")}
    default = result["default_weight"]
    text = [_TEXT.format(images=result["num_images"], default=default, sources=", ".join(curves), **keys)]
    for part in ("second half", "all"):
        text += [f"\n## {part.capitalize()}\n", f"| decoding | {' | '.join(names)} | tokens |", "|---" * 7 + "|"]
        for name, row in result["scores"].items():
            weight = f" ({row['weight']:g})" if "weight" in row else ""
            values = " | ".join(f"{100 * row[part][metric]:.1f}" for metric in METRICS)
            text.append(f"| {name}{weight} | {values} | {row[part]['mean_tokens']:.1f} |")
    weights = list(next(iter(curves.values()), {}))
    text += ["\n## CIDEr-D by the weight of similarity: first half / second half\n"]
    text += ["N-grams are weighed by the references of the whole set here, so that the halves differ from the above.\n"]
    text += [f"| candidates | best on the first half | {' | '.join(weights)} |", "|---" * (len(weights) + 2) + "|"]
    for name, second in curves.items():
        first = result["cider_d_of_weight_first_half"][name]
        values = " | ".join(f"{100 * first[weight]:.1f} / {100 * second[weight]:.1f}" for weight in weights)
        text.append(f"| {name} | {result['best_weight_of_source'][name]:g} | {values} |")
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
