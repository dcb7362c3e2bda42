"""Loads a Pipeline by name: shipped and published models, hub repositories, folders, other projects' checkpoints."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opencoca.data.transforms import PreprocessConfig
from opencoca.inference.pipeline import Pipeline
from opencoca.inference.preprocess import Preprocess
from opencoca.model.config import CoCaConfig
from opencoca.store import published_models
from opencoca.store.hub import HubError, NotInRepositoryError, download
from opencoca.store.interop.open_clip import load_open_clip
from opencoca.store.interop.open_clip_config import config_from_open_clip, preprocess_from_open_clip
from opencoca.store.interop.open_clip_options import read_config
from opencoca.store.model_card import read_scores
from opencoca.store.model_folder import (
    CONFIG_FILE,
    FORMAT,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    LoadedModel,
    load_model_folder,
    read_description,
    stored_format,
)
from opencoca.store.published_models import PublishedModel, find_published, published_in
from opencoca.system.devices import as_dtype, choose_device
from opencoca.system.names import did_you_mean, suggests_options
from opencoca.tokenizer import Tokenizer

HUB_PREFIX, OPEN_CLIP_PREFIX = "hf-hub:", "open_clip:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class ShippedModel:
    """A model that comes with the package."""

    name: str
    folder: Path
    description: str
    licence: str

    @property
    def scores(self) -> dict[str, float]:
        """What it scores, in percent, as its folder says: the figures of its model card."""
        return read_scores(self.folder)

    @property
    def languages(self) -> tuple[str, ...]:
        """Those that it writes and reads, the default first; () for a model of one, and for one that is not there."""
        return Tokenizer.load(self.folder).languages if (self.folder / TOKENIZER_FILE).is_file() else ()


_MODELS_FOLDER = Path(__file__).parents[1] / "assets" / "models"
DEFAULT_MODEL = "coca-flickr8k"
SHIPPED_MODELS: dict[str, ShippedModel] = {
    model.name: model
    for model in (
        ShippedModel(
            name="coca-flickr8k",
            folder=_MODELS_FOLDER / "coca-flickr8k",
            description="EfficientNet-Lite2 and a small text decoder, trained on the 6,000 photographs of Flickr8k",
            licence="Apache-2.0; the training photographs and captions are for research use (see its model card)",
        ),
    )
}


def available_models() -> tuple[ShippedModel, ...]:
    """The models that come with the package; `opencoca.store.published_models` has those that are downloaded."""
    return tuple(SHIPPED_MODELS.values())


@suggests_options
def load(
    name_or_path: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
    *,
    weights: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Pipeline:
    """Loads a model, ready for use.

    The default one is small. With a network, `load("coca_ViT-L-14@mscoco_finetuned_laion2b_s13b_b90k")` is far better.

    Args:
        name_or_path: one of

            - the name of a shipped model (None: the default one);
            - the name of a published model, with `weights`: `load("coca_ViT-L-14", weights="laion2b_s13b_b90k")`, or
              both in one word, "coca_ViT-L-14@laion2b_s13b_b90k"; downloaded when first used;
            - "hf-hub:organisation/name" or "hf-hub:organisation/name@revision": a repository of the Hugging Face Hub
              that holds a model of this project's format, or one of open_clip's;
            - "open_clip:NAME", with `checkpoint`: open_clip's architecture of that name, or its configuration as a
              JSON file, with weights from a file;
            - a folder with config.json, model.safetensors and tokenizer.json, such as that of a training run.

            A name comes before a folder of the same name: write `./name` for the folder.
        device: "auto" (CUDA if there is one, else the CPU), or any device of PyTorch's.
        dtype: floating-point type of the computation, such as "bfloat16" or torch.bfloat16; None for float32.
        weights: which weights of a published model (`opencoca models` lists them).
        checkpoint: file with the weights for "open_clip:NAME": .pt, .bin or .safetensors. No code in it is run.

    Raises:
        FileNotFoundError: there is no such model or file.
        ValueError: its files are damaged, or not of a CoCa; it cannot be downloaded (HubError); or the device or
            dtype is unknown or not there.
    """
    device, dtype = choose_device(device), as_dtype(dtype)
    loaded = load_model(name_or_path, device=device, dtype=dtype, weights=weights, checkpoint=checkpoint)
    name = str(name_or_path or DEFAULT_MODEL)
    name += f"@{weights}" if weights and "@" not in name else ""
    return Pipeline(loaded.model, loaded.tokenizer, Preprocess(loaded.preprocess), loaded.info, loaded.task, name=name)


def load_model(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Loads the parts that `load` makes a Pipeline of; dtype None keeps the stored type."""
    name = DEFAULT_MODEL if name_or_path is None else os.fspath(name_or_path)
    if name.startswith(OPEN_CLIP_PREFIX):
        architecture = name.removeprefix(OPEN_CLIP_PREFIX)
        if checkpoint is None or weights is not None:
            raise ValueError(f"{name} needs the file with its weights: give checkpoint=PATH (and no weights=)")
        return _load_open_clip(architecture, Path(checkpoint), device, dtype, {"architecture": architecture})
    if checkpoint is not None:
        raise ValueError(f"checkpoint= goes with a name such as 'open_clip:coca_ViT-L-14', not with {name!r}")
    if name.startswith(HUB_PREFIX):
        if weights is not None:
            raise ValueError(f"weights= goes with the name of a published model, not with {name!r}")
        return _load_from_hub(name.removeprefix(HUB_PREFIX), device, dtype)
    published = _as_published(name, weights)
    if published is not None:
        return _load_published(published, device, dtype)
    return load_model_folder(_as_folder(name), device, dtype)


