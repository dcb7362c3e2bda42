"""What a run leaves behind, and what it says when it cannot begin."""

import json
import math
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from opencoca.data import open_source
from opencoca.tasks.pretraining import Pretraining, PretrainingOptions
from opencoca.train import train
from opencoca.train.report.metrics_log import MetricsLog, read_metrics
from opencoca.train.report.report import write_report
from opencoca.train.trainer import Trainer
from opencoca.train.validation import ValidationScores

from .helpers import TIME_KEYS, Pairs, read_state, read_tensors, run_until_stopped, tiny_recipe, write_pairs

TRAIN_KEYS = {"kind", "step", "epoch", "loss", "contrastive_loss", "caption_loss", "grad_norm", "logit_scale", "lr"}
VALIDATION_KEYS = {"kind", "step", "epoch", "loss", "contrastive_loss", "caption_loss", "cider_d", "rouge_l"}
VALIDATION_KEYS |= {f"bleu_{n}" for n in range(1, 5)}
VALIDATION_KEYS |= {f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}


class TestMetrics:
    def test_lines_are_json_with_their_keys(self, pairs: Pairs, output: Path) -> None:
        train(tiny_recipe(pairs, output, epochs=3, log_every_steps=4))
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        captions = [line for line in lines if line["kind"] == "captions"]
        lines = [line for line in lines if line["kind"] != "captions"]
        assert [line["step"] for line in captions] == [2, 4, 6]
        assert all(line["captions"].keys() == captions[0]["captions"].keys() for line in captions)
        assert len(captions[0]["captions"]) == 8
        assert [(line["kind"], line["step"]) for line in lines] == [
            ("validation", 2),
            ("train", 4),
            ("validation", 4),
            ("train", 6),
            ("validation", 6),
        ]
        for line in lines:
            expected = TRAIN_KEYS | TIME_KEYS if line["kind"] == "train" else VALIDATION_KEYS
            assert expected <= line.keys()
            assert line["epoch"] == line["step"] / 2
            assert all(math.isfinite(value) for key, value in line.items() if key != "kind")
        assert all(line[key] > 0 for line in lines if line["kind"] == "train" for key in TIME_KEYS)

    def test_a_line_is_the_mean_of_its_steps(self, pairs: Pairs, tmp_path: Path) -> None:
        train(tiny_recipe(pairs, tmp_path / "each", epochs=3, log_every_steps=1))
        train(tiny_recipe(pairs, tmp_path / "three", epochs=3, log_every_steps=3))
        each, three = (
            [line for line in read_metrics(tmp_path / name / "metrics.jsonl") if line["kind"] == "train"]
            for name in ("each", "three")
        )
        assert len(each) == 6
        assert len(three) == 2
        for index, line in enumerate(three):
            steps = each[3 * index : 3 * index + 3]
            for key in ("loss", "caption_loss", "contrastive_loss", "grad_norm"):
                assert line[key] == pytest.approx(sum(step[key] for step in steps) / 3)
            assert line["lr"] == steps[-1]["lr"]

    def test_lines_after_the_checkpoint_and_broken_ones_are_dropped(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text('{"kind": "train", "step": 1}\n{"kind": "train", "step": 5}\n{"kind": "tr', encoding="utf-8")
        log = MetricsLog(path, resume_step=3)
        log.write("train", 4, {"loss": 0.5})
        assert [line["step"] for line in read_metrics(path)] == [1, 4]


class TestBestWeights:
    @pytest.mark.parametrize(
        ("select_by", "expected"),
        [("score", 100 * (0.5 + 0.25 + 0.75)), ("cider_d", 0.5), ("mean_r1", 0.5), ("loss", -3)],
    )
    def test_selection(self, select_by: str, expected: float) -> None:
        scores = {"loss": 3.0, "cider_d": 0.5, "image_to_text_r1": 0.25, "text_to_image_r1": 0.75}
        task = Pretraining(PretrainingOptions(select_by=select_by))  # pyright: ignore
        assert task.selection(scores) == pytest.approx(expected)

    def test_the_folder_keeps_the_best_not_the_last(self, pairs: Pairs, output: Path) -> None:
        trainer = Trainer(tiny_recipe(pairs, output, epochs=4))
        scores, weights = iter([0.1, 0.4, 0.3, 0.4]), []

        def validator(model: Any) -> ValidationScores:
            weights.append(model.image_proj.weight.detach().clone())
            score = next(scores)
            return ValidationScores({"cider_d": score, "loss": 1.0}, score, {"image0.png": f"number {len(weights)}"})

        trainer.validator = validator  # pyright: ignore
        trainer.run()
        kept, _ = read_tensors(output / "model.safetensors")
        assert torch.equal(kept["image_proj.weight"], weights[1])
        assert json.loads((output / "val_captions.json").read_text(encoding="utf-8")) == {"image0.png": "number 2"}
        info = json.loads((output / "config.json").read_text(encoding="utf-8"))["info"]
        assert (info["step"], info["validation"]) == (4, {"cider_d": 0.4, "loss": 1.0})

    def test_the_average_is_what_is_validated_and_kept(self, pairs: Pairs, output: Path) -> None:
        trainer = Trainer(tiny_recipe(pairs, output, epochs=1, optimizer__ema_decay=0.9))
        trainer.run()
        kept, _ = read_tensors(output / "model.safetensors")
        last, _ = read_state(output)
        assert torch.equal(kept["image_proj.weight"], last["average/image_proj.weight"])
        assert not torch.equal(kept["image_proj.weight"], last["model/image_proj.weight"])

    def test_without_validation_the_last_is_kept(self, pairs: Pairs, output: Path) -> None:
        train(tiny_recipe(pairs, output, data__val_images=None, data__val_captions=None, max_steps=3))
        kept, _ = read_tensors(output / "model.safetensors")
        last, _ = read_state(output)
        assert torch.equal(kept["image_proj.weight"], last["model/image_proj.weight"])
        assert json.loads((output / "config.json").read_text(encoding="utf-8"))["info"]["step"] == 3

    def test_max_steps_ends_within_an_epoch(self, pairs: Pairs, output: Path) -> None:
        train(tiny_recipe(pairs, output, max_steps=3, epochs=9, log_every_steps=2))
        steps = [(line["kind"], line["step"]) for line in read_metrics(output / "metrics.jsonl")]
        steps = [(kind, step) for kind, step in steps if kind != "captions"]
        assert steps == [("train", 2), ("validation", 2), ("train", 3), ("validation", 3)]


class TestReport:
    @pytest.mark.parametrize("validates", [True, False])
    def test_is_drawn_with_whatever_there_is(self, pairs: Pairs, tmp_path: Path, validates: bool) -> None:
        log = MetricsLog(tmp_path / "metrics.jsonl", 0)
        log.write("train", 1, {"loss": 2.0, "caption_loss": 1.0})
        if validates:
            log.write("validation", 1, {"caption_loss": 1.5, "cider_d": 0.3, "bleu_4": 0.1})
        source = open_source(pairs.images, pairs.table) if validates else None
        captions = {"image1.png": "costs $5 and $\\frac{10$ or ^_{ more", "image2.png": "a dog"} if validates else {}
        (tmp_path / "val_captions.json").write_text(json.dumps(captions))
        path = write_report(tmp_path, source, "a $title_ of 3$ steps")
        with Image.open(path) as picture:
            assert 800 < picture.width < 3000
            assert 200 < picture.height < 3000

    def test_leaves_the_users_plots_alone(self, tmp_path: Path) -> None:
        import matplotlib
        from matplotlib import pyplot

        backend = matplotlib.get_backend()
        pyplot.figure()
        figures = pyplot.get_fignums()
        MetricsLog(tmp_path / "metrics.jsonl", 0).write("train", 1, {"loss": 1.0})
        write_report(tmp_path, None, "nothing")
        assert matplotlib.get_backend() == backend
        assert pyplot.get_fignums() == figures
        pyplot.close()


class TestTensorBoard:
    def test_without_the_package_is_an_error_that_names_the_extra(
        self, pairs: Pairs, output: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(ValueError, match=r"opencoca\[tensorboard\]"):
            train(tiny_recipe(pairs, output, tensorboard=True))

    def test_gets_the_same_numbers(self, pairs: Pairs, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        written: list[tuple[str, float, int]] = []
        opened: list[Any] = []

        class SummaryWriter:
            def __init__(self, folder: Path, purge_step: int):
                opened.append((folder, purge_step))

            def add_scalar(self, name: str, value: float, step: int) -> None:
                written.append((name, value, step))

            def add_text(self, name: str, value: str, step: int) -> None:
                written.append((name, value, step))

            def close(self) -> None:
                opened.append("closed")

        module = types.ModuleType("torch.utils.tensorboard")
        module.SummaryWriter = SummaryWriter  # pyright: ignore
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
        recipe = tiny_recipe(pairs, output, tensorboard=True, log_every_steps=1)
        run_until_stopped(recipe, steps=1)
        train(recipe)
        folder = output / "tensorboard"
        assert opened == [(folder, 1), "closed", (folder, 2), "closed"]
        lines = read_metrics(output / "metrics.jsonl")
        expected = []
        for line in lines:
            values = {name: value for name, value in line.items() if name not in ("kind", "step")}
            values |= values.pop("captions", {})
            expected += [(f"{line['kind']}/{name}", value, line["step"]) for name, value in values.items()]
        assert written == expected


class TestWhatCannotBegin:
    def message(self, recipe: Any, kind: type[Exception] = ValueError) -> str:
        with pytest.raises(kind) as error:
            Trainer(recipe).run()
        message = str(error.value)
        assert "\n" not in message
        assert "Traceback" not in message
        return message

    def test_no_training_data_named(self, pairs: Pairs, output: Path) -> None:
        recipe = tiny_recipe(pairs, output, data__train_images="", data__train_captions=None)
        assert "data.train_images" in self.message(recipe)

    def test_no_such_folder(self, pairs: Pairs, output: Path) -> None:
        recipe = tiny_recipe(pairs, output, data__train_images="/nowhere/at/all")
        assert "/nowhere/at/all" in self.message(recipe, FileNotFoundError)

    def test_no_such_table(self, pairs: Pairs, output: Path) -> None:
        recipe = tiny_recipe(pairs, output, data__val_captions="/nowhere.csv")
        assert "/nowhere.csv" in self.message(recipe, FileNotFoundError)

    def test_images_that_are_missing(self, output: Path, tmp_path: Path) -> None:
        pairs = write_pairs(tmp_path / "data", count=5)
        (pairs.images / "image2.png").unlink()
        message = self.message(tiny_recipe(pairs, output), FileNotFoundError)
        assert "image2.png" in message
        assert "1 of the 5" in message

    def test_a_table_without_the_column(self, output: Path, tmp_path: Path) -> None:
        pairs = write_pairs(tmp_path / "data", count=5)
        pairs.table.write_text("file,text\nimage0.png,a dog\n", encoding="utf-8")
        message = self.message(tiny_recipe(pairs, output))
        assert "'image'" in message
        assert str(pairs.table) in message

    def test_an_empty_folder(self, pairs: Pairs, output: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        recipe = tiny_recipe(pairs, output, data__train_images=str(tmp_path / "empty"), data__train_captions=None)
        assert "holds no images" in self.message(recipe)

    def test_images_without_captions(self, pairs: Pairs, output: Path) -> None:
        assert "caption" in self.message(tiny_recipe(pairs, output, data__train_captions=None))

    def test_validation_images_without_captions(self, pairs: Pairs, output: Path) -> None:
        assert "data.val_captions" in self.message(tiny_recipe(pairs, output, data__val_captions=None))

    def test_only_broken_images(self, output: Path, tmp_path: Path) -> None:
        pairs = write_pairs(tmp_path / "data", count=5)
        for path in pairs.images.iterdir():
            path.write_text("words", encoding="utf-8")
        assert "image" in self.message(tiny_recipe(pairs, output))

    @pytest.mark.parametrize("device", ["cuda", "tpu9", "cuda:99"])
    def test_no_such_device(self, pairs: Pairs, output: Path, device: str) -> None:
        if device == "cuda" and torch.cuda.is_available():
            device = "cuda:98"
        assert device.split(":")[0] in self.message(tiny_recipe(pairs, output, device=device))

    def test_imagenet_weights_for_another_encoder(self, pairs: Pairs, output: Path) -> None:
        assert "imagenet" in self.message(tiny_recipe(pairs, output, encoder__init="imagenet"))

    def test_an_encoder_that_does_not_fit(self, pairs: Pairs, tmp_path: Path) -> None:
        train(tiny_recipe(pairs, tmp_path / "first", epochs=1))
        recipe = tiny_recipe(pairs, tmp_path / "second", encoder__init=str(tmp_path / "first"), model__image__width=64)
        assert "does not fit" in self.message(recipe)

    def test_a_file_where_the_folder_should_be(self, pairs: Pairs, output: Path) -> None:
        recipe = tiny_recipe(pairs, output)
        output.write_text("in the way", encoding="utf-8")
        self.message(recipe, OSError)
        assert output.read_text(encoding="utf-8") == "in the way"


def test_an_encoder_may_come_from_another_run(pairs: Pairs, tmp_path: Path) -> None:
    first = train(tiny_recipe(pairs, tmp_path / "first", epochs=1))
    trainer = Trainer(tiny_recipe(pairs, tmp_path / "second", seed=5, encoder__init=str(first)))
    tensors, _ = read_tensors(first / "model.safetensors")
    for name, tensor in trainer.model.image_encoder.state_dict().items():
        assert torch.equal(tensor, tensors[f"image_encoder.{name}"])
    assert not torch.equal(trainer.model.image_proj.weight, tensors["image_proj.weight"])


def test_fewer_images_than_a_batch(pairs: Pairs, output: Path) -> None:
    train(tiny_recipe(pairs, output, batch_size=32, accumulation_steps=16))
    assert [line["step"] for line in read_metrics(output / "metrics.jsonl") if line["kind"] == "validation"] == [1, 2]


def test_a_thread_of_its_own_will_do(pairs: Pairs, output: Path) -> None:
    results: list[Path] = []
    thread = threading.Thread(target=lambda: results.append(train(tiny_recipe(pairs, output, epochs=1))))
    thread.start()
    thread.join()
    assert results == [output]
