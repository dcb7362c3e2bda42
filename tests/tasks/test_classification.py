"""Classification: eight images are learned by heart, a stopped run continues to the bit, commands use the head."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import opencoca
from opencoca.cli import main
from opencoca.data import Batch
from opencoca.tasks import make_task
from opencoca.tasks.classification import Classification, ClassificationOptions
from opencoca.train import Recipe, load_recipe, train
from opencoca.train.trainer import Trainer
from train.helpers import Pairs, merged, read_lines, run_until_stopped, tiny_values, write_pairs

CLASSES = ("bird", "cat", "dog")
GROCERY = Path(__file__).parent / "grocery"
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return write_pairs(tmp_path_factory.mktemp("classes"), count=8)


@pytest.fixture(scope="module")
def labels(pairs: Pairs) -> Path:
    path = pairs.table.with_name("labels.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "label"))
        writer.writerows((name, CLASSES[number % 3]) for number, name in enumerate(pairs.captions))
    return path


def recipe_of(pairs: Pairs, labels: Path, output: Path, **changes: Any) -> Recipe:
    values = merged(tiny_values(pairs, output), {key.replace("__", "."): value for key, value in changes.items()})
    del values["val_max_new_tokens"]
    values["tokenizer"] = {"source": "clip"}
    data = {"train_captions": None, "val_captions": None, "train_labels": str(labels), "val_labels": str(labels)}
    values["data"] |= data | {"flip_probability": 0.0, "crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]}
    values["task"] = {"name": "classification"} | values.get("task", {})
    return load_recipe(values)


@pytest.fixture(scope="module")
def run(pairs: Pairs, labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "classes"
    return train(recipe_of(pairs, labels, output, epochs=25, validate_every_epochs=25))


def test_eight_images_are_learned_by_heart(run: Path) -> None:
    last = [line for line in read_lines(run) if line["kind"] == "validation"][-1]
    assert last["top1"] == last["mean_per_class"] == 1.0
    stored = json.loads((run / "config.json").read_text(encoding="utf-8"))
    assert stored["task"] == {"name": "classification", "classes": list(CLASSES)}
    confusion = json.loads((run / "val_confusion.json").read_text(encoding="utf-8"))
    assert confusion["counts"] == [[3, 0, 0], [0, 3, 0], [0, 0, 2]]
    assert (run / "report.html").stat().st_size > 10_000


def test_commands_use_the_head(run: Path, pairs: Pairs, labels: Path, capsys: Any, tmp_path: Path) -> None:
    first = pairs.images / "image0.png"
    assert main(["classify", str(first), "--model", str(run), "--top", "1"]) == 0
    assert capsys.readouterr().out.split("\t")[1].startswith("bird ")
    out = tmp_path / "scores.json"
    command = ["evaluate", "classification", "--model", str(run), "--images", str(pairs.images)]
    assert main([*command, "--labels", str(labels), "--out", str(out)]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["metrics"]["top1"] == 1.0
    assert found["per_class"] == dict.fromkeys(CLASSES, 1.0)


@pytest.mark.parametrize("command", ["quantize", "push"])
def test_the_classes_go_along_with_the_model(
    run: Path, pairs: Pairs, tmp_path: Path, capsys: Any, command: str
) -> None:
    out = tmp_path / "out"
    target = [str(out)] if command == "quantize" else ["somebody/classes", "--out", str(out)]
    assert main([command, str(run), *target]) == 0
    capsys.readouterr()
    assert main(["classify", str(pairs.images / "image0.png"), "--model", str(out), "--top", "1"]) == 0
    assert capsys.readouterr().out.split("\t")[1].startswith("bird ")


def test_a_model_without_a_head_says_so(pairs: Pairs, labels: Path, capsys: Any) -> None:
    command = ["evaluate", "classification", "--images", str(pairs.images), "--labels", str(labels)]
    assert main(command) == 2
    assert "zero-shot" in capsys.readouterr().err


@pytest.mark.parametrize("frozen_stages", [0, -1])
def test_a_stopped_run_continues_to_the_bit(
    pairs: Pairs, labels: Path, tmp_path: Path, frozen_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opencoca.train.trainer.write_report", lambda *_: None)
    changes = {"encoder__frozen_stages": frozen_stages, "encoder__cache_features": frozen_stages == -1}
    changes |= {"optimizer__ema_decay": 0.9, "task__label_smoothing": 0.1, "epochs": 3}
    whole = recipe_of(pairs, labels, tmp_path / "whole", **changes)
    train(whole)
    parts = recipe_of(pairs, labels, tmp_path / "parts", **changes)
    run_until_stopped(parts, steps=3)
    train(parts)
    assert read_lines(tmp_path / "parts") == read_lines(tmp_path / "whole")
    assert (tmp_path / "parts/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_only_the_encoder_and_the_head_are_trained(pairs: Pairs, labels: Path, tmp_path: Path) -> None:
    trainer = Trainer(recipe_of(pairs, labels, tmp_path / "run"))
    structure = trainer.model.structure()
    trained = {structure.part_of(name) for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == {"image_encoder", "task_head"}


def test_losses_are_those_of_the_formula() -> None:
    """Label smoothing and balanced weights, against the written-out formula in float64."""
    task = Classification(ClassificationOptions(label_smoothing=0.2, class_weights="balanced"), counts=counted(4, 1))
    logits = torch.randn(5, 2, dtype=torch.float64)
    targets = torch.tensor([0, 0, 0, 0, 1])
    batch = Batch(torch.arange(5), None, torch.zeros(0, 0).long(), torch.zeros(0, 0).bool(), targets)
    found = task.losses(None, type("O", (), {"own": (logits,)})(), batch)["classification"]  # pyright: ignore
    log_p = F.log_softmax(logits, dim=1)
    smooth = 0.8 * F.one_hot(targets, 2) + 0.1
    weights = torch.tensor([5 / (2 * 4), 5 / (2 * 1)], dtype=torch.float64)[targets]
    assert torch.allclose(found, -(weights[:, None] * smooth * log_p).sum())
    # Balanced weights average to 1 over the samples that they are made from.
    assert float(weights.mean()) == pytest.approx(1.0)


def counted(*numbers: int) -> Any:
    from collections import Counter

    return Counter({f"class {number}": count for number, count in enumerate(numbers)})


def test_mistakes_are_sentences(pairs: Pairs, labels: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least two"):
        make_task(ClassificationOptions(), None)
    other = tmp_path / "other.csv"
    other.write_text("image,label\nimage0.png,unicorn\n", encoding="utf-8")
    recipe = recipe_of(pairs, labels, tmp_path / "run")
    values = json.loads(json.dumps(recipe.to_dict()))
    values["data"]["val_labels"] = str(other)
    with pytest.raises(ValueError, match=r"image0\.png.*unicorn"):
        Trainer(load_recipe(values))


def test_it_can_be_planned(pairs: Pairs, labels: Path, tmp_path: Path, capsys: Any) -> None:
    """From a pretrained model too, whose vocabulary is the run's."""
    recipe = recipe_of(pairs, labels, tmp_path / "run").to_dict()
    for name, start in (("scratch", {}), ("finetuned", {"init_from": "coca-flickr8k", "model": {}, "tokenizer": {}})):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(json.loads(json.dumps(recipe)) | start), encoding="utf-8")
        assert main(["plan", str(path), "--device", "cpu"]) == 0
        assert "task head" in capsys.readouterr().out