class ModelDescription(NamedTuple):
    """What a model is, without its weights."""

    config: CoCaConfig
    preprocess: PreprocessConfig


def describe_model(name: str, *, weights: str | None = None, checkpoint: str | None = None) -> ModelDescription:
    """The architecture and preprocessing of what `load_model` would load; weights are read or downloaded only for
    models of the hub.

    Raises as `load_model` does.
    """
    architecture = name.removeprefix(OPEN_CLIP_PREFIX)
    published = None if name.startswith((OPEN_CLIP_PREFIX, HUB_PREFIX)) else _as_published(name, weights)
    if name.startswith(OPEN_CLIP_PREFIX) or published is not None:
        read = read_config(architecture if published is None else published.name)
        return ModelDescription(config_from_open_clip(read.model), preprocess_from_open_clip(read))
    if name.startswith(HUB_PREFIX):
        loaded = load_model(name, weights=weights, checkpoint=checkpoint)
        return ModelDescription(loaded.model.config, loaded.preprocess)
    return ModelDescription(*read_description(_as_folder(name)))


def _as_published(name: str, weights: str | None) -> PublishedModel | None:
    if name in SHIPPED_MODELS and weights is None:
        return None
    architecture, _, tag = name.partition("@")
    if tag and weights is not None and tag != weights:
        raise ValueError(f"the name asks for the weights {tag!r}, weights= for {weights!r}; give one of them")
    found = find_published(architecture, weights or tag or None)
    if found is None and weights is not None:
        known = ", ".join(sorted({model.name for model in published_models.PUBLISHED_MODELS}))
        raise ValueError(f"weights= goes with the name of a published model ({known}), not with {name!r}")
    return found


def _as_folder(name: str) -> Path:
    shipped = SHIPPED_MODELS.get(name)
    folder = shipped.folder if shipped else Path(name)
    if not folder.exists():
        if shipped:
            raise FileNotFoundError(
                f"the model {name!r} is missing from this installation ({folder}); install opencoca again"
            )
        published = [text for model in published_models.PUBLISHED_MODELS for text in (model.name, model.full_name)]
        raise FileNotFoundError(
            f"there is no model {name!r}: it is neither a folder nor the name of a shipped model "
            f"({', '.join(SHIPPED_MODELS)}) or a published one (`opencoca models` lists them)"
            + did_you_mean(name, [*SHIPPED_MODELS, *published])
        )
    return folder


def _load_published(published: PublishedModel, device: torch.device | str, dtype: torch.dtype | None) -> LoadedModel:
    file = download(published.repo_id, published.file_name, published.revision, published.sha256)
    source = {
        "architecture": published.name,
        "weights": published.weights,
        "repository": published.repo_id,
        "revision": _commit(file, published.revision),
        "licence": published.licence,
        "training_data": published.training_data,
    }
    return _load_open_clip(published.name, file, device, dtype, source)


def _load_from_hub(place: str, device: torch.device | str, dtype: torch.dtype | None) -> LoadedModel:
    """Loads a hub repository: one with a model folder of ours, or with open_clip's configuration and weights."""
    repo_id, _, revision = place.partition("@")
    revision = revision or "main"
    config = _download_if_there(repo_id, CONFIG_FILE, revision)
    if config is not None and stored_format(config) == FORMAT:
        commit = _commit(config, revision)
        for name in (TOKENIZER_FILE, WEIGHTS_FILE):
            download(repo_id, name, commit)
        return load_model_folder(config.parent, device, dtype)
    published = published_in(repo_id)
    config = _download_if_there(repo_id, OPEN_CLIP_CONFIG, revision)
    if config is None and published is None:
        raise HubError(
            f"{repo_id} holds no CoCa that can be read: it has neither a {CONFIG_FILE} of the format {FORMAT!r} nor an "
            f"{OPEN_CLIP_CONFIG}"
        )
    commit = revision if config is None else _commit(config, revision)
    file = next(filter(None, (_download_if_there(repo_id, name, commit) for name in OPEN_CLIP_WEIGHTS)), None)
    if file is None:
        raise HubError(f"{repo_id} holds no weights: neither {' nor '.join(OPEN_CLIP_WEIGHTS)}")
    architecture = str(config) if config is not None else published.name  # pyright: ignore[reportOptionalMemberAccess]
    source = {"repository": repo_id, "revision": _commit(file, commit)}
    return _load_open_clip(architecture, file, device, dtype, source)


def _download_if_there(repo_id: str, file_name: str, revision: str) -> Path | None:
    try:
        return download(repo_id, file_name, revision)
    except NotInRepositoryError:
        return None


def _commit(file: Path, revision: str) -> str:
    """The commit a file in the hub's cache belongs to: its folder's name there."""
    return file.parent.name if file.parent.parent.name == "snapshots" else revision


def _load_open_clip(
    architecture: str,
    checkpoint: Path,
    device: torch.device | str,
    dtype: torch.dtype | None,
    source: Mapping[str, Any],
) -> LoadedModel:
    model, tokenizer, preprocess = load_open_clip(architecture, checkpoint, dtype)
    return LoadedModel(model.to(device).eval(), tokenizer, preprocess, {"source": {"format": "open_clip", **source}})
