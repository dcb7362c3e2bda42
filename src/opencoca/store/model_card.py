"""Writes a model as a repository: its folder, and a README.md that says what it is and what it scores."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
import yaml

from opencoca.store.model_folder import LoadedModel, save_model_folder
from opencoca.system.files import write_json, write_text

CARD_FILE = "README.md"
SCORES_FILE = "scores.json"
_TASKS = {
    "captioning": ("image-to-text", "Captioning"),
    "retrieval": ("image-text-retrieval", "Retrieval"),
    "zero-shot": ("zero-shot-image-classification", "Zero-shot classification"),
}
_RAW_SCORES = ("loss", "rank", "num_", "seconds", "perplexity")  # parts of the names of scores that are no fractions


@dataclass(frozen=True)
class Result:
    """Scores of one evaluation, as `opencoca evaluate ... --out FILE` writes them.

    task: such as captioning. data: the files it was run on. counts: the numbers of images and texts.
    """

    task: str
    metrics: Mapping[str, float]
    data: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    version: str = ""

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> "Result":
        """Reads such a file; raises ValueError if it is none."""
        try:
            stored = json.loads(Path(file).read_text(encoding="utf-8"))
            metrics = {str(name): float(value) for name, value in stored["metrics"].items()}
            data, counts = dict(stored.get("data", {})), dict(stored.get("counts", {}))
            return cls(str(stored["task"]), metrics, data, counts, str(stored.get("opencoca_version", "")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{file} holds no scores ({type(error).__name__}: {error}); give a file that "
                "`opencoca evaluate ... --out FILE` wrote"
            ) from error


def write_scores(folder: str | os.PathLike[str], dataset: str, results: Sequence[Result]) -> None:
    """Stores what a model scores on a data set in its folder, where `read_scores` finds it."""
    metrics = {name: value for result in results for name, value in result.metrics.items()}
    write_json(Path(folder) / SCORES_FILE, {"dataset": dataset, "metrics": metrics})


def read_scores(folder: str | os.PathLike[str]) -> dict[str, float]:
    """The scores stored in a model's folder, such as flickr8k_cider_d, in percent; empty if there are none."""
    file = Path(folder) / SCORES_FILE
    if not file.is_file():
        return {}
    stored = json.loads(file.read_text(encoding="utf-8"))
    return {
        f"{stored['dataset']}_{name}": round(readable_score(name, value), 2)
        for name, value in stored["metrics"].items()
    }


def write_repository(
    folder: str | os.PathLike[str],
    loaded: LoadedModel,
    repo_id: str,
    *,
    licence: str,
    results: Sequence[Result] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a repository for the Hugging Face Hub: the model folder and its card.

    Absolute paths in the model's info, such as those of a recipe, are shortened to their last two parts: the rest
    describes a machine, not the model.

    Args:
        licence: the hub's short name of the licence, such as "apache-2.0".
        results: the evaluations that the card reports.
        dtype: floating-point type of the stored weights; None keeps the model's.

    Raises:
        ValueError: a weight is not finite in `dtype`.
        WriteError: a file cannot be written.
    """
    info, parts = _without_paths(loaded.info), (loaded.model, loaded.tokenizer, loaded.preprocess)
    save_model_folder(folder, *parts, dtype=dtype, info=info, task=loaded.task)
    write_text(Path(folder) / CARD_FILE, model_card(loaded, repo_id, licence=licence, results=results))


def model_card(loaded: LoadedModel, repo_id: str, *, licence: str, results: Sequence[Result] = ()) -> str:
    """Returns the README.md of a model's repository: metadata for the hub, use, architecture, training, scores."""
    metadata = _metadata(repo_id, licence, results)
    languages = loaded.tokenizer.languages
    if languages:
        metadata["language"] = list(languages)
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---",
        f"# {repo_id.split('/')[-1]}",
        "A CoCa (Contrastive Captioner): one model that captions, classifies, embeds and finds images.",
        "## Use\n\n" + _USE.format(repo_id=repo_id) + _languages(languages),
        "## Model\n\n" + _table(("part", "what"), _architecture(loaded)),
        "## Origin\n\n" + _origin(loaded.info),
        "## Scores\n\n" + _scores(results),
    ]
    return "\n\n".join(parts) + "\n"


