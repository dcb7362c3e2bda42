"""`opencoca models`: lists the models that have a name, and says which of them are on this machine."""

import argparse
import json
from typing import Any

from opencoca.cli.common import add_command

_SCORE_NAMES = {
    "imagenet_top1": "ImageNet zero-shot",
    "coco_text_to_image_r1": "COCO text-to-image R@1",
    "coco_image_to_text_r1": "image-to-text R@1",
    "coco_bleu_4": "COCO BLEU-4",
    "coco_cider": "COCO CIDEr",
    "nocaps_cider": "NoCaps CIDEr",
    "flickr8k_text_to_image_r1": "Flickr8k text-to-image R@1",
    "flickr8k_image_to_text_r1": "image-to-text R@1",
    "flickr8k_cider_d": "CIDEr-D",
}


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "models",
        run_models,
        "List the models that --model knows by name.",
        example="opencoca models",
        more="Instead of a name, --model also takes the folder of a model or of a training run, and\n"
        "hf-hub:ORGANISATION/NAME for a repository of the Hugging Face Hub.",
    )
    parser.add_argument("--json", action="store_true", help="print all facts as a JSON object")


def run_models(arguments: argparse.Namespace) -> int:
    listing = {"shipped": _shipped(), "published": _published()}
    if arguments.json:
        print(json.dumps(listing, indent=2, ensure_ascii=False))
        return 0
    print("In this installation:")
    for model in listing["shipped"]:
        place = f"{model['size_bytes'] / 1e6:.0f} MB" if model["size_bytes"] else "not in this installation"
        print(f"\n  {model['name']} ({place}{', the default' if model['default'] else ''})")
        languages = f"languages: {', '.join(model['languages'])}" if model["languages"] else ""
        _print_facts(model["description"], languages, _scores_text(model["scores"]), f"licence: {model['licence']}")
    print("\nPublished by LAION, downloaded when first used:")
    for model in listing["published"]:
        state = "downloaded" if model["file"] else "not downloaded"
        print(f"\n  {model['name']}@{model['weights']} ({model['size_bytes'] / 1e9:.2f} GB, {state})")
        parameters = f"{model['num_parameters'] / 1e6:.0f}M parameters, trained on {model['training_data']}"
        place = f"licence: {model['licence']}, huggingface.co/{model['repository']}"
        _print_facts(parameters, model["note"], _scores_text(model["scores"]), place)
    return 0


def _print_facts(*lines: str) -> None:
    for line in filter(None, lines):
        print(f"    {line}")


def _scores_text(scores: dict[str, float]) -> str:
    """The scores that have a title, in the titles' order; --json has them all."""
    known = [f"{title} {scores[name]:.1f}" for name, title in _SCORE_NAMES.items() if name in scores]
    return f"scores: {', '.join(known)}" if known else ""


def _shipped() -> list[dict[str, Any]]:
    from opencoca.inference.loading import DEFAULT_MODEL, available_models
    from opencoca.store.model_folder import WEIGHTS_FILE

    found = []
    for model in available_models():
        weights = model.folder / WEIGHTS_FILE
        size = {"size_bytes": weights.stat().st_size if weights.is_file() else None}
        facts = {"default": model.name == DEFAULT_MODEL, "scores": model.scores, "languages": model.languages}
        found.append({**vars(model), **facts, **size, "folder": str(model.folder)})
    return found


def _published() -> list[dict[str, Any]]:
    from opencoca.store.hub import find_downloaded
    from opencoca.store.published_models import PUBLISHED_MODELS

    found = []
    for model in PUBLISHED_MODELS:
        file = find_downloaded(model.repo_id, model.file_name, model.revision)
        facts = {**vars(model), "scores": dict(model.scores), "file": None if file is None else str(file)}
        found.append({"repository": facts.pop("repo_id"), **facts})
    return found