def test_finetuning_takes_the_whole_model(run: Path, pairs: Pairs, tmp_path: Path) -> None:
    """Captions from a classifier's run: its weights are taken, its head is left, and captions can be trained."""
    values = tiny_values(pairs, tmp_path / "captions") | {"init_from": str(run), "max_steps": 1}
    del values["model"], values["size"], values["tokenizer"]
    trainer = Trainer(load_recipe(values))
    start = opencoca.load(run, "cpu").model.state_dict()
    ours = trainer.model.state_dict()
    assert all(torch.equal(value, start[name]) for name, value in ours.items())
    larger = load_recipe(values | {"model": {"image": {"image_size": [48, 48]}}, "output": str(tmp_path / "larger")})
    resized = Trainer(larger).model.state_dict()
    differing = [name for name in resized if resized[name].shape != start[name].shape]
    assert len(differing) == 1
    assert "pos_embed" in differing[0]


@pytest.mark.parametrize("recipe", ["classify_frozen", pytest.param("classify_finetuned", marks=pytest.mark.slow)])
def test_the_recipes_learn_photographs_of_groceries(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the shipped encoder, from six photographs of each of eight classes; chance is one in eight."""
    monkeypatch.setattr("opencoca.train.trainer.write_report", lambda *_: None)  # takes as long as the training
    out, run = tmp_path / "scores.json", tmp_path / "run"
    data = [f"--data.{part}_images={GROCERY / 'images'}" for part in ("train", "val")]
    data += [f"--data.train_labels={GROCERY / 'train.csv'}", f"--data.val_labels={GROCERY / 'test.csv'}"]
    short = ["--batch_size=16", "--epochs=5", "--encoder.cache_views=1", "--optimizer.warmup_steps=3"]
    short += ["--optimizer.ema_decay=0.7", "--validate_every_epochs=5"]
    assert main(["train", str(RECIPES / f"{recipe}.yaml"), f"--output={run}", *data, *short]) == 0
    test = ["--images", str(GROCERY / "images"), "--labels", str(GROCERY / "test.csv"), "--out", str(out)]
    assert main(["evaluate", "classification", "--model", str(run), *test]) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["counts"]["images"] == 32
    assert found["metrics"]["top1"] >= 0.6
