"""A model folder gives back what was put into it, or says what is wrong with it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from opencoca.data.transforms import PreprocessConfig
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, HeadConfig, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.store.model_folder import load_model_folder, save_model_folder
from opencoca.store.quantization import quantize
from opencoca.system.files import WriteError
from opencoca.tokenizer import Tokenizer, train_tokenizer
from train.helpers import largest_file

CONFIG = CoCaConfig(
    embed_dim=24,
    image=ImageEncoderConfig(image_size=(16, 24), patch_size=8, width=24, depth=1, num_heads=2, mlp_width=32),
    pooler=PoolerConfig(num_heads=4, num_queries=5),
    text=TextConfig(
        vocab_size=300, context_length=14, width=32, unimodal_depth=1, multimodal_depth=1, num_heads=4, mlp_width=48
    ),
)
PREPROCESS = PreprocessConfig(image_size=(16, 24), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), resize_mode="squash")
INFO = {"trained_on": "Straßenszenen", "scores": {"CIDEr": 0.5}}
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["a dog runs", "a cat sleeps", "a dog sleeps"], 265)


def make_model(tied: bool = True, **changes) -> CoCa:
    config = replace(CONFIG, text=replace(CONFIG.text, tie_embeddings=tied), **changes)
    return CoCa(config).eval()


@pytest.fixture
def folder(tmp_path, tokenizer):
    save_model_folder(tmp_path / "model", make_model(), tokenizer, PREPROCESS, info=INFO)
    return tmp_path / "model"


def outputs(model: CoCa) -> list[torch.Tensor]:
    torch.manual_seed(3)
    images, ids = torch.randn(2, 3, 16, 24), torch.randint(0, 300, (2, 6))
    with torch.inference_mode():
        image, text = model.encode_image(images), model.encode_text(ids)
        return [image.tokens, image.embed, text.embed, model.logits(images, ids), model.logit_scale]


@pytest.mark.parametrize("tied", [True, False])
def test_all_comes_back(tmp_path, tokenizer, tied):
    model = make_model(tied)
    save_model_folder(tmp_path, model, tokenizer, PREPROCESS, info=INFO)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    loaded = load_model_folder(tmp_path)
    assert loaded.model.config == model.config
    assert loaded.preprocess == PREPROCESS
    assert loaded.info == INFO
    assert loaded.tokenizer.to_json() == tokenizer.to_json()
    assert not loaded.model.training
    for ours, theirs in zip(outputs(loaded.model), outputs(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.model.parameters())


def test_a_tied_head_is_stored_once_and_tied_again(folder):
    assert HEAD not in load_file(folder / "model.safetensors")
    model = load_model_folder(folder).model
    assert model.lm_head.weight is model.unimodal_decoder.token_embed.weight


@pytest.mark.parametrize("name", ["efficientnet_lite0"])
def test_other_encoders_come_back(tmp_path, tokenizer, name):
    model = make_model(image=ImageEncoderConfig(name=name, image_size=(16, 24)))
    save_model_folder(tmp_path, model, tokenizer, PREPROCESS)
    for ours, theirs in zip(outputs(load_model_folder(tmp_path).model), outputs(model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_tables_that_are_not_stored_come_back(tmp_path, tokenizer, monkeypatch):
    """As some timm backbones have: a buffer that is computed when the module is built."""
    build = CoCa.__init__

    def build_with_table(model, config):
        build(model, config)
        model.register_buffer("table", torch.arange(5.0), persistent=False)

    monkeypatch.setattr(CoCa, "__init__", build_with_table)
    save_model_folder(tmp_path, make_model(), tokenizer, PREPROCESS)
    loaded = load_model_folder(tmp_path)
    assert loaded.model.get_buffer("table").tolist() == [0, 1, 2, 3, 4]
    assert torch.isfinite(outputs(loaded.model)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_stored_and_the_loaded_type_can_be_chosen(tmp_path, tokenizer, dtype):
    model = make_model()
    save_model_folder(tmp_path, model, tokenizer, PREPROCESS, dtype=dtype)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tensor.dtype == (torch.float32 if name == "log_logit_scale" else dtype)
        torch.testing.assert_close(tensor, model.state_dict()[name].to(tensor.dtype), rtol=0, atol=0)
    assert load_model_folder(tmp_path).model.lm_head.weight.dtype == dtype
    loaded = load_model_folder(tmp_path, dtype=torch.float32).model
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs(loaded)[0], outputs(model)[0], rtol=0.05, atol=0.05)
    # Saving the model must not have changed it.
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_saving_again_replaces(folder, tokenizer):
    model = make_model(tied=False)
    save_model_folder(folder, model, tokenizer, PREPROCESS)
    loaded = load_model_folder(folder)
    torch.testing.assert_close(loaded.model.lm_head.weight, model.lm_head.weight, rtol=0, atol=0)
    assert loaded.info == {}


def test_weights_that_are_no_numbers_are_not_saved(folder, tokenizer):
    before = (folder / "model.safetensors").read_bytes()
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"not finite: unimodal_decoder\.token_embed\.weight"):
        save_model_folder(folder, model, tokenizer, PREPROCESS)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = 1e6
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        save_model_folder(folder, model, tokenizer, PREPROCESS, dtype=torch.float16)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_full_disk_leaves_the_old_weights(folder):
    """A real failure of the system: no file may grow over 40 kB."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded = load_model_folder(folder)
    with largest_file(40_000), pytest.raises(WriteError, match=r"cannot write.*model\.safetensors.*free some space"):
        save_model_folder(folder, loaded.model, loaded.tokenizer, loaded.preprocess, info=loaded.info)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path, tokenizer):
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="part of its path is a file"):
        save_model_folder(tmp_path / "file", make_model(), tokenizer, PREPROCESS)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path, folder):
    large = Tokenizer.clip()
    with pytest.raises(ValueError, match="more than the model's vocab_size 300"):
        save_model_folder(tmp_path, make_model(), large, PREPROCESS)
    large.save(folder)
    with pytest.raises(ValueError, match=r"tokenizer\.json has 49408 ids"):
        load_model_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}; a model's folder holds config.json"):
        load_model_folder(folder)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model folder .*nowhere.*holds config\.json"):
        load_model_folder(tmp_path / "nowhere")


