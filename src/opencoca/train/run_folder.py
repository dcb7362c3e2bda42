"""What a run's folder remembers of its recipe, so that two runs are never mixed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from opencoca.model.config import at_todays_places
from opencoca.system.devices import choose_precision
from opencoca.system.files import atomic_write
from opencoca.train.recipe.load import upgraded
from opencoca.train.recipe.recipe import Recipe

# Keys and whole sections that say where and how fast a run goes, not what comes out of it. ``size`` only fills in
# ``model``, which is compared. What safety says of steps that went wrong changes none that were taken.
_MAY_CHANGE = frozenset(
    {"output", "size", "device", "checkpoint_minutes", "log_every_steps", "report_images", "tensorboard"}
    | {"data.num_workers", "data.index_dir", "data.cache_dir", "data.cache_gb", "data.max_bad_share"}
    | {"grad_cache_steps", "encoder.cache_dir", "distributed", "checkpoint"}
    | {"safety.non_finite", "safety.non_finite_limit", "safety.hang_minutes"}
)
_SCHEDULE = frozenset({"epochs", "max_steps"})


def remember_recipe(folder: Path, recipe: Recipe, device: torch.device, continues: bool) -> Recipe:
    """Writes recipe.json and returns what it holds; continues: a checkpoint is there, which must be of the same recipe.

    precision auto becomes what the run began with, or else what the device is made for.
    Raises ValueError, naming the keys, if it is of another one. Settings that the weights do not depend on may differ.
    """
    path = folder / "recipe.json"
    stored = _read(path) if continues and path.is_file() else None
    if recipe.precision == "auto" and stored is not None:
        recipe = replace(recipe, precision=stored.get("precision", "auto"))
    recipe = replace(recipe, precision=choose_precision(recipe.precision, device))
    ours = json.loads(json.dumps(recipe.to_dict()))
    if stored is not None:
        defaults = replace(Recipe(), task=type(recipe.task)())
        differing = _differences(_with_defaults(stored, json.loads(json.dumps(defaults.to_dict()))), ours)
        if differing:
            shown = ", ".join(f"{key}: {then!r} then, {now!r} now" for key, then, now in differing[:5])
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            hint = "the learning rate's schedule spans the whole run, so " if differing[0][0] in _SCHEDULE else ""
            raise ValueError(
                f"{folder} holds a run of another recipe ({shown}{more}); {hint}choose another --output, or delete "
                "that folder"
            )
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(ours, indent=2), encoding="utf-8")
    return recipe


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = upgraded(json.loads(path.read_text(encoding="utf-8")))
        stored["model"] = at_todays_places(stored["model"])
        return stored
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete the folder to begin the run anew") from error


def _with_defaults(theirs: Any, defaults: Any) -> Any:
    """A stored recipe, to which settings that did not exist yet are added with their defaults, which change nothing."""
    if not (isinstance(theirs, dict) and isinstance(defaults, dict)):
        return theirs
    return defaults | {key: _with_defaults(value, defaults.get(key)) for key, value in theirs.items()}


def _differences(theirs: Any, ours: Any, key: str = "") -> list[tuple[str, Any, Any]]:
    """(key, their value, our value) of every setting that differs and matters, by key."""
    if key in _MAY_CHANGE:
        return []
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        return [d for k in keys for d in _differences(theirs.get(k), ours.get(k), f"{key}.{k}" if key else k)]
    return [] if theirs == ours else [(key, theirs, ours)]
