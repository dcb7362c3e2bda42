"""Cross-attention without keys and values against the form with them, in float64: outputs and gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from opencoca.model import text_decoder
from opencoca.model.coca import CoCa
from opencoca.model.config import BlockConfig
from opencoca.model.kernels.choice import projects_words
from opencoca.model.kernels.image_attention import SharedImages
from opencoca.model.layers.attention import Attention, SeenImages, SeenTokens
from opencoca.model.layers.layout import TextLayout


def both_forms(lengths: list[int], heads: tuple[int, int], norm: nn.Module, bias: bool, group: int) -> list[Any]:
    """Outputs, and gradients by words, tokens and parameters, of either form."""
    config = BlockConfig(12, heads[0], heads[1], 4, 0, linear_bias=bias)
    attn = Attention(config, context_width=10).double()
    for parameter in (*attn.parameters(), *norm.parameters()):
        nn.init.normal_(parameter, std=0.5)
    layout = TextLayout.of(torch.tensor(lengths))
    x = torch.randn(sum(lengths), 12, dtype=torch.float64, requires_grad=True)
    tokens = torch.randn(len(lengths) // group, 7, 10, dtype=torch.float64, requires_grad=True)
    images = SharedImages.of(tokens, layout.lengths.view(-1, group).sum(dim=1), heads[0], norm)
    inputs = (x, tokens, *attn.parameters(), *norm.parameters())
    results = []
    keys_values = SeenImages(*attn.project_context(norm(tokens)), layout)
    outputs = attn(x, SeenTokens(images, attn.kv_proj, norm, heads[1])), attn(x, keys_values)
    direction = torch.randn_like(outputs[0])
    for output in outputs:
        results.append((output, *torch.autograd.grad(output, inputs, direction, allow_unused=True)))
    return results


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 14), min_size=1, max_size=5),
    st.sampled_from([(1, 1), (3, 3), (4, 2), (4, 1)]),
    st.sampled_from(["none", "norm", "norm without bias"]),
    st.booleans(),
    st.integers(1, 2),
)
def test_both_forms_are_the_same_function(
    lengths: list[int], heads: tuple[int, int], kind: str, bias: bool, group: int
) -> None:
    norm = nn.Identity() if kind == "none" else nn.LayerNorm(10, bias=kind == "norm").double()
    for ours, expected in zip(*both_forms(lengths * group, heads, norm, bias, group), strict=True):
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_words_are_projected_for_few_words_and_many_tokens_alone() -> None:
    kv_proj = nn.Linear(512, 1024)
    assert projects_words(13, 255, 8, 64, kv_proj)
    assert not projects_words(65, 255, 8, 64, kv_proj)
    assert not projects_words(13, 16, 8, 64, kv_proj)
    kv_proj.weight = None  # pyright: ignore
    assert not projects_words(13, 255, 8, 64, kv_proj)


@pytest.mark.parametrize("norm_image_tokens", [False, True])
@pytest.mark.parametrize("texts_per_image", [1, 2])
def test_a_model_is_the_same_in_either_form(
    make_config, monkeypatch: pytest.MonkeyPatch, norm_image_tokens: bool, texts_per_image: int
) -> None:
    model = CoCa(make_config(norm_image_tokens=norm_image_tokens)).double().train()
    ids, mask = torch.randint(1, 30, (4, 9)), torch.arange(9) < torch.tensor([[9], [2], [5], [1]])
    images = torch.randn(4 // texts_per_image, 3, 12, 12, dtype=torch.float64)

    def run(absorbs: bool) -> dict[str, Tensor]:
        monkeypatch.setattr(text_decoder, "projects_words", lambda *_: absorbs)
        model.zero_grad()
        output = model(images, ids, mask)
        assert output.hidden is not None
        output.hidden.square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return grads | {"hidden": output.hidden.detach()}

    ours, expected = run(True), run(False)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-8, atol=1e-8, msg=name)
