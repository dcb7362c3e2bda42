"""Weights of 8 bits: how near they stay, what shares them, folders that round-trip, and the command that measures."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import opencoca
import opencoca.store.quantization
from cli_helpers import save_tiny_model, write_captions, write_colours
from opencoca.cli import main
from opencoca.store.model_folder import load_model_folder, save_model_folder
from opencoca.store.quantization import QuantizedLinear, dequantize, is_quantized, quantize, quantize_rows


@pytest.fixture(params=[True, False], ids=["integers", "expanded"])
def arithmetic(request, monkeypatch):
    monkeypatch.setattr(opencoca.store.quantization, "_HAS_FAST_INTEGERS", request.param)


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e6]), st.integers(0, 99))
def test_every_weight_is_off_by_half_a_step_at_most(num_rows, width, size, seed):
    matrix = size * torch.randn(num_rows, width, generator=torch.Generator().manual_seed(seed))
    values, scale = quantize_rows(matrix)
    assert values.dtype == torch.int8
    assert values.abs().max() <= 127
    error = (values * scale[:, None] - matrix).abs()
    assert (error <= scale[:, None] * 0.5001).all()
    if size >= 1e-3:
        assert (values.abs().amax(dim=1) == 127).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_map_stays_near(arithmetic, bias):
    plain = nn.Linear(64, 48, bias=bias)
    quantized = QuantizedLinear(quantize_rows(plain.weight), plain.bias)
    x = torch.randn(5, 7, 64)
    with torch.inference_mode():
        expected, found = plain(x), quantized(x)
        error = (found - expected).norm() / expected.norm()
        assert found.shape == expected.shape
        assert error < 0.015  # two roundings to 1 / 254 of the largest of 64 normal numbers
        assert torch.equal(
            quantized(torch.zeros(2, 64)), torch.zeros(2, 48) if plain.bias is None else plain.bias.expand(2, -1)
        )


def test_no_row_depends_on_its_batch(arithmetic):
    quantized = QuantizedLinear(quantize_rows(torch.randn(24, 32)))
    x = torch.randn(6, 32) * torch.tensor([1e-3, 1, 1e3, 5, 1, 2])[:, None]
    with torch.inference_mode():
        alone = torch.cat([quantized(row[None]) for row in x])
        torch.testing.assert_close(quantized(x), alone, rtol=1e-5, atol=1e-6)


def test_not_a_number_stays_one(arithmetic):
    quantized = QuantizedLinear(quantize_rows(torch.randn(4, 8)))
    with torch.inference_mode():
        found = quantized(torch.full((1, 8), torch.nan))
    assert found.isnan().all()


def test_gradients_pass_to_the_input():
    quantized = QuantizedLinear(quantize_rows(torch.randn(4, 8)))
    x = torch.randn(3, 8, requires_grad=True)
    quantized(x).sum().backward()
    torch.testing.assert_close(x.grad, quantized.weight.sum(dim=0).expand(3, -1))


@pytest.mark.parametrize("tied", [True, False])
def test_models_stay_near_and_shared_weights_shared(make_model, arithmetic, tied):
    model = make_model(tie_embeddings=tied)
    quantized = copy.deepcopy(model)
    quantize(quantized)
    assert is_quantized(quantized)
    assert not any(isinstance(module, nn.Linear | nn.Embedding) for module in quantized.modules())
    assert (quantized.lm_head.values is quantized.unimodal_decoder.token_embed.values) == tied
    pixels, ids = torch.randn(4, 3, 12, 12), torch.randint(0, 37, (4, 9))
    with torch.inference_mode():
        assert (model.encode_image(pixels).embed * quantized.encode_image(pixels).embed).sum(dim=1).min() > 0.995
        assert (model.encode_text(ids).embed * quantized.encode_text(ids).embed).sum(dim=1).min() > 0.995
        expected = model.logits(pixels, ids)
        assert (quantized.logits(pixels, ids) - expected).norm() / expected.norm() < 0.08


def test_dequantizing_gives_ordinary_modules_of_the_same_values(make_model):
    model = make_model(tie_embeddings=True)
    quantize(model)
    restored = copy.deepcopy(model)
    dequantize(restored)
    assert not is_quantized(restored)
    assert restored.lm_head.weight is restored.unimodal_decoder.token_embed.weight
    assert restored.state_dict().keys() == make_model(tie_embeddings=True).state_dict().keys()
    assert torch.equal(restored.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_folders_round_trip(make_model, tmp_path, dtype):
    loaded = load_model_folder(save_tiny_model(tmp_path / "plain"))
    quantize(loaded.model)
    save_model_folder(tmp_path / "int8", loaded.model, loaded.tokenizer, loaded.preprocess)
    again = load_model_folder(tmp_path / "int8", dtype=dtype)
    assert is_quantized(again.model)
    expected = loaded.model.state_dict()
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    ids = torch.randint(0, 200, (2, 5))
    with torch.inference_mode():
        found = again.model.encode_text(ids).embed
        cosine = (found.float() * loaded.model.encode_text(ids).embed).sum(dim=1)
    assert cosine.min() > 0.99


def test_a_tied_head_is_stored_once(make_model, tmp_path):
    loaded = load_model_folder(save_tiny_model(tmp_path / "plain"))
    model = make_model(tie_embeddings=True, vocab_size=loaded.tokenizer.vocab_size)
    quantize(model)
    save_model_folder(tmp_path / "int8", model, loaded.tokenizer, loaded.preprocess)
    assert not any(name.startswith("lm_head") for name in load_file(tmp_path / "int8" / "model.safetensors"))
    again = load_model_folder(tmp_path / "int8").model
    assert again.lm_head.values is again.unimodal_decoder.token_embed.values


def test_an_unknown_quantization_is_named(tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization": "int3"}))
    with pytest.raises(ValueError, match="quantized as 'int3'"):
        load_model_folder(folder)


def test_the_command_writes_a_folder_that_loads(tmp_path, capsys):
    folder, images = save_tiny_model(tmp_path / "model"), write_colours(tmp_path / "images")
    captions, report = write_captions(tmp_path / "captions.csv"), tmp_path / "report.json"
    argv = ["quantize", str(folder), str(tmp_path / "int8"), "--images", str(images), "--captions", str(captions)]
    assert main([*argv, "--max-loss", "100", "--out", str(report)]) == 0
    assert "image to text r1" in capsys.readouterr().out
    scores = json.loads(report.read_text())
    assert scores["images"] == 4
    assert scores["weights_after_bytes"] < scores["weights_before_bytes"]
    assert set(scores["before"]) == set(scores["after"])
    pipeline = opencoca.load(tmp_path / "int8")
    assert is_quantized(pipeline.model)
    assert len(pipeline.caption(images / "red.png")) == 1
    assert pipeline.dtype == torch.float32
    assert main(["quantize", str(tmp_path / "int8"), str(tmp_path / "again")]) == 2
    assert "quantized already" in capsys.readouterr().err


def test_a_model_that_loses_too_much_is_not_written(tmp_path, capsys):
    folder, images = save_tiny_model(tmp_path / "model"), write_colours(tmp_path / "images")
    captions = write_captions(tmp_path / "captions.csv")
    argv = ["quantize", str(folder), str(tmp_path / "int8"), "--images", str(images), "--captions", str(captions)]
    assert main([*argv, "--max-loss", "-100"]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "int8").exists() or not list((tmp_path / "int8").iterdir())
    assert main([*argv[:3], "--captions", str(captions)]) == 2
