"""ONNX graphs in ONNX Runtime against the model, the folder's script against the pipeline, and the command."""

import json
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

import opencoca
from cli_helpers import save_tiny_model, write_colours
from opencoca.cli import main
from opencoca.data import PreprocessConfig
from opencoca.export.onnx import as_float32, export_onnx
from opencoca.export.onnx_check import OnnxModel, check_onnx
from opencoca.store.model_folder import save_model_folder
from opencoca.tokenizer import train_tokenizer

PHOTOS = sorted((Path(__file__).parents[2] / "demo" / "photos").glob("*.jpg"))
FILES = ["README.md", "caption.py", "config.json"]
FILES += ["decoder_step.onnx", "image_encoder.onnx", "text_encoder.onnx", "tokenizer.json"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny model of two languages, and what the command made of it; the shipped model is one of one language."""
    root = tmp_path_factory.mktemp("onnx")
    model, out = save_tiny_model(root / "model", languages=("en", "zh")), root / "exported"
    assert main(["export", "onnx", str(model), str(out), "--no-check"]) == 0
    return model, out


def run_script(folder: Path, photos: list[Path]) -> list[str]:
    """What the folder's script prints for photographs, without any module of this project."""
    command = [sys.executable, "-I", str(folder / "caption.py"), *map(str, photos)]
    printed = subprocess.run(command, capture_output=True, check=True).stdout.decode("utf-8")
    return [line.split("\t", 1)[1] for line in printed.split("\n")[:-1]]  # captions may hold other ends of lines


def test_the_folder_holds_all_that_captioning_takes(folders):
    assert sorted(file.name for file in folders[1].iterdir()) == FILES
    config = json.loads((folders[1] / "config.json").read_text())
    for name, graph in config["graphs"].items():
        session = onnxruntime.InferenceSession(folders[1] / name)
        assert {node.name: node.shape for node in session.get_inputs()} == {
            name: found["shape"] for name, found in graph["inputs"].items()
        }
        assert [node.name for node in session.get_outputs()] == graph["outputs"]


def test_graphs_equal_the_model(folders):
    report = check_onnx(opencoca.load(folders[0]), folders[1])
    assert {found.output for found in report.differences} == {"image_tokens", "image_embed", "text_embed", "logits"}
    assert report.num_captions == 2
    assert report.passed(1e-5)


@pytest.mark.parametrize("changed", ["image_pooling", "unimodal_decoder", "multimodal_decoder", "lm_head"])
def test_the_check_finds_a_changed_weight(folders, changed):
    pipeline = opencoca.load(folders[0])
    with torch.no_grad():
        *_, last = getattr(pipeline.model, changed).parameters()
        last.mul_(1.5).add_(0.01)
    assert not check_onnx(pipeline, folders[1]).passed()


def test_nan_does_not_pass(folders):
    pipeline = opencoca.load(folders[0])
    with torch.no_grad():
        pipeline.model.image_pooling.poolers.caption_pooler.norm.bias.fill_(torch.nan)
    assert not check_onnx(pipeline, folders[1]).passed()


def test_the_script_captions_as_the_pipeline(folders, tmp_path):
    images = sorted(write_colours(tmp_path).iterdir())
    captions = opencoca.load(folders[0]).caption(images)
    assert len(set(captions)) > 1
    assert run_script(folders[1], images) == [caption.replace("\n", " ") for caption in captions]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_any_batch_and_length(folders, batch_size):
    graphs, model = OnnxModel(folders[1]), opencoca.load(folders[0]).model
    for length in (1, 2, 24):
        ids = torch.randint(0, model.config.text.vocab_size, (batch_size, length))
        mask = torch.ones_like(ids, dtype=torch.bool)
        with torch.inference_mode():
            expected = model.encode_text(ids, mask).embed
        torch.testing.assert_close(graphs.encode_text(ids, mask), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        {"hidden_id": 0, "hide_next": True, "multimodal_num_heads": 2},
        {"positions": "rotary", "cls_position": "after_padding", "num_kv_heads": 1, "block": "parallel"},
    ],
)
def test_other_kinds_of_model(make_model, tmp_path, text):
    """Those of open_clip's weights and of lucidrains', whose pooler shares one key-value head too."""
    tokenizer = train_tokenizer(["a dog"], 259, min_frequency=1)
    pooler = {"arrangement": "shared", "num_kv_heads": 1, "norm_queries": True}
    model = make_model(pooler=pooler, vocab_size=tokenizer.vocab_size, **text)
    save_model_folder(tmp_path / "model", model, tokenizer, PreprocessConfig((12, 12)))
    pipeline = opencoca.load(tmp_path / "model")
    export_onnx(pipeline, tmp_path / "out")
    assert check_onnx(pipeline, tmp_path / "out").passed()


@pytest.mark.slow
def test_shipped_model_on_photographs(tmp_path, capsys):
    assert main(["export", "onnx", "coca-flickr8k", str(tmp_path), "--photos", *map(str, PHOTOS)]) == 0
    assert f"{len(PHOTOS)} of {len(PHOTOS)}" in capsys.readouterr().out
    assert run_script(tmp_path, PHOTOS) == opencoca.load().caption(PHOTOS)


def test_the_command_prints_differences_and_fails_on_large_ones(folders, monkeypatch, capsys):
    monkeypatch.setattr("opencoca.export.onnx.export_onnx", lambda *_: [folders[1] / "config.json"])
    assert main(["export", "onnx", str(folders[0]), str(folders[1]), "--overwrite"]) == 0
    assert "image_embed, photographs" in capsys.readouterr().out
    assert main(["export", "onnx", str(folders[0]), str(folders[1]), "--overwrite", "--tolerance", "1e-12"]) == 1
    assert "differ from the model by more than 1e-12" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(folders, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["export", "onnx", str(folders[0]), str(tmp_path / "out")]) == 2
    assert "pip install 'opencoca[onnx]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_graphs_are_float32_whatever_the_model_is(folders):
    model = opencoca.load(folders[0], dtype="bfloat16").model
    assert {parameter.dtype for parameter in as_float32(model).parameters()} == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_captions_begin_with_the_first_language(folders):
    decoding = json.loads((folders[1] / "config.json").read_text())["decoding"]
    assert decoding["prompt_ids"] == [decoding["bos_id"], 3]
    assert {3, 4} <= set(decoding["suppressed_ids"])
