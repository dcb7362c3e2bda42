"""Against open_clip itself: embeddings, logits, temperature, captions, files in both directions."""

import json
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip_peer import CONTEXT, VOCAB_SIZE, convert_peer, make_peer, make_texts, small_options
from torch import Tensor, nn

from opencoca.cli import main
from opencoca.generation import GenerationOptions, generate
from opencoca.generation.decoding.session import DecodingSession
from opencoca.model.coca import CoCa
from opencoca.store.interop.open_clip import (
    config_from_open_clip,
    export_open_clip,
    load_open_clip,
    preprocess_from_open_clip,
    read_config,
)
from opencoca.store.interop.open_clip_options import CONFIGS
from opencoca.tokenizer import Tokenizer

pytestmark = pytest.mark.peers

OPTIONS = {
    "as published": small_options(),
    "other widths, heads and depths": small_options(
        {"width": 40, "head_width": 8, "layers": 3, "mlp_ratio": 2.7, "attn_pooler_heads": 2},
        {"width": 24, "heads": 3, "layers": 4, "mlp_ratio": 2},
        {"width": 24, "heads": 6, "layers": 1},
        embed_dim=24,
    ),
    "one width for all": small_options({"width": 32}),
    "image that is no square": small_options({"image_size": [16, 40]}),
    "quick_gelu": small_options(quick_gelu=True),
    "layer scale, no ln_pre": small_options(
        {"ls_init_value": 0.1, "no_ln_pre": True}, {"ls_init_value": 0.1}, {"ls_init_value": 0.1}
    ),
    "custom blocks without extras": small_options({"block_type": "custom"}, {"block_type": "custom"}),
    "fixed positions": small_options({"pos_embed_type": "sin_cos_2d"}),
    "another padding id": small_options(text={"pad_id": 5}),
    "correct [CLS] mask": small_options(text={"correct_cls_mask": True}),
    "cascade": small_options({"attentional_pool": "cascade", "width": 32}),
    "parallel": small_options({"attentional_pool": "parallel", "width": 32}),
    "no pooler, other embed_dim": small_options({"attentional_pool": False, "width": 32}, embed_dim=20),
    "temperature of its own": small_options(init_logit_scale=1.5, nonscalar_logit_scale=True),
}


def compare(peer: nn.Module, model: CoCa, images: Tensor, ids: Tensor, mask: Tensor, **tolerance: float) -> None:
    """Embeddings, temperature, and the logits after every word, in one pass and word by word with a cache."""
    with torch.no_grad():
        theirs = peer(images, ids, output_labels=False)
        ours = model(images, ids, mask)
        logits = model.logits(images, ids, mask)
        image_features = theirs["image_features"].view_as(ours.image_embed)  # two poolers leave a dimension of 1
        torch.testing.assert_close(ours.image_embed, image_features, **tolerance)
        torch.testing.assert_close(ours.text_embed, theirs["text_features"], **tolerance)
        torch.testing.assert_close(ours.logit_scale.view(-1), theirs["logit_scale"].view(-1), rtol=1e-6, atol=0)
        torch.testing.assert_close(logits[mask[:, : logits.shape[1]]], theirs["logits"][mask], **tolerance)
        session = DecodingSession(model)
        state = session.start(model.encode_image(images).tokens)
        for position in range(min(logits.shape[1], 20)):
            step, real = session.step(ids[:, position : position + 1], state), mask[:, position]
            torch.testing.assert_close(step[real], theirs["logits"][real, position], **tolerance)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", OPTIONS)
def test_equal_in_double_precision(name: str, seed: int):
    options = OPTIONS[name]
    peer = make_peer(options, seed)
    size = options["vision_cfg"]["image_size"]
    height, width = size if isinstance(size, list) else (size, size)
    for lengths in ([CONTEXT], [1], [1, 2, 5, CONTEXT - 1, CONTEXT]):
        images = torch.randn(len(lengths), 3, height, width, dtype=torch.float64)
        ids, mask = make_texts(lengths, CONTEXT, VOCAB_SIZE, options["text_cfg"].get("pad_id", 0))
        compare(peer, convert_peer(peer, options), images, ids, mask, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OPTIONS)
def test_there_and_back_gives_the_same_bytes(name: str):
    options = {**OPTIONS[name], "nonscalar_logit_scale": False}
    peer = make_peer(options, dtype=torch.float32)
    state_dict, exported = export_open_clip(convert_peer(peer, options))
    theirs = peer.state_dict()
    assert state_dict.keys() == theirs.keys()
    for key, tensor in state_dict.items():
        assert tensor.shape == theirs[key].shape, key
        assert tensor.is_contiguous(), key
        assert tensor.numpy().tobytes() == theirs[key].numpy().tobytes(), key
    assert replace(config_from_open_clip(exported), initial_temperature=0.07) == replace(
        config_from_open_clip(options), initial_temperature=0.07
    )
    again = make_peer(exported, dtype=torch.float32)  # their options, understood by themselves
    again.load_state_dict(state_dict, strict=True)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_named_configurations_are_theirs(name: str):
    theirs = import_module("open_clip").get_model_config(name)
    assert config_from_open_clip(read_config(name).model) == config_from_open_clip(theirs)


