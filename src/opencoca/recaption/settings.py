"""The settings that a run's captions depend on; a run is continued only if they are the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from opencoca.data import SampleSource
from opencoca.inference.pipeline import Pipeline
from opencoca.recaption.captioner import Captioner
from opencoca.recaption.flags import FlagThresholds

Settings = dict[str, Any]


def run_settings(captioner: Captioner, source: SampleSource, thresholds: FlagThresholds, *, beside: bool) -> Settings:
    """Collects everything that two runs must share for their captions to be the same, as JSON can hold it."""
    from opencoca import __version__

    keys = (source.key(index) for index in range(len(source)))
    content = {
        "version": __version__,
        "weights": model_fingerprint(captioner.pipeline),
        "device": captioner.device.type,
        "dtype": str(captioner.pipeline.dtype).removeprefix("torch."),
        "images": len(source),
        "image_list": _digest(f"{len(key)}:{key}".encode("utf-8", "surrogateescape") for key in keys),
        **asdict(captioner.options),
        "rerank": captioner.rerank,
        "language": captioner.pipeline.tokenizer.language,
        "beside": beside,
        "thresholds": asdict(thresholds),
    }
    return json.loads(json.dumps(content))  # as the journal returns it, with lists instead of tuples


def model_fingerprint(pipeline: Pipeline) -> str:
    """Computes a SHA-256 over all weights, the configuration, the vocabulary and the preprocessing."""

    def parts() -> Iterable[bytes]:
        described = [pipeline.model.config.to_dict(), pipeline.preprocess.config.to_dict()]
        yield json.dumps(described, sort_keys=True).encode()
        yield pipeline.tokenizer.to_json().encode()
        for name, tensor in sorted(pipeline.model.state_dict().items()):
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return _digest(parts())


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def describe_changes(before: Settings, now: Settings) -> str | None:
    """Says what changed, in words; None if nothing did."""
    changes: list[str] = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name == "weights":
            changes.append("the model is a different one")
        elif name == "images":
            changes.append(f"there were {old:,} images and there are {new:,} now")
        elif name == "image_list":
            if before.get("images") == now.get("images"):
                changes.append("the list of images is different")
        elif name == "version":
            changes.append(f"it was opencoca {old} and is {new} now")
        else:
            changes.append(f"{name} was {_show(old)} and is {_show(new)} now")
    return "; ".join(changes) if changes else None


def _show(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