_USE = """```
pip install opencoca
opencoca caption photo.jpg --model hf-hub:{repo_id}
```

```python
import opencoca

pipeline = opencoca.load("hf-hub:{repo_id}")
pipeline.caption("photo.jpg")
pipeline.classify("photo.jpg", ["a cat", "a rocket"])
```"""


def _languages(languages: Sequence[str]) -> str:
    if not languages:
        return ""
    return (
        f"\n\nLanguages: {', '.join(languages)}. Captions are written, and texts read, in {languages[0]}, unless "
        f'another is chosen: `--language {languages[-1]}`, or `language="{languages[-1]}"` in Python.'
    )


def _metadata(repo_id: str, licence: str, results: Sequence[Result]) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "license": licence,
        "library_name": "opencoca",
        "pipeline_tag": "image-to-text",
        "tags": ["coca", "image-captioning", "zero-shot-image-classification", "image-text-retrieval"],
    }
    if results:
        entries = [_index_entry(result) for result in results]
        metadata["model-index"] = [{"name": repo_id.split("/")[-1], "results": entries}]
    return metadata


def _index_entry(result: Result) -> dict[str, Any]:
    kind, name = _TASKS.get(result.task, (result.task, result.task))
    data = _data_name(result)
    return {
        "task": {"type": kind, "name": name},
        "dataset": {"type": data.lower().replace(" ", "-"), "name": data},
        "metrics": [
            {"type": metric, "name": metric.replace("_", " "), "value": round(readable_score(metric, value), 2)}
            for metric, value in result.metrics.items()
        ],
    }


def _architecture(loaded: LoadedModel) -> list[tuple[str, str]]:
    config, preprocess = loaded.model.config, loaded.preprocess
    image, pooler, text = config.image, config.pooler, config.text
    sizes = f" of depth {image.depth}, width {image.width}" if image.name == "vit" else ""
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    height, width = preprocess.image_size
    return [
        ("parameters", f"{parameters / 1e6:,.1f}M"),
        ("image encoder", f"{image.name}{sizes}"),
        ("images", f"{height} x {width} pixels, {preprocess.resize_mode}"),
        ("pooler", f"{pooler.arrangement}, {pooler.num_queries} queries"),
        (
            "text decoder",
            f"{text.unimodal_depth} unimodal and {text.multimodal_depth} multimodal layers of width {text.width}",
        ),
        ("vocabulary", f"{loaded.tokenizer.vocab_size:,} tokens, texts of up to {text.context_length}"),
        ("embeddings", f"{config.embed_size} numbers"),
    ]


def _origin(info: Mapping[str, Any]) -> str:
    source = info.get("source")
    if isinstance(source, Mapping):
        rows = [(str(name).replace("_", " "), str(value)) for name, value in source.items()]
        return "Converted from another project's weights.\n\n" + _table(("source", ""), rows)
    if "step" in info:
        return f"Trained with OpenCoCa, {info['step']} steps; the recipe is in config.json under `info`."
    return "Not stated; config.json may say more under `info`."


def _scores(results: Sequence[Result]) -> str:
    if not results:
        return "None were given. `opencoca evaluate` measures them."
    parts = []
    for result in results:
        images = result.counts.get("images")
        where = f"{_data_name(result)}{f', {images:,} images' if isinstance(images, int) else ''}"
        rows = [(name, f"{readable_score(name, value):.4g}") for name, value in result.metrics.items()]
        title = _TASKS.get(result.task, ("", result.task))[1]
        parts.append(f"{title} on {where}; fractions in percent.\n\n{_table(('metric', 'score'), rows)}")
    return "\n\n".join(parts)


def _data_name(result: Result) -> str:
    for name in ("captions", "labels", "images"):
        if value := result.data.get(name):
            return "/".join(Path(str(value)).parts[-2:])
    return "unnamed data"


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_paths(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(entry) for entry in value]
    if isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).is_absolute()):
        return "/".join(PureWindowsPath(value).parts[-2:])
    return value


def readable_score(name: str, value: float) -> float:
    """A score as tables show it: fractions of 1 in percent, losses, ranks and counts as they are."""
    return value if any(part in name for part in _RAW_SCORES) else 100 * value


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in (head, ("---", "---"), *rows))
