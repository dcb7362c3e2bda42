"""The run's model: the weights that scored best so far."""

import json
from pathlib import Path
from typing import Any

from opencoca.data import PreprocessConfig
from opencoca.model.coca import CoCa
from opencoca.store.model_folder import save_model_folder
from opencoca.system.files import atomic_write
from opencoca.tokenizer import Tokenizer
from opencoca.train.recipe.recipe import Recipe
from opencoca.train.validation import ValidationScores

_CAPTIONS_FILE = "val_captions.json"


class BestModel:
    """Keeps a model in the run's folder, which is then a model folder, if it scores better than all before."""

    def __init__(self, recipe: Recipe, folder: Path, tokenizer: Tokenizer, preprocess: PreprocessConfig):
        self.recipe, self.folder, self.tokenizer, self.preprocess = recipe, folder, tokenizer, preprocess

    def consider(self, model: CoCa, result: ValidationScores | None, progress: dict[str, Any]) -> None:
        """Keeps this model if it is better than ``progress["best"]``, which, with ``best_step``, it then changes.

        result: None without validation; then a later model is the better one.
        """
        step = progress["step"]
        score = result.selection(self.recipe.select_by) if result is not None else float(step)
        if progress["best"] is None or score > progress["best"]:
            self._save(model, result, step)
            progress["best"], progress["best_step"] = score, step

    def captions(self) -> dict[str, Any]:
        """What the kept model says of the validation images, by image; nothing if they were never captioned."""
        path = self.folder / _CAPTIONS_FILE
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _save(self, model: CoCa, result: ValidationScores | None, step: int) -> None:
        info: dict[str, Any] = {"recipe": self.recipe.to_dict(), "step": step}
        if result is not None:
            info["validation"] = result.scores
            with atomic_write(self.folder / _CAPTIONS_FILE) as partial:
                partial.write_text(json.dumps(result.captions, indent=0), encoding="utf-8")
        save_model_folder(self.folder, model, self.tokenizer, self.preprocess, info=info)