@pytest.mark.parametrize("name", ["coca_ViT-B-32", "coca_ViT-L-14"])
def test_equal_at_the_published_sizes(name: str):
    peer = make_peer(CONFIGS[name], dtype=torch.float32)
    model = convert_peer(peer, CONFIGS[name])
    images, (ids, mask) = torch.randn(3, 3, 224, 224), make_texts([1, 9, 76], 76, 49_408)
    compare(peer, model, images, ids, mask, rtol=0, atol=1e-4)
    assert compare_greedy(peer, model, images[:2]) >= 1


def test_equal_at_large_widths_in_double_precision():
    large = CONFIGS["coca_ViT-L-14"]
    shallow = {key: {**large[key], "layers": 2} for key in ("vision_cfg", "text_cfg", "multimodal_cfg")}
    options = {**large, **shallow}
    options["text_cfg"] |= {"vocab_size": 997}
    peer = make_peer(options)
    ids, mask = make_texts([1, 30, 76], 76, 997)
    images = torch.randn(3, 3, 224, 224, dtype=torch.float64)
    compare(peer, convert_peer(peer, options), images, ids, mask, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [16, 40])
def test_images_of_another_size_equal_their_interpolated_positions(size: int):
    options = small_options()
    peer = make_peer(options)
    other = {**options, "vision_cfg": {**options["vision_cfg"], "image_size": size}}
    resized = make_peer(other)
    state_dict = peer.state_dict()
    import_module("open_clip.model").resize_pos_embed(state_dict, resized)
    resized.load_state_dict(state_dict)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected, _ = resized.visual(images)
        embed = convert_peer(peer, options).encode_image(images).embed
    torch.testing.assert_close(embed, nn.functional.normalize(expected, dim=-1), rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def captioner() -> tuple[nn.Module, CoCa]:
    """A small model with CLIP's whole vocabulary."""
    options = small_options(
        text={"vocab_size": 49_408, "context_length": 76}, multimodal={"context_length": 76}, quick_gelu=True
    )
    peer = make_peer(options, dtype=torch.float32)
    return peer, convert_peer(peer, options)


def compare_greedy(peer: nn.Module, model: CoCa, images: Tensor) -> int:
    """Checks that captions of up to 30 tokens are the same; returns how many are of 30."""
    # Theirs forces the end token in the last place and not before the fifth.
    theirs = peer.generate(images, generation_type="top_k", top_k=1, seq_len=32, min_seq_len=5)
    tokens = model.encode_image(images).tokens
    ours = generate(model, tokens, Tokenizer.clip(), GenerationOptions(max_new_tokens=30, min_new_tokens=4))
    full = 0
    for (caption,), expected in zip(ours, theirs.tolist(), strict=True):
        if 0 in expected[:31]:  # they end at a "!", which is their padding
            expected = expected[: expected.index(0) + 1]
        length = min(len(expected), 31)
        assert list(caption.token_ids[:length]) == expected[:length]
        full += length == 31
    return full


def test_greedy_captions_are_the_same_ids(captioner: tuple[nn.Module, CoCa]):
    assert compare_greedy(*captioner, torch.randn(8, 3, 24, 24)) >= 4


def save_checkpoint(peer: nn.Module, file: Path) -> None:
    """As open_clip's training does when it runs on several GPUs."""
    weights = {f"module.{name}": tensor for name, tensor in peer.state_dict().items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save({"epoch": 3, "name": "run", "state_dict": weights, "optimizer": optimizer}, file)


def test_commands_convert_and_export_what_open_clip_loads(
    captioner: tuple[nn.Module, CoCa], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    peer, model = captioner
    options = export_open_clip(model).config
    (tmp_path / "mine.json").write_text(json.dumps(options))
    save_checkpoint(peer, tmp_path / "epoch_3.pt")
    names = [str(tmp_path / name) for name in ("mine.json", "epoch_3.pt", "ours", "theirs")]
    assert main(["convert", "open_clip", *names[:3]]) == 0
    assert "million parameters" in capsys.readouterr().out
    assert main(["export", "open_clip", *names[2:]]) == 0
    again = import_module("open_clip").create_model(f"local-dir:{names[3]}").eval()
    for key, tensor in peer.state_dict().items():
        assert again.state_dict()[key].numpy().tobytes() == tensor.numpy().tobytes(), key
    images, (ids, _) = torch.randn(2, 3, 24, 24), make_texts([4, 76], 76, 49_408)
    with torch.no_grad():
        assert torch.equal(again(images, ids)["logits"], peer(images, ids)["logits"])
    loaded = load_open_clip(names[3], Path(names[3]) / "open_clip_model.safetensors")
    compare(peer, loaded.model, images, *make_texts([4, 76], 76, 49_408), rtol=0, atol=1e-5)


def test_preprocessing_is_theirs(tmp_path: Path):
    peer: Any = import_module("open_clip")
    constants = (peer.OPENAI_DATASET_MEAN, peer.OPENAI_DATASET_STD)
    (tmp_path / "config.json").write_text(json.dumps({"model_cfg": CONFIGS["coca_ViT-L-14"]}))
    preprocess = preprocess_from_open_clip(read_config(tmp_path / "config.json"))
    assert (preprocess.mean, preprocess.std) == constants
    assert (preprocess.image_size, preprocess.resize_mode) == ((224, 224), "crop")
