"""Configurations, names and files of open_clip's CoCa, without open_clip; test_open_clip_peers compares the numbers."""

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opencoca.cli import main
from opencoca.data.transforms import CLIP_MEAN, CLIP_STD, PreprocessConfig
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.store.interop.open_clip import (
    config_from_open_clip,
    config_to_open_clip,
    convert_state_dict,
    export_open_clip,
    load_open_clip,
    preprocess_from_open_clip,
    preprocess_to_open_clip,
    read_config,
)
from opencoca.store.interop.open_clip_options import CONFIGS, OpenClipConfig

SIZES = {"context_length": 9, "vocab_size": 49_408, "width": 8, "heads": 2, "layers": 1}
OPTIONS: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {
        "image_size": 16,
        "patch_size": 8,
        "width": 12,
        "head_width": 6,
        "layers": 1,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "attn_pooler_queries": 3,
        "output_tokens": True,
    },
    "text_cfg": {**SIZES, "embed_cls": True, "output_tokens": True},
    "multimodal_cfg": dict(SIZES),
    "custom_text": True,
}


def changed(**values: Any) -> dict[str, Any]:
    """The options with some of them set: section__name=value."""
    options = copy.deepcopy(OPTIONS)
    for path, value in values.items():
        section, _, name = path.rpartition("__")
        (options[section] if section else options)[name] = value
    return options


