"""Configurations: the paper's sizes, round trips, and what a wrong value is told."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opencoca.generation.decoding.session import DecodingSession, Room
from opencoca.model.coca import CoCa
from opencoca.model.config import (
    NAMED_SIZES,
    BlockConfig,
    CoCaConfig,
    Compat,
    ImageEncoderConfig,
    LinearConfig,
    PoolerConfig,
    TextConfig,
)

# The paper's table 1, in millions: image encoder, text decoder, both.
PAPER_SIZES = {"base": (86, 297, 383), "large": (303, 484, 787), "2b": (1000, 1100, 2100)}


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def on_meta(config: CoCaConfig) -> CoCa:
    with torch.device("meta"):
        return CoCa(config)


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_sizes_of_the_paper(name: str):
    encoder, decoder, total = PAPER_SIZES[name]
    model = on_meta(CoCaConfig.named(name))
    head = 0.0 if model.config.text.tie_embeddings else millions(model.lm_head)
    decoders = millions(model.unimodal_decoder) + millions(model.multimodal_decoder) + head
    poolers = millions(model.image_pooling)
    assert millions(model) == pytest.approx(total, rel=0.01)
    # The paper's total is the sum of its two columns: the poolers are in neither. They are what is above it here.
    assert millions(model) - poolers == pytest.approx(total, rel=0.002)
    # 2b's columns are given as 1B and 1.1B, so to a tenth of a billion.
    precision = 0.05 * 1000 if name == "2b" else 0.6
    assert millions(model.image_encoder) == pytest.approx(encoder, abs=precision)
    assert decoders == pytest.approx(decoder, abs=precision)


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_settings_of_the_paper(name: str):
    config = CoCaConfig.named(name)
    assert config.image.image_size == (288, 288)
    assert config.image.patch_size == 18
    assert config.text.vocab_size == 64_000
    assert config.text.unimodal_depth == config.text.multimodal_depth
    assert (config.pooler.num_queries, config.pooler.arrangement) == (256, "cascade")
    assert config.initial_temperature == 0.07


def test_named_sizes_grow_and_can_be_changed():
    sizes = [millions(on_meta(CoCaConfig.named(name))) for name in ("tiny", "small", "base", "large", "2b")]
    assert sizes == sorted(sizes)
    assert sizes[0] < 20
    changed = CoCaConfig.named("tiny", embed_dim=99)
    assert changed == replace(NAMED_SIZES["tiny"], embed_dim=99)
    with pytest.raises(ValueError, match=r"'huge'.*tiny, small, base, large, 2b"):
        CoCaConfig.named("huge")


def test_configurations_cannot_be_changed_in_place():
    with pytest.raises(FrozenInstanceError):
        CoCaConfig().embed_dim = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_the_towers_choices_reach_the_blocks():
    """Every choice differs from its default, so that one that is not handed on shows."""
    text = TextConfig(
        width=48,
        num_heads=8,
        num_kv_heads=2,
        head_dim=10,
        mlp_width=20,
        block="parallel",
        positions="rotary",
        activation="swiglu",
        norm_bias=False,
        linear_bias=False,
        dropout=0.25,
    )
    assert CoCaConfig(text=text, compat=Compat(text_norm_image_tokens=True)).unimodal_block() == BlockConfig(
        width=48,
        num_heads=8,
        num_kv_heads=2,
        head_dim=10,
        mlp_width=20,
        parallel=True,
        activation="swiglu",
        norm_bias=False,
        linear_bias=False,
        rotary=True,
        dropout=0.25,
    )
    config = CoCaConfig(
        text=TextConfig(width=48, num_heads=8, mlp_width=20),
        image=ImageEncoderConfig(width=48, num_heads=8, mlp_width=20, dropout=0.25),
    )
    assert config.unimodal_block() == BlockConfig(width=48, num_heads=8, num_kv_heads=8, head_dim=6, mlp_width=20)
    compat = Compat(text_multimodal_num_heads=4, text_multimodal_mlp_width=30, text_norm_image_tokens=True)
    assert replace(config, compat=compat).multimodal_block() == BlockConfig(
        width=48, num_heads=4, num_kv_heads=4, head_dim=12, mlp_width=30, norm_context=True
    )
    assert config.image_block() == replace(config.unimodal_block(), dropout=0.25)


@pytest.mark.parametrize(("num_kv_heads", "expected"), [(None, 4), (2, 2), (1, 1)])
def test_fewer_key_value_heads_make_smaller_projections_and_caches(make_config, num_kv_heads: int, expected: int):
    model = on_meta(make_config(num_kv_heads=num_kv_heads, head_dim=6))
    projections = [m for name, m in model.unimodal_decoder.named_modules() if name.endswith("kv_proj")]
    projections += [m for name, m in model.multimodal_decoder.named_modules() if name.endswith("kv_proj")]
    assert [m.out_features for m in projections] == [2 * expected * 6] * 6
    state = DecodingSession(model).start(torch.empty(2, 5, 16, device="meta"), Room(7))
    assert {cache.memory.shape for cache in (*state.unimodal, *state.multimodal)} == {(2, 2, expected, 7, 6)}


heads_and_widths = st.integers(1, 6).flatmap(
    lambda heads: st.tuples(st.just(heads), st.sampled_from([d for d in range(1, heads + 1) if heads % d == 0]))
)


@st.composite
def configs(draw: st.DrawFn) -> CoCaConfig:
    heads, kv_heads = draw(heads_and_widths)
    patch = draw(st.integers(1, 16))
    text = TextConfig(
        vocab_size=draw(st.integers(1, 99)),
        width=heads * 2 * draw(st.integers(1, 9)),
        num_heads=heads,
        num_kv_heads=draw(st.sampled_from([None, kv_heads])),
        head_dim=draw(st.sampled_from([None, 8])),
        block=draw(st.sampled_from(["serial", "parallel"])),
        positions=draw(st.sampled_from(["learned", "rotary"])),
        activation=draw(st.sampled_from(["gelu", "swiglu"])),
        norm_bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        dropout=draw(st.floats(0, 0.99)),
    )
    return CoCaConfig(
        embed_dim=draw(st.integers(1, 99)),
        image=ImageEncoderConfig(image_size=(patch * draw(st.integers(1, 5)), patch * 3), patch_size=patch),
        pooler=PoolerConfig(
            arrangement=draw(st.sampled_from(["cascade", "parallel", "shared"])),
            num_queries=draw(st.integers(2, 9)),
            num_heads=heads,
        ),
        text=text,
        initial_temperature=draw(st.floats(0.011, 10)),
    )


@given(configs())
def test_round_trip_through_json(config: CoCaConfig):
    assert CoCaConfig.from_dict(config.to_dict()) == config
    assert CoCaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_missing_fields_take_their_defaults():
    assert CoCaConfig.from_dict({}) == CoCaConfig()
    config = CoCaConfig.from_dict({"text": {"width": 384}, "image": {"image_size": 36}})
    assert config.text == TextConfig(width=384)
    assert config.image.image_size == (36, 36)


def test_what_earlier_versions_stored_is_read():
    """They had the fields of `Compat` among those of the parts."""
    old, new = CoCaConfig().to_dict(), CoCaConfig().to_dict()
    del old["compat"]
    old["project_embeds"] = True
    old["image"] |= {"class_token": True, "patch_bias": False, "pre_norm": True, "layer_scale": 0.5, "head_dim": 64}
    old["pooler"] |= {"norm_queries": True, "norm_output": False, "head_dim": 32}
    old["text"] |= {"hidden_id": 3, "hide_next": True, "self_attn_mlp": True, "cross_attn_mlp": True}
    new["image"]["head_dim"] = 64
    new["compat"] |= {
        "image_class_token": True,
        "image_patch_bias": False,
        "image_pre_norm": True,
        "image_layer_scale": 0.5,
        "pooler_norm_queries": True,
        "pooler_norm_output": False,
        "pooler_head_dim": 32,
        "text_hidden_id": 3,
        "text_hide_next": True,
        "text_self_attn_mlp": True,
        "project_embeds": True,
    }
    before = json.dumps(old)
    assert CoCaConfig.from_dict(old) == CoCaConfig.from_dict(new)
    assert json.dumps(old) == before
    assert CoCaConfig.from_dict(old).to_dict().keys() == new.keys()
    old["text"]["cross_attn_mlp"] = False
    with pytest.raises(ValueError, match=r"cross_attn_mlp is False: layers without .* are not supported"):
        CoCaConfig.from_dict(old)


WRONG_DICTS = [
    ({"embed_dims": 3}, r"model has unknown fields embed_dims; known: .*embed_dim"),
    ({"text": {"widht": 3, "depth": 1}}, r"model\.text has unknown fields depth, widht; known: .*width"),
    ({"image": {"poolers": 1}}, r"model\.image has unknown fields poolers"),
    ({"pooler": 7}, r"model\.pooler must be a mapping of fields, got 7"),
    ([1], r"model must be a mapping of fields"),
    ({"text": {"width": "wide"}}, r"width 'wide'"),
    ({"text": {"num_heads": "12"}}, r"num_heads '12'"),
    ({"text": {"width": 768.0}}, r"width 768\.0"),
    ({"text": {"dropout": "much"}}, "text dropout 'much' must be a finite number"),
    ({"text": {"num_heads": 5}}, r"num_heads 5 must divide the width 768"),
    ({"text": {"num_kv_heads": 5}}, r"num_kv_heads 5 must divide the num_heads 12"),
    ({"text": {"num_kv_heads": 0}}, r"num_kv_heads 0"),
    ({"text": {"vocab_size": 0}}, r"vocab_size 0"),
    ({"text": {"context_length": 0}}, r"context_length 0"),
    ({"text": {"unimodal_depth": 0}}, r"unimodal_depth 0"),
    ({"text": {"multimodal_depth": -1}}, r"multimodal_depth -1"),
    ({"text": {"mlp_width": 0}}, r"mlp_width 0"),
    ({"text": {"head_dim": 0}}, r"head_dim 0"),
    ({"text": {"head_dim": 7, "positions": "rotary"}}, r"even head_dim, got 7"),
    ({"text": {"block": "serail"}}, r"block 'serail' is none of serial, parallel"),
    ({"text": {"positions": "sine"}}, r"positions 'sine' is none of learned, rotary"),
    ({"text": {"activation": "relu"}}, r"activation 'relu' is none of gelu, quick_gelu, swiglu"),
    ({"text": {"dropout": 1.0}}, r"text dropout 1\.0"),
    ({"image": {"dropout": -0.1}}, r"image dropout -0\.1"),
    ({"pooler": {"dropout": 2}}, r"pooler dropout 2"),
    ({"image": {"patch_size": 0}}, r"patch_size 0"),
    ({"image": {"patch_size": 17}}, r"patch_size 17 must divide the image height 288"),
    ({"image": {"image_size": [288, 289]}}, r"patch_size 18 must divide the image width 289"),
    ({"image": {"image_size": [288]}}, r"image_size \[288\] must be \(height, width\)"),
    ({"image": {"image_size": -18}}, r"image_size -18"),
    ({"image": {"num_heads": 7}}, r"num_heads 7 must divide the width 768"),
    ({"image": {"depth": 0}}, r"image depth 0"),
    ({"pooler": {"arrangement": "serial"}}, r"arrangement 'serial' is none of cascade, parallel, shared"),
    ({"pooler": {"num_queries": -1}}, r"num_queries -1"),
    ({"pooler": {"arrangement": "shared", "num_queries": 1}}, r"num_queries 1 is too few: a shared pooler needs 2"),
    ({"pooler": {"num_heads": 7}}, r"pooler num_heads 7 must divide the text width 768"),
    ({"embed_dim": 0}, r"embed_dim 0"),
    ({"initial_temperature": 0}, r"initial_temperature 0 must be positive"),
    ({"initial_temperature": 0.001}, r"initial_temperature 0\.001 must be at least"),
    ({"max_logit_scale": -1}, r"max_logit_scale"),
    ({"compat": {"image_positions": "sine"}}, r"image_positions 'sine' is none of learned, sincos"),
    ({"compat": {"image_positions": "sincos"}}, r"sincos positions must have image_patch_norm"),
    ({"compat": {"image_patch_norm": True, "image_pre_norm": True}}, r"image_patch_norm has .* no image_pre_norm"),
    ({"compat": {"text_multimodal_num_heads": 7}}, r"text_multimodal_num_heads 7 must divide the text width 768"),
    ({"compat": {"text_cls_position": "after_padding"}}, r"after_padding needs rotary positions"),
    ({"compat": {"project_embeds": False}, "embed_dim": 3}, r"embed_dim 3 is not the text width 768"),
    ({"compat": {"text_layer_scale": 0.1}, "text": {"block": "parallel"}}, r"parallel blocks have no text_layer_scale"),
    ({"pooler": {"arrangement": "class_token"}}, r"needs a ViT with image_class_token"),
]


@pytest.mark.parametrize(("values", "sentence"), WRONG_DICTS, ids=[str(values) for values, _ in WRONG_DICTS])
def test_wrong_values_are_told_in_one_sentence(values: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence) as caught:
        CoCaConfig.from_dict(values)
    assert "\n" not in str(caught.value)


def test_unknown_image_encoder_is_told_when_it_is_built(make_config):
    with pytest.raises(ValueError, match=r"'resnet'; known: vit, efficientnet_lite0"):
        CoCa(make_config(image={"name": "resnet"}))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"dim": -1}, "dim -1 must be at least 0"),
        ({"class_dim": -1}, "class_dim -1 must be at least 0"),
        ({"class_dim": 4}, "class_dim 4 needs a linear branch"),
        ({"weight": 0.0}, "weight 0.0 must be more than 0"),
        ({"image_dropout": 1.0}, "linear image dropout 1"),
        ({"word_dropout": -0.1}, "linear word dropout -0.1"),
    ],
)
def test_a_linear_branch_of_impossible_values_is_refused(values: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        LinearConfig(**values)