def test_a_file_given_for_the_folder_is_named(folder):
    with pytest.raises(FileNotFoundError, match="is a file, not a model's folder"):
        load_model_folder(folder / "model.safetensors")


def change_tensors(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_tensors_are_counted_and_the_first_three_named(folder):
    names = sorted(load_file(folder / "model.safetensors"))
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in names[:5]])
    with pytest.raises(ValueError, match=r"model\.safetensors.*5 missing") as caught:
        load_model_folder(folder)
    assert all(name in str(caught.value) for name in names[:3])
    assert names[3] not in str(caught.value)


def test_foreign_tensors_are_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"visual.proj": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"1 not part of the model \(visual\.proj\)"):
        load_model_folder(folder)


def test_wrong_shapes_are_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"image_proj.weight": torch.ones(24, 31)}))
    with pytest.raises(ValueError, match=r"image_proj\.weight \(24, 31\) instead of \(24, 32\)"):
        load_model_folder(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(folder, value):
    change_tensors(folder, lambda tensors: tensors["image_proj.weight"].__setitem__((0, 0), value))
    with pytest.raises(ValueError, match=r"1 not finite \(image_proj\.weight\)"):
        load_model_folder(folder)


def test_integers_for_weights_are_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"image_proj.weight": torch.ones(24, 32).int()}))
    with pytest.raises(ValueError, match=r"of another type \(image_proj\.weight\)"):
        load_model_folder(folder)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_cut_weights_are_named(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or cut short"):
        load_model_folder(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("model"), "no entry 'model'"),
        (lambda config: config.update(format="opencoca-9"), "format 'opencoca-9'"),
        (lambda config: config["model"].update(colour="red"), "colour"),
        (lambda config: config["model"].update(text=[1, 2]), "describes no model"),
        (lambda config: config["model"]["text"].update(width=-32), "describes no model"),
        (lambda config: config["model"]["image"].update(name="resnet"), "resnet"),
        (lambda config: config["preprocess"].update(std=0), "describes no model"),
        (lambda config: config["preprocess"].update(blur=1), "blur"),
        (lambda config: config.update(info=3), "describes no model"),
        (lambda config: config.update(quantization=["x"] * 1000), "quantized as"),
        (lambda config: config["model"]["image"].update(depth=10**6), "depth 1000000 must be at most 512"),
        (lambda config: config["model"]["image"].update(depth=500), "asks for 502 layers"),
        (lambda config: config["model"]["text"].update(width=10**9), "at most 65,536"),
        (lambda config: config["model"]["text"].update(tie_embeddings="yes"), "must be true or false"),
        (lambda config: config["model"].update(initial_temperature=float("nan")), "must be a finite number"),
        (lambda config: config["model"]["image"].update(image_size=[60_000, 60_000]), "image_size"),
        (lambda config: config["model"].update({"x\x1b" * 1000: 1}), "unknown fields"),
        (lambda config: config["preprocess"].update(image_size=[6000, 6000]), "far larger"),
        (lambda config: config["preprocess"].update(image_size=[15, 24]), "does not divide"),
        (lambda config: config["preprocess"].update(image_size=[16.0, 24.0]), "whole numbers"),
        (lambda config: config["preprocess"].update(std=[float("nan")] * 3), "std must be positive"),
        (lambda config: config["preprocess"].update(std=[1e-300] * 3), "std must be positive"),
        (lambda config: config["preprocess"].update(mean=[1e300] * 3), "mean must be"),
        (lambda config: config["preprocess"].update(mean=["a"] * 3), "mean must be"),
    ],
)
def test_a_wrong_configuration_is_named(folder, change, message):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json.*{message}") as caught:
        load_model_folder(folder)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_weights_of_a_type_that_cannot_be_used_are_named(folder, dtype):
    change_tensors(folder, lambda tensors: tensors.update({"image_proj.weight": torch.ones(24, 32).to(dtype)}))
    with pytest.raises(ValueError, match=r"holds image_proj\.weight as \w+, which is not supported"):
        load_model_folder(folder)


