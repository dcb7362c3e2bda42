"""The folder of a run: which recipe and which data it belongs to, so that two runs are never mixed."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opencoca.data.identity import DataIdentity
from opencoca.model.config import at_todays_places
from opencoca.system.devices import choose_precision
from opencoca.system.files import write_text
from opencoca.system.messages import brief, shown
from opencoca.system.process_lock import ProcessLock
from opencoca.tasks import TaskOptions
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
# Keys and whole sections that a run can be continued with: weights and optimizer state fit whatever they say.
_MAY_CONTINUE_WITH = (
    {"epochs", "max_steps", "batch_size", "accumulation_steps", "validate_every_epochs", "data", "safety"}
    | {f"task.{name}" for name in ("select_by", "max_new_tokens", "label_smoothing")}
    | {f"optimizer.{name}" for name in ("learning_rate", "learning_rates", "layer_decay", "weight_decay", "grad_clip")}
    | {f"optimizer.{name}" for name in ("warmup_steps", "decay", "decay_fraction", "final_lr_fraction")}
    | {"encoder.learning_rate", "seed"}
)
_SCHEDULE = frozenset({"epochs", "max_steps"})
_RECIPE, _RUN, _MODEL, _LOCK = "recipe.json", "run.json", "model.safetensors", ".lock"
# What people and their tools put into a folder before a run begins there.
_HARMLESS = (".log", ".out", ".err", ".yaml", ".yml", "logs")


_CHOOSE = "choose another --output or delete that folder"
_DAMAGED = "{} is damaged ({}); delete the folder to begin the run anew"
_LONGEST_MESSAGE = 290


class Change(NamedTuple):
    """A setting that differs between the stored run and the one that is asked for."""

    key: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.then, 24)} then, {shown(self.now, 24)} now"


@dataclass(frozen=True)
class RunData:
    """What a run is bound to besides its recipe: the identities of its samples, and the classes of its task."""

    train: DataIdentity
    validation: DataIdentity | None
    classes: list[str] | None

    def changes(self, stored: dict[str, Any]) -> list[str]:
        """What differs from a stored run, in words; nothing if the run began before its data were remembered."""
        found = []
        for name in ("train", "validation") if stored else ():
            then, own = stored.get(name), getattr(self, name)
            then = None if then is None else DataIdentity(*then)
            if then != own:
                counts = [identity.samples if identity else 0 for identity in (then, own)]
                what = "other names, captions or targets" if counts[0] == counts[1] else None
                found.append(f"{name}: " + (what or f"{counts[0]:,} samples then, {counts[1]:,} now"))
        return found


@dataclass(frozen=True)
class Progress:
    """Where a run that continues stands: steps done, and how many it has in all with the recipe that is asked for."""

    done: int
    total: int


class RunFolder:
    """A folder that holds one run, or will."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = ProcessLock(path / _LOCK)

    def check(self, continues: bool) -> None:
        """Raises ValueError if the folder holds what no run made, which a run would overwrite or be mixed with.

        NotADirectoryError: it is a file.
        """
        if continues or not self.path.exists():
            return
        if not self.path.is_dir():
            raise NotADirectoryError(f"{self._name} is a file; choose another --output, a folder")
        names = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        foreign = [name for name in names if Path(name).suffix.lower() not in _HARMLESS and name not in _HARMLESS]
        with contextlib.suppress(ValueError):  # a recipe.json that is none
            if self._stored_recipe():
                return
        if foreign:
            what = "a model" if _MODEL in foreign else shown(foreign[0], 60)
            raise ValueError(
                f"{self._name} holds {what} that no training run made; choose another --output, an empty folder or a "
                "new one"
            )

    def enter(self) -> None:
        """Makes the folder and takes its lock. Raises ValueError that names the process that works in it already."""
        self.path.mkdir(parents=True, exist_ok=True)
        if holder := self._lock.take():
            raise ValueError(
                f"{self._name} is in use by another training run, process {holder}; wait until it ends, stop it, or "
                "choose another --output"
            )

    def leave(self) -> None:
        """Gives the lock back."""
        self._lock.give_back()

    def remember(
        self, recipe: Recipe, device: torch.device, data: RunData, progress: Progress | None, changed: Sequence[str]
    ) -> Recipe:
        """Stores what the run is bound to, and returns the recipe with the precision that the run has.

        precision auto becomes what the run began with, or else what the device is made for.

        Args:
            progress: None if there is no checkpoint to continue from; else it must be one of this recipe and data.
            changed: keys that may differ all the same, as --continue-with names them.

        Raises ValueError, naming the keys, for another recipe or other data. Settings that the weights do not depend
        on may differ.
        """
        # A model without a checkpoint is that of a run that was killed early, or whose checkpoints were removed.
        is_bound = progress is not None or (self.path / _MODEL).is_file()
        stored, run = (self._stored_recipe(), self._stored_run()) if is_bound else (None, {})
        if recipe.precision == "auto" and stored is not None:
            recipe = replace(recipe, precision=stored.get("precision", "auto"))
        recipe = replace(recipe, precision=choose_precision(recipe.precision, device))
        ours = json.loads(json.dumps(recipe.to_dict()))
        changes: list[str] = []
        if changed:
            self._check_keys(changed, progress)
        if stored is not None:
            changes += self._check_recipe(_changes(stored, ours, type(recipe.task)()), changed)
        changes += self._check_data(data, run.get("data") or {}, changed)
        if changes and progress and progress.done >= progress.total:
            raise ValueError(
                f"the run in {self._name} has taken {progress.done:,} steps already, and ends after {progress.total:,} "
                "as it is asked for; give more epochs or max_steps"
            )
        phases = run.get("phases", [])
        if changes and progress:
            phases = [*phases, {"from_step": progress.done, "changes": changes}]
        content = {"data": asdict(data), "threads": torch.get_num_threads(), "phases": phases}
        write_text(self.path / _RECIPE, json.dumps(ours, indent=2))
        write_text(self.path / _RUN, json.dumps(content, indent=2))
        return recipe

    def threads(self) -> int | None:
        """The number of threads that the run in the folder has; None if there is no run yet."""
        if not (self.path / _RECIPE).is_file():
            return None
        return self._stored_run().get("threads") or torch.get_num_threads()

    @property
    def _name(self) -> str:
        return brief(self.path, 60)

    def _check_keys(self, changed: Sequence[str], progress: Progress | None) -> None:
        for key in changed:
            if not _covers(_MAY_CONTINUE_WITH | _MAY_CHANGE, key):
                raise ValueError(
                    f"a run cannot be continued with another {brief(key, 60)}; begin a new one from its weights, with "
                    f"init_from {self._name} and another --output"
                )
        if progress is None:
            raise ValueError(f"{self._name} holds no run to continue; name its folder by --output")

    def _check_recipe(self, changes: list[Change], changed: Sequence[str]) -> list[str]:
        """Returns the changes in words. Raises ValueError if one of them is not among the keys ``changed``."""
        refused = [change for change in changes if not _covers(changed, change.key)]
        if refused:
            first, more = refused[0], f" and {len(refused) - 1} more" if len(refused) > 1 else ""
            message = f"{self._name} holds a run of another recipe ({first}{more}); {_CHOOSE}"
            hint = f", or go on with --continue-with {first.key}={brief(first.now, 24)}"
            can_continue = all(_covers(_MAY_CONTINUE_WITH, change.key) for change in refused)
            raise ValueError(message + hint * (can_continue and len(message + hint) <= _LONGEST_MESSAGE))
        return [str(change) for change in changes]

    def _check_data(self, data: RunData, stored: dict[str, Any], changed: Sequence[str]) -> list[str]:
        """Returns the changes in words. Raises ValueError if there are any, and ``changed`` has no key of the data."""
        changes = data.changes(stored)
        if stored and stored.get("classes") != data.classes:
            raise ValueError(
                f"the classes of the data are not those of the run in {self._name}; put the old data back, or choose "
                "another --output"
            )
        if changes and not any(key.split(".")[0] == "data" for key in changed):
            raise ValueError(
                f"the data of the run in {self._name} have changed since it began ({'; '.join(changes)}): put the old "
                "ones back, choose another --output, or go on with the new ones by --continue-with data"
            )
        return changes

    def _stored_recipe(self) -> dict[str, Any] | None:
        path = self.path / _RECIPE
        if not path.is_file():
            return None
        try:
            stored = upgraded(json.loads(path.read_text(encoding="utf-8")))
            stored["model"] = at_todays_places(stored["model"])
            return stored
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ValueError(_DAMAGED.format(brief(path, 110), brief(error))) from error

    def _stored_run(self) -> dict[str, Any]:
        path = self.path / _RUN
        if not path.is_file():
            return {}
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            for part in ("train", "validation"):
                if part == "train" or stored["data"][part] is not None:
                    DataIdentity(*stored["data"][part])
            return stored | {"threads": int(stored["threads"]), "phases": list(stored["phases"])}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(_DAMAGED.format(brief(path, 110), brief(error))) from error


