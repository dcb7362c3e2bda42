"""The run's model: the weights that scored best so far."""

import json
from pathlib import Path
from typing import Any

from opencoca.data import PreprocessConfig
from opencoca.model.coca import CoCa
from opencoca.store.model_folder import save_model_folder
from opencoca.system.files import atomic_write
from opencoca.tasks.task import Task
from opencoca.tokenizer import Tokenizer
from opencoca.train.recipe.recipe import Recipe
from opencoca.train.validation import ValidationScores

TEXTS_FILE = "val_captions.json"


class BestModel:
    """Keeps a model in the run's folder, which is then a model folder, if it scores better than all before."""

    def __init__(self, recipe: Recipe, task: Task, folder: Path, tokenizer: Tokenizer, preprocess: PreprocessConfig):
        self.recipe, self.task, self.folder = recipe, task, folder
        self.tokenizer, self.preprocess = tokenizer, preprocess

    def consider(self, model: CoCa, result: ValidationScores | None, progress: dict[str, Any]) -> None:
        """Keeps this model if it is better than ``progress["best"]``, which, with ``best_step``, it then changes.

        result: None without validation; then a later model is the better one.
        """
        step = progress["step"]
        score = result.selection if result is not None else float(step)
        if progress["best"] is None or score > progress["best"]:
            self._save(model, result, step)
            progress["best"], progress["best_step"] = score, step

    def _save(self, model: CoCa, result: ValidationScores | None, step: int) -> None:
        info: dict[str, Any] = {"recipe": self.recipe.to_dict(), "step": step}
        if result is not None:
            info["validation"] = result.values
            self._write(TEXTS_FILE, result.texts)
            for name, content in result.kept.items():
                self._write(f"val_{name}.json", content)
        save_model_folder(self.folder, model, self.tokenizer, self.preprocess, task=self.task.stored(), info=info)

    def _write(self, name: str, content: Any) -> None:
        with atomic_write(self.folder / name) as partial:
            partial.write_text(json.dumps(content, indent=0), encoding="utf-8")


def read_texts(folder: Path) -> dict[str, Any]:
    """What a run's model says of the validation images, by image; nothing if it was never asked."""
    path = folder / TEXTS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
