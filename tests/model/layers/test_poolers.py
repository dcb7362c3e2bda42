"""Poolers against a written-out reference, and how two of them are arranged."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from opencoca.model.config import BlockConfig
from opencoca.model.layers.poolers import AttentionalPooler, ImagePooling, OneQueryPooler, SharedPooler, TwoPoolers

QUERIES = {"cascade": [0, 1, 5], "parallel": [0, 1, 5], "shared": [2, 5]}
ARRANGEMENTS = [(arrangement, queries) for arrangement, counts in QUERIES.items() for queries in counts]


def pooling(make_config, arrangement: str, num_queries: int, context_width: int = 24, **pooler) -> ImagePooling:
    config = make_config(pooler={"arrangement": arrangement, "num_queries": num_queries, **pooler})
    module = ImagePooling(config, context_width)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module.double().eval()


def naive_pooler(pooler: AttentionalPooler, features: Tensor) -> Tensor:
    """features (N, C) of one image -> (Q, D), head by head."""

    def norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight + module.bias

    attn, d = pooler.attn, pooler.attn.head_dim
    context = norm(pooler.norm_context, features)
    both = context @ attn.kv_proj.weight.T + attn.kv_proj.bias
    keys, values = both.tensor_split(2, dim=1)
    queries = pooler.query
    if isinstance(attn.q_proj, nn.Linear):
        queries = queries @ attn.q_proj.weight.T + attn.q_proj.bias
    heads = []
    for h in range(attn.num_heads):
        part = slice(h * d, h * d + d)
        heads.append((queries[:, part] @ keys[:, part].T / math.sqrt(d)).softmax(dim=1) @ values[:, part])
    return norm(pooler.norm, torch.cat(heads, dim=1) @ attn.out_proj.weight.T + attn.out_proj.bias)


@pytest.mark.parametrize("project_queries", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_pooler_equals_the_written_out_reference(project_queries: bool, batch_size: int):
    pooler = AttentionalPooler(BlockConfig(16, 4, 4, 4, mlp_width=0), 10, 3, project_queries).double()
    nn.init.normal_(pooler.query)
    nn.init.normal_(pooler.norm.bias)
    nn.init.normal_(pooler.norm_context.bias)
    features = torch.randn(batch_size, 7, 10, dtype=torch.float64)
    expected = torch.stack([naive_pooler(pooler, image) for image in features])
    torch.testing.assert_close(pooler(features), expected)


@pytest.mark.parametrize("num_features", [3, 60])
def test_one_query_gives_what_it_gave_over_keys_and_values(num_features: int):
    config = BlockConfig(width=64, num_heads=4, num_kv_heads=4, head_dim=16, mlp_width=1)
    pooler = OneQueryPooler(config, 64).double()
    with torch.no_grad():
        for parameter in pooler.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    features = torch.randn(5, num_features, 64, dtype=torch.float64)
    outputs, gradients = [], []
    for forward in (pooler, lambda x: AttentionalPooler.forward(pooler, x).squeeze(1)):
        x = features.clone().requires_grad_()
        outputs.append(forward(x))
        inputs = [x, *pooler.parameters()]
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), inputs))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)
    with FlopCounterMode(display=False) as counter:
        pooler(features)
    keys_and_values = 2 * 5 * num_features * 64 * 128
    assert (counter.get_total_flops() < keys_and_values) == (num_features == 60)


def test_projected_queries_cost_width_squared():
    config = BlockConfig(16, 4, 4, 4, mlp_width=0)
    counts = [sum(p.numel() for p in AttentionalPooler(config, 10, 3, flag).parameters()) for flag in (False, True)]
    assert counts[1] - counts[0] == 16 * 16 + 16


@pytest.mark.parametrize(("arrangement", "num_queries"), ARRANGEMENTS)
@pytest.mark.parametrize("context_width", [16, 24])
def test_shapes_of_every_arrangement(make_config, arrangement: str, num_queries: int, context_width: int):
    module = pooling(make_config, arrangement, num_queries, context_width)
    tokens, vector = module(torch.randn(3, 9, context_width, dtype=torch.float64))
    expected = {"shared": num_queries - 1}.get(arrangement, num_queries or 9)
    assert tokens.shape == (3, expected, 16)
    assert vector.shape == (3, 16)


@pytest.mark.parametrize(("arrangement", "num_queries"), ARRANGEMENTS)
def test_arrangements_compose_as_named(make_config, arrangement: str, num_queries: int):
    module = pooling(make_config, arrangement, num_queries)
    features = torch.randn(2, 9, 24, dtype=torch.float64)
    tokens, vector = module(features)
    poolers = module.poolers
    if arrangement == "shared":
        assert isinstance(poolers, SharedPooler)
        pooled = torch.stack([naive_pooler(poolers.pooler, image) for image in features])
        torch.testing.assert_close((vector, tokens), (pooled[:, 0], pooled[:, 1:]))
        return
    assert isinstance(poolers, TwoPoolers)
    if num_queries:
        pooled = torch.stack([naive_pooler(poolers.caption_pooler, image) for image in features])
        torch.testing.assert_close(tokens, pooled)
    source = tokens if arrangement == "cascade" else features
    pooled = torch.stack([naive_pooler(poolers.contrastive_pooler, image) for image in source])
    torch.testing.assert_close(vector, pooled[:, 0])


@pytest.mark.parametrize(("arrangement", "num_queries"), ARRANGEMENTS)
def test_half_of_the_pooling_is_the_same_half(make_config, arrangement: str, num_queries: int):
    module = pooling(make_config, arrangement, num_queries)
    features = torch.randn(2, 9, 24, dtype=torch.float64)
    tokens, vector = module(features)
    tokens_alone, no_vector = module(features, contrastive=False)
    no_tokens, vector_alone = module(features, captioning=False)
    assert no_vector is None
    assert no_tokens is None
    assert torch.equal(tokens, tokens_alone)
    assert torch.equal(vector, vector_alone)


def test_without_queries_every_feature_is_a_token(make_config):
    """No pooling: a token depends on its own feature alone, and is projected only where widths differ."""
    for context_width in (16, 24):
        module = pooling(make_config, "cascade", 0, context_width)
        features = torch.randn(1, 5, context_width, dtype=torch.float64)
        changed = features.clone()
        changed[0, 2] += torch.randn(context_width)
        differs = (module(features).tokens != module(changed).tokens).any(dim=-1)
        assert differs.tolist() == [[False, False, True, False, False]]
        linear = isinstance(module.poolers.caption_pooler.proj, nn.Linear)
        assert linear == (context_width != 16)


@pytest.mark.parametrize(("arrangement", "num_queries"), [a for a in ARRANGEMENTS if a[1] > 0])
def test_pooling_does_not_know_the_features_order(make_config, arrangement: str, num_queries: int):
    module = pooling(make_config, arrangement, num_queries)
    features = torch.randn(2, 9, 24, dtype=torch.float64)
    shuffled = features[:, torch.randperm(9)]
    torch.testing.assert_close(module(features), module(shuffled))


def test_cascade_alone_reads_the_captioning_pooler(make_config):
    for arrangement, reads in (("cascade", True), ("parallel", False)):
        module = pooling(make_config, arrangement, 5)
        module(torch.randn(2, 9, 24, dtype=torch.float64)).vector.sum().backward()
        assert (module.poolers.caption_pooler.query.grad is not None) == reads


def test_dropout_falls_on_the_features(make_config):
    module = pooling(make_config, "cascade", 5, dropout=0.5)
    features = torch.randn(2, 9, 24, dtype=torch.float64)
    assert torch.equal(module(features).tokens, module(features).tokens)
    module.train()
    assert not torch.allclose(module(features).tokens, module(features).tokens)