def _covers(keys: Sequence[str] | frozenset[str] | set[str], key: str) -> bool:
    """Whether one of the keys is this one or a section that it lies in."""
    return any(key == one or key.startswith(f"{one}.") for one in keys)


def _changes(stored: dict[str, Any], ours: dict[str, Any], task: TaskOptions) -> list[Change]:
    """What differs between a stored recipe and ours, and matters; task: its options by default."""
    defaults = json.loads(json.dumps(replace(Recipe(), task=task).to_dict()))
    return _differences(_with_defaults(stored, defaults), ours)


def _with_defaults(theirs: Any, defaults: Any) -> Any:
    """A stored recipe, to which settings that did not exist yet are added with their defaults, which change nothing."""
    if not (isinstance(theirs, dict) and isinstance(defaults, dict)):
        return theirs
    return defaults | {key: _with_defaults(value, defaults.get(key)) for key, value in theirs.items()}


def _differences(theirs: Any, ours: Any, key: str = "") -> list[Change]:
    """Every setting that differs and matters."""
    if key in _MAY_CHANGE:
        return []
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        return [d for k in keys for d in _differences(theirs.get(k), ours.get(k), f"{key}.{k}" if key else k)]
    return [] if _without_nulls(theirs) == _without_nulls(ours) else [Change(key, theirs, ours)]


def _without_nulls(value: Any) -> Any:
    """Of a list of sections, such as data.sources, those settings alone that have a value: newer ones are null."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part for part in value]