@pytest.fixture(scope="module")
def their_weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = CoCa(config_from_open_clip(OPTIONS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return export_open_clip(model).state_dict


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    (tmp_path / "mine.json").write_text(json.dumps(OPTIONS))
    return tmp_path / "mine.json"


# --- configurations ---


@pytest.mark.parametrize(("name", "millions"), [("coca_ViT-B-32", 254), ("coca_ViT-L-14", 638)])
def test_published_models_have_the_published_number_of_parameters(name: str, millions: int):
    with torch.device("meta"):
        model = CoCa(config_from_open_clip(CONFIGS[name]))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("name", list(CONFIGS))
def test_options_come_back_out_of_a_configuration(name: str):
    config = config_from_open_clip(CONFIGS[name])
    assert config_from_open_clip(config_to_open_clip(config)) == config


@pytest.mark.parametrize(
    "values",
    [
        {"vision_cfg__mlp_ratio": 2.7, "text_cfg__mlp_ratio": 1.9},
        {"vision_cfg__image_size": [16, 40]},
        {"vision_cfg__attentional_pool": "cascade", "vision_cfg__width": 8, "vision_cfg__head_width": 4},
        {"vision_cfg__attentional_pool": False, "vision_cfg__width": 8, "vision_cfg__head_width": 4, "embed_dim": 6},
        {"text_cfg__correct_cls_mask": True, "text_cfg__pad_id": 4, "quick_gelu": True, "multimodal_cfg__heads": 4},
        {"vision_cfg__no_ln_pre": True, "vision_cfg__ls_init_value": 0.1},
        {"text_cfg__ls_init_value": 0.1, "multimodal_cfg__ls_init_value": 0.1, "init_logit_scale": 1.25},
    ],
    ids=str,
)
def test_any_supported_options_come_back(values: dict):
    config = config_from_open_clip(changed(**values))
    again = config_from_open_clip(config_to_open_clip(config))
    assert again.initial_temperature == pytest.approx(config.initial_temperature)
    assert replace(again, initial_temperature=config.initial_temperature) == config
    assert CoCaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


UNSUPPORTED = {
    "vision_cfg.timm_model_name": {"vision_cfg__timm_model_name": "resnet50"},
    "vision_cfg.layers": {"vision_cfg__layers": [3, 4, 6, 3]},
    "vision_cfg.pool_type": {"vision_cfg__pool_type": "avg"},
    "vision_cfg.attentional_pool": {"vision_cfg__attentional_pool": "sideways"},
    "vision_cfg.qk_norm": {"vision_cfg__qk_norm": True},
    "vision_cfg.norm_kwargs": {"vision_cfg__norm_kwargs": {"eps": 1e-6}},
    "vision_cfg.output_tokens": {"vision_cfg__output_tokens": False},
    "vision_cfg.final_ln_after_pool": {"vision_cfg__final_ln_after_pool": True},
    "vision_cfg.width": {"vision_cfg__width": "wide"},
    "vision_cfg.patch_size": {"vision_cfg__patch_size": [14, 14]},
    "vision_cfg.image_size": {"vision_cfg__image_size": [1, 2, 3]},
    "vision_cfg.invented": {"vision_cfg__invented": 1},
    "text_cfg.hf_model_name": {"text_cfg__hf_model_name": "roberta-base"},
    "text_cfg.hf_tokenizer_name": {"text_cfg__hf_tokenizer_name": "roberta-base"},
    "text_cfg.tokenizer_kwargs": {"text_cfg__tokenizer_kwargs": {"clean": "canonicalize"}},
    "text_cfg.embed_cls": {"text_cfg__embed_cls": False},
    "text_cfg.no_causal_mask": {"text_cfg__no_causal_mask": True},
    "text_cfg.proj_bias": {"text_cfg__proj_bias": True},
    "text_cfg.proj_type": {"text_cfg__proj_type": "none"},
    "text_cfg.scale_fc": {"text_cfg__scale_fc": True},
    "text_cfg.heads": {"text_cfg__heads": True},
    "multimodal_cfg.width": {"multimodal_cfg__width": 16},
    "multimodal_cfg.context_length": {"multimodal_cfg__context_length": 8},
    "multimodal_cfg.invented": {"multimodal_cfg__invented": 1},
    "ls_init_value": {"text_cfg__ls_init_value": 0.1},
    "embed_dim": {"embed_dim": 16},
    "init_logit_bias": {"init_logit_bias": -10},
    "init_logit_scale": {"init_logit_scale": -1e9},
    "invented": {"invented": 1},
    "text_cfg": {"text_cfg": 3},
}


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_an_unsupported_option_is_named(option: str):
    with pytest.raises(ValueError, match=rf"open_clip's option {option}\b") as caught:
        config_from_open_clip(changed(**UNSUPPORTED[option]))
    assert "\n" not in str(caught.value)


def test_a_clip_is_no_coca():
    options = {name: value for name, value in OPTIONS.items() if name != "multimodal_cfg"}
    with pytest.raises(ValueError, match="multimodal_cfg is missing: this is the configuration of a CLIP"):
        config_from_open_clip(options)


def test_what_open_clip_ignores_is_ignored():
    ignored = changed(
        multimodal_cfg__n_queries=3,
        multimodal_cfg__attn_pooler_heads=5,
        multimodal_cfg__vocab_size=7,
        multimodal_cfg__mlp_ratio=2,
        text_cfg__pool_type="last",
        vision_cfg__timm_pool="avg",
        vision_cfg__final_ln_after_pool=False,
    )
    assert config_from_open_clip(ignored) == config_from_open_clip(OPTIONS)


def test_settings_of_training_are_told():
    with pytest.warns(UserWarning, match=r"vision_cfg.patch_dropout = 0.5 drops patches in training"):
        assert config_from_open_clip(changed(vision_cfg__patch_dropout=0.5)) == config_from_open_clip(OPTIONS)


def test_configurations_from_files(tmp_path: Path, config_file: Path):
    assert read_config(config_file) == OpenClipConfig("mine", OPTIONS)
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPTIONS, "preprocess_cfg": {"size": 16}}))
    assert read_config(folder) == OpenClipConfig("repository", OPTIONS, {"size": 16})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is damaged: it is not JSON"),
        ("[" * 100_000, "is damaged: it is not JSON"),
        ("[1]", "it has no vision_cfg"),
        ('{"model": 1}', "it has no vision_cfg"),
        (" " * 1_000_001, "more than 1,000,000 bytes"),
    ],
    ids=["cut", "deep", "list", "another", "long"],
)
def test_damaged_configuration_files(tmp_path: Path, content: str, sentence: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_config(tmp_path / "config.json")


def test_unknown_names():
    with pytest.raises(FileNotFoundError, match=r"no open_clip model 'coca_ViT-X'.*known: coca_ViT-B-32"):
        read_config("coca_ViT-X")


# --- preprocessing ---


def test_preprocessing_comes_back():
    default = preprocess_from_open_clip(OpenClipConfig("x", OPTIONS))
    assert default == PreprocessConfig((16, 16), CLIP_MEAN, CLIP_STD, "crop")
    for preprocess in (default, PreprocessConfig((24, 32), (0.5, 0.5, 0.5), (0.2, 0.3, 0.4), "squash")):
        stored = json.loads(json.dumps(preprocess_to_open_clip(preprocess)))
        assert preprocess_from_open_clip(OpenClipConfig("x", OPTIONS, stored)) == preprocess


@pytest.mark.parametrize(
    ("name", "value"), [("interpolation", "bilinear"), ("resize_mode", "longest"), ("mode", "L"), ("invented", 1)]
)
def test_unsupported_preprocessing_is_named(name: str, value: object):
    with pytest.raises(ValueError, match=f"preprocess_cfg.{name} = {value!r} is not supported"):
        preprocess_from_open_clip(OpenClipConfig("x", OPTIONS, {name: value}))
    with pytest.raises(ValueError, match="resized by 'pad'"):
        preprocess_to_open_clip(PreprocessConfig(resize_mode="pad"))


# --- weights ---


def test_weights_from_every_kind_of_file_are_the_same(tmp_path: Path, config_file: Path, their_weights):
    torch.save(their_weights, tmp_path / "a.bin")
    torch.save({"epoch": 1, "state_dict": {f"module.{n}": t for n, t in their_weights.items()}}, tmp_path / "b.pt")
    save_file(their_weights, tmp_path / "c.safetensors")
    for name in ("a.bin", "b.pt", "c.safetensors"):
        model, tokenizer, preprocess = load_open_clip(config_file, tmp_path / name)
        assert not model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert tokenizer.vocab_size == 49_408
        assert preprocess.image_size == (16, 16)
        exported = export_open_clip(model).state_dict
        assert exported.keys() == their_weights.keys()
        assert all(exported[key].numpy().tobytes() == their_weights[key].numpy().tobytes() for key in exported)


def test_types_of_stored_weights(tmp_path: Path, config_file: Path, their_weights):
    torch.save({name: tensor.half() for name, tensor in their_weights.items()}, tmp_path / "half.pt")
    for dtype, expected in ((torch.float32, torch.float32), (None, torch.float16), (torch.float64, torch.float64)):
        model = load_open_clip(config_file, tmp_path / "half.pt", dtype).model
        assert {p.dtype for name, p in model.named_parameters() if name != "log_logit_scale"} == {expected}


def test_a_temperature_beyond_the_usual_limit_is_kept(tmp_path: Path, config_file: Path, their_weights):
    for shape in ((), (1,)):
        torch.save({**their_weights, "logit_scale": torch.full(shape, 5.0)}, tmp_path / "cold.pt")
        model = load_open_clip(config_file, tmp_path / "cold.pt").model
        assert model.logit_scale.item() == pytest.approx(torch.tensor(5.0).exp().item(), rel=1e-6)


PROJECTION = "text_decoder.text_projection"
DAMAGE = {
    "missing": (lambda t: t.pop(PROJECTION), rf"1 missing \({PROJECTION}\)"),
    "unknown": (lambda t: t.update(extra=torch.zeros(1)), r"1 not part of the model \(extra\)"),
    "shape": (lambda t: t.update({"text.cls_emb": torch.zeros(9)}), r"text.cls_emb \(9,\) instead of \(8,\)"),
    "huge": (lambda t: t.update({"text.cls_emb": torch.zeros(1).expand(10**12)}), "1 of another shape"),
    "integers": (lambda t: t.update({"text.cls_emb": torch.zeros(8).long()}), r"1 of another type \(text.cls_emb\)"),
    "NaN": (lambda t: t["visual.proj"].fill_(float("nan")), r"1 not finite \(visual.proj\)"),
    "infinite": (lambda t: t["visual.proj"][0].fill_(float("inf")), r"1 not finite \(visual.proj\)"),
    "all": (
        lambda t: t.clear() or t.update(x=torch.zeros(1)),
        r"\d+ missing \(.*, \.\.\.\); 1 not part of the model \(x\)",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_weights_are_named_at_once_and_nothing_is_written(
    tmp_path: Path, config_file: Path, their_weights, kind: str, capsys: pytest.CaptureFixture[str]
):
    damage, sentence = DAMAGE[kind]
    tensors = {name: tensor.clone() for name, tensor in their_weights.items()}
    damage(tensors)
    with torch.device("meta"):
        model = CoCa(config_from_open_clip(OPTIONS))
    with pytest.raises(ValueError, match=sentence):
        convert_state_dict(tensors, model, "these")
    torch.save(tensors, tmp_path / "damaged.pt")
    before = sorted(tmp_path.iterdir())
    started = time.process_time()
    out = tmp_path / "out" / "model"
    assert main(["convert", "open_clip", str(config_file), str(tmp_path / "damaged.pt"), str(out)]) == 2
    assert time.process_time() - started < 2
    assert sorted(tmp_path.iterdir()) == before
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "damaged.pt does not hold the weights of this open_clip model" in message


def test_more_layers_than_the_weights_have_are_refused_at_once(tmp_path: Path):
    torch.save({"a": torch.zeros(2)}, tmp_path / "few.pt")
    for layers, sentence in ((10**6, "must be at most 512"), (500, r"few\.pt does not hold .* asks for 502 layers")):
        (tmp_path / "deep.json").write_text(json.dumps(changed(vision_cfg__layers=layers)))
        with pytest.raises(ValueError, match=sentence):
            load_open_clip(tmp_path / "deep.json", tmp_path / "few.pt")


def test_another_models_vocabulary_has_no_tokenizer(tmp_path: Path, their_weights):
    (tmp_path / "small.json").write_text(json.dumps(changed(text_cfg__vocab_size=100)))
    with pytest.raises(ValueError, match=r"text_cfg.vocab_size = 100 is not supported"):
        load_open_clip(tmp_path / "small.json", tmp_path / "none.pt")


# --- commands ---


def test_convert_and_export(tmp_path: Path, config_file: Path, their_weights, capsys: pytest.CaptureFixture[str]):
    torch.save(their_weights, tmp_path / "weights.pt")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert main(["convert", "open_clip", str(config_file), str(tmp_path / "weights.pt"), str(ours)]) == 0
    assert "million parameters" in capsys.readouterr().out
    assert json.loads((ours / "config.json").read_text())["info"]["source"]["format"] == "open_clip"
    assert main(["export", "open_clip", str(ours), str(theirs)]) == 0
    exported = load_file(theirs / "open_clip_model.safetensors")
    assert all(torch.equal(exported[name], tensor) for name, tensor in their_weights.items())
    assert exported.keys() == their_weights.keys()
    assert config_from_open_clip(read_config(theirs).model) == config_from_open_clip(OPTIONS)
    # What is there stays.
    arguments = ["convert", "open_clip", str(config_file), str(tmp_path / "weights.pt"), str(ours)]
    assert main(arguments) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err


def test_convert_to_a_smaller_type(tmp_path: Path, config_file: Path, their_weights):
    torch.save(their_weights, tmp_path / "weights.pt")
    arguments = ["convert", "open_clip", str(config_file), str(tmp_path / "weights.pt"), str(tmp_path / "half")]
    assert main([*arguments, "--dtype", "bfloat16"]) == 0
    stored = load_file(tmp_path / "half" / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert stored["log_logit_scale"].dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"compat": {"text_self_attn_mlp": False}}, "compat.text_self_attn_mlp is False and would have to be True"),
        (
            {"compat": {"text_hidden_id": None, "text_hide_next": False}},
            "text_hidden_id is None and would have to be 0",
        ),
        (
            {"text": {"tie_embeddings": True}, "compat": {"pooler_norm_output": False}},
            "text.t.*pooler_norm_output",
        ),
        ({"compat": {"image_class_token": False}}, "compat.image_class_token is False"),
        ({"image": {"name": "efficientnet_lite0"}}, "image.name is 'efficientnet_lite0'"),
        ({"linear": {"dim": 8}}, "linear.dim is 8 and would have to be 0"),
    ],
    ids=str,
)
def test_models_that_open_clip_does_not_have(changes: dict, sentence: str):
    config = config_from_open_clip(OPTIONS)
    config = replace(config, **{part: replace(getattr(config, part), **fields) for part, fields in changes.items()})
    sentence = "the model cannot be exported to open_clip.*" + sentence
    with torch.device("meta"):
        model = CoCa(config)
    with pytest.raises(ValueError, match=sentence) as caught:
        export_open_clip(model)
    assert "\n" not in str(caught.value)


def test_a_trained_models_dropout_does_not_matter():
    config = config_from_open_clip(OPTIONS)
    finetuned = replace(config, image=replace(config.image, dropout=0.1), text=replace(config.text, dropout=0.2))
    assert config_to_open_clip(finetuned) == config_to_open_clip(config)