def test_weights_too_large_for_the_wanted_type_are_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"image_proj.weight": torch.full((24, 32), 1e6)}))
    load_model_folder(folder)
    with pytest.raises(ValueError, match=r"1 not finite \(image_proj\.weight\)"):
        load_model_folder(folder, dtype=torch.float16)


def test_quantized_weights_of_other_integers_are_named(folder, tokenizer):
    model = make_model()
    quantize(model)
    save_model_folder(folder, model, tokenizer, PREPROCESS)
    name = next(name for name, tensor in load_file(folder / "model.safetensors").items() if tensor.dtype == torch.int8)
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name].long()}))
    with pytest.raises(ValueError, match="1 of another type"):
        load_model_folder(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"[" * 100_000, b'{"format": 1, "format": 2}'])
def test_a_damaged_configuration_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is "):
        load_model_folder(folder)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["cat", "dog"], None),
        (["cat", "dog", "bird"], "3 different names of 3 classes, and the head 2 outputs"),
        (["cat", "cat"], "1 different names of 2 classes"),
        ([1, 2], "no list of names"),
        ("ab", "no list of names"),
    ],
)
def test_classes_are_names_and_as_many_as_the_head_has_outputs(tmp_path, tokenizer, classes, message):
    model = make_model(head=HeadConfig(num_outputs=2, num_heads=2))
    task = {"name": "classification", "classes": classes}
    save_model_folder(tmp_path, model, tokenizer, PREPROCESS, task=task)
    if message is None:
        assert load_model_folder(tmp_path).task == task
    else:
        with pytest.raises(ValueError, match=message):
            load_model_folder(tmp_path)
