"""Initial values: all of them set, their scales, sharing, the seed."""

import math

import pytest
import torch
from torch import Tensor, nn

from opencoca.model.coca import CoCa
from opencoca.model.init import init_weights

VARIANTS = [
    {},
    {"tie_embeddings": True},
    {"positions": "rotary", "block": "parallel", "num_kv_heads": 1, "activation": "swiglu", "norm_bias": False},
    {"self_attn_mlp": True, "linear_bias": False},
    {"pooler": {"arrangement": "shared", "project_queries": True}},
    {"pooler": {"arrangement": "parallel", "num_queries": 0}},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_no_value_is_left_as_memory_had_it(make_config, variant: dict):
    model = CoCa(make_config(**variant))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_logit_scale":  # set where it is made
                parameter.fill_(math.nan)
    init_weights(model)
    poisoned = [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]
    assert poisoned == []
    assert list(model.buffers()) == []


@pytest.mark.parametrize("variant", VARIANTS[:3], ids=str)
def test_the_seed_decides_everything(make_config, variant: dict):
    def build(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return CoCa(make_config(**variant)).state_dict()

    first, again, other = build(0), build(0), build(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    random = [name for name in first if first[name].unique().numel() > 1]
    assert len(random) > 20
    assert not any(torch.equal(first[name], other[name]) for name in random)


def test_other_encoders_keep_their_own_values(make_config):
    model = CoCa(make_config(image={"name": "efficientnet_lite0"}))
    before = {name: value.clone() for name, value in model.image_encoder.state_dict().items()}
    init_weights(model)
    assert all(torch.equal(before[name], value) for name, value in model.image_encoder.state_dict().items())


def test_tied_weights_share_storage(make_config):
    tied, untied = CoCa(make_config(tie_embeddings=True)), CoCa(make_config())
    assert tied.lm_head.weight is tied.unimodal_decoder.token_embed.weight
    assert untied.lm_head.weight is not untied.unimodal_decoder.token_embed.weight
    counts = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert counts[1] - counts[0] == untied.lm_head.weight.numel()
    # A shared matrix has the embedding's scale, not the head's.
    for model in (tied, untied):
        assert model.unimodal_decoder.token_embed.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert untied.lm_head.weight.std().item() == pytest.approx(16**-0.5, rel=0.1)


def test_writes_to_the_residual_stream_are_scaled_by_their_number(make_config):
    model = CoCa(make_config(width=64, mlp_width=128, unimodal_depth=3, multimodal_depth=5))
    stacks = (
        (model.image_encoder, 2 * 2),
        (model.unimodal_decoder, 2 * 3),
        (model.multimodal_decoder, 3 * 5),  # self-attention, cross-attention, MLP
    )
    for stack, writers in stacks:
        count = 0
        for name, module in stack.named_modules():
            if isinstance(module, nn.Linear):
                writes = name.endswith(("out_proj", "down_proj"))
                count += writes
                expected = module.in_features**-0.5 * (writers**-0.5 if writes else 1.0)
                assert module.weight.std().item() == pytest.approx(expected, rel=0.15), name
                assert not module.bias.any()
        assert count == writers


@pytest.mark.parametrize("variant", [{}, {"block": "parallel", "activation": "swiglu"}, {"num_kv_heads": 1}], ids=str)
@pytest.mark.parametrize("depth", [2, 8, 24])
def test_activations_stay_of_order_one_at_every_depth(make_config, depth: int, variant: dict):
    wide = {"width": 64, "mlp_width": 256, "num_heads": 4}
    config = make_config(
        image={**wide, "depth": depth, "image_size": (24, 24)},
        **wide,
        **variant,
        unimodal_depth=depth,
        multimodal_depth=depth,
    )
    model = CoCa(config).eval()
    streams: dict[str, list[float]] = {"image": [], "unimodal": [], "multimodal": []}

    def record(stack: str):
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            streams[stack].append(float(output.var()))

        return hook

    for stage in model.image_encoder.stages[1:-1]:
        stage.register_forward_hook(record("image"))
    for block in model.unimodal_decoder.blocks:
        block.register_forward_hook(record("unimodal"))
    for layer in model.multimodal_decoder.layers:
        layer.register_forward_hook(record("multimodal"))
    with torch.no_grad():
        output = model(torch.randn(4, 3, 24, 24), torch.randint(0, 37, (4, 10)))
        logits = model.lm_head(output.hidden)
    assert [len(values) for values in streams.values()] == [depth, depth, depth]
    for stack, values in streams.items():
        # Never vanishing, never growing with depth.
        assert max(values) < 2.5, stack
        assert values[-1] > 0.1, stack
        assert min(values) > 0.005, stack
    # An untrained head guesses: its logits do not shout.
    assert 0.5 < logits.std() < 2
