"""The packed text stack against a written-out float64 transformer with explicit masks, and what each word may see."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from opencoca.model.coca import CoCa
from opencoca.model.text_decoder import MultimodalLayer

# --- the reference: padded rows, explicit masks, one head at a time, nothing of the package but its weights ---


def linear(module: nn.Module, x: Tensor) -> Tensor:
    y = x @ module.weight.T
    return y if module.bias is None else y + module.bias


def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight
    return y if module.bias is None else y + module.bias


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions: channels j and j + d / 2 are one complex number, turned by position x 10000^(-2j / d)."""
    half = x.shape[1] // 2
    numbers = torch.complex(x[:, :half], x[:, half:])
    angles = positions[:, None].double() * torch.tensor([10_000.0 ** (-j / half) for j in range(half)]).double()
    numbers = numbers * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((numbers.real, numbers.imag), dim=1)


def attention(module: nn.Module, x: Tensor, context: Tensor, visible: Tensor, positions: Tensor | None) -> Tensor:
    """x (T, D) over context (N, C); visible (T, N) booleans."""
    d, heads, groups = module.head_dim, module.num_heads, module.num_heads // module.num_kv_heads
    queries, both = linear(module.q_proj, x), linear(module.kv_proj, context)
    keys, values = both[:, : both.shape[1] // 2], both[:, both.shape[1] // 2 :]
    mixed = []
    for h in range(heads):
        g = h // groups
        q, k, v = queries[:, h * d : h * d + d], keys[:, g * d : g * d + d], values[:, g * d : g * d + d]
        if positions is not None:
            q, k = turned(q, positions), turned(k, positions)
        scores = (q @ k.T / math.sqrt(d)).masked_fill(~visible, -math.inf)
        mixed.append(scores.softmax(dim=1) @ v)
    return linear(module.out_proj, torch.cat(mixed, dim=1))


def mlp(module: nn.Module, x: Tensor, activation: str) -> Tensor:
    hidden = linear(module.up_proj, x)
    if activation == "swiglu":
        value, gate = hidden.tensor_split(2, dim=1)
        return linear(module.down_proj, value * gate * gate.sigmoid())
    return linear(module.down_proj, hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def block(module: nn.Module, config, x: Tensor, context: Tensor | None, visible: Tensor, positions) -> Tensor:
    """A serial or parallel block of self-attention (context None) or cross-attention."""
    normed = layer_norm(module.norm1, x)
    mixed = attention(module.attn, normed, normed if context is None else context, visible, positions)
    if module.mlp is None:
        return x + mixed
    if config.block == "parallel":
        return x + mixed + mlp(module.mlp, normed, config.activation)
    x = x + mixed
    return x + mlp(module.mlp, layer_norm(module.norm2, x), config.activation)


def reference(model: CoCa, ids: Tensor, real: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One text: ids (T,), real (T,), image_tokens (Q, D) -> word states (T, D), [CLS] (D,), hidden (T, D)."""
    config, uni, multi = model.config.text, model.unimodal_decoder, model.multimodal_decoder
    length = len(ids)
    positions = torch.tensor([int(real[:t].sum()) for t in range(length + 1)])
    visible = torch.zeros(length + 1, length + 1, dtype=torch.bool)
    for q, k in itertools.product(range(length + 1), range(length + 1)):
        visible[q, k] = k <= q and (k == length or bool(real[k]))
        # A row of padding is looked at by nobody; it sees itself so that its softmax has a term.
        visible[q, k] |= k == q
    x = torch.cat((uni.token_embed.weight[ids], uni.cls_embed[None]))
    rotary = positions if config.positions == "rotary" else None
    if rotary is None:
        x[:length] += uni.pos_embed[positions[:length]]
        x[length] += uni.pos_embed[config.context_length]
    for module in uni.blocks:
        x = block(module, config, x, None, visible, rotary)
    states, cls = x[:length], layer_norm(uni.norm, x[length])
    hidden, words = states, visible[:length, :length]
    everything = torch.ones(length, len(image_tokens), dtype=torch.bool)
    rotary = rotary[:length] if rotary is not None else None
    for layer in multi.layers:
        hidden = block(layer.self_block, config, hidden, None, words, rotary)
        hidden = block(layer.cross_block, config, hidden, image_tokens, everything, None)
    return states, cls, layer_norm(multi.norm, hidden)


# Rows: all real; padded at the end, the start, the middle; one word; none.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0] * 5]) > 0

VARIANTS = [
    {
        "block": block_kind,
        "num_kv_heads": kv_heads,
        "positions": positions,
        "activation": activation,
        "norm_bias": norm_bias,
        "self_attn_mlp": self_attn_mlp,
    }
    for block_kind, kv_heads, positions, activation, norm_bias, self_attn_mlp in itertools.product(
        ("serial", "parallel"),
        (None, 2, 1),
        ("learned", "rotary"),
        ("gelu", "swiglu"),
        (True, False),
        (False, True),
    )
]
OTHERS = [{"head_dim": 6}, {"linear_bias": False}]


@pytest.mark.parametrize("variant", [*VARIANTS, *OTHERS], ids=lambda v: "-".join(map(str, v.values())))
def test_packed_stack_equals_the_written_out_transformer(make_model, variant: dict):
    model = make_model(**variant).double()
    ids, images = torch.randint(0, 37, MASK.shape), torch.randn(3, 4, 16, dtype=torch.float64)
    with torch.no_grad():
        references = [reference(model, ids[row], MASK[row], images[row // 2]) for row in range(len(MASK))]
    for with_gradient in (True, False):  # the two paths of attention
        with torch.set_grad_enabled(with_gradient):
            words, cls = model.unimodal_decoder(ids, MASK)
            states, hidden = words.padded(), model.decode(words, images)
        for row, expected in enumerate(references):
            real = MASK[row]
            got = states[row, : int(real.sum())], cls[row], hidden[row, : int(real.sum())]
            wanted = expected[0][real], expected[1], expected[2][real]
            # Rotary angles are made in float32.
            tolerance = 1e-5 if variant.get("positions") == "rotary" else 1e-10
            torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)
            assert not states[row, int(real.sum()) :].any()
            assert not hidden[row, int(real.sum()) :].any()


def test_reference_gradients(make_model):
    """The gradients of every text parameter, through packing, are those of the written-out transformer."""
    model = make_model(num_kv_heads=2).double()
    ids, images = torch.randint(0, 37, MASK.shape), torch.randn(3, 4, 16, dtype=torch.float64)
    text = {**dict(model.unimodal_decoder.named_parameters()), **dict(model.multimodal_decoder.named_parameters())}
    words, cls = model.unimodal_decoder(ids, MASK)
    ours = words.states.square().sum() + cls.sin().sum() + model.decode(words, images).sin().sum()
    theirs = torch.zeros((), dtype=torch.float64)
    for row, real in enumerate(MASK):
        states, cls_row, hidden = reference(model, ids[row], real, images[row // 2])
        theirs = theirs + states[real].square().sum() + cls_row.sin().sum() + hidden[real].sin().sum()
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss, list(text.values()), retain_graph=True) for loss in (ours, theirs)]
    for name, mine, other in zip(text, *gradients, strict=True):
        torch.testing.assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}")


# --- what each position sees ---


@st.composite
def padded_batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """ids and mask (B, T), T <= 9 of a context of 12; padding anywhere."""
    batch_size, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    cells = batch_size * width
    mask = draw(st.lists(st.booleans(), min_size=cells, max_size=cells))
    ids = draw(st.lists(st.integers(0, 36), min_size=cells, max_size=cells))
    return torch.tensor(ids).view(batch_size, width), torch.tensor(mask).view(batch_size, width)


def outputs(model: CoCa, ids: Tensor, mask: Tensor | None, image_tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        words, cls = model.unimodal_decoder(ids, mask)
        return words.padded(), cls, model.decode(words, image_tokens)


@pytest.fixture(scope="module", params=["learned", "rotary"])
def model(request, make_model) -> CoCa:
    return make_model(positions=request.param)


@given(padded_batches(), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_changing_moving_and_lengthening_the_padding_changes_nothing(model: CoCa, batch, random):
    ids, mask = batch
    images = torch.randn(len(ids), 3, 16, generator=torch.Generator().manual_seed(0))
    before = outputs(model, ids, mask, images)
    other_ids = torch.where(mask, ids, random.randrange(37))
    changed = outputs(model, other_ids, mask, images)
    assert all(torch.equal(a, b) for a, b in zip(before, changed, strict=True))
    # The same words at other places of longer rows.
    width = random.randint(ids.shape[1], 12)
    moved_ids, moved_mask = torch.full((len(ids), width), 5), torch.zeros(len(ids), width, dtype=torch.bool)
    for row in range(len(ids)):
        words = ids[row][mask[row]]
        places = sorted(random.sample(range(width), len(words)))
        moved_ids[row, places], moved_mask[row, places] = words, True
    moved = outputs(model, moved_ids, moved_mask, images)
    for a, b in zip(before, moved, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@given(padded_batches())
@settings(max_examples=40)
def test_a_text_is_the_same_alone(model: CoCa, batch):
    ids, mask = batch
    images = torch.randn(len(ids), 3, 16, generator=torch.Generator().manual_seed(0))
    states, cls, hidden = outputs(model, ids, mask, images)
    for row in range(len(ids)):
        words = ids[row][mask[row]][None]
        alone = outputs(model, words, None, images[row : row + 1])
        together = states[row : row + 1, : words.shape[1]], cls[row : row + 1], hidden[row : row + 1, : words.shape[1]]
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=2e-5)


@given(padded_batches(), st.data())
@settings(max_examples=40)
def test_a_word_is_seen_by_itself_what_follows_and_cls_alone(model: CoCa, batch, data):
    ids, mask = batch
    if not mask.any():
        return
    images = torch.randn(len(ids), 3, 16, generator=torch.Generator().manual_seed(0))
    row, column = data.draw(st.sampled_from(mask.nonzero().tolist()))
    changed = ids.clone()
    changed[row, column] = (ids[row, column] + data.draw(st.integers(1, 36))) % 37
    before, after = outputs(model, ids, mask, images), outputs(model, changed, mask, images)
    place, length = int(mask[row, :column].sum()), int(mask[row].sum())
    for kind in (0, 2):  # unimodal, multimodal
        differs = (before[kind] != after[kind]).any(dim=-1)
        expected = torch.zeros_like(differs)
        expected[row, place:length] = True
        assert torch.equal(differs, expected)
    assert (before[1] != after[1]).any(dim=-1).tolist() == [r == row for r in range(len(ids))]


def test_cls_sees_itself_and_no_word_sees_cls(model: CoCa):
    ids, images = torch.randint(0, 37, MASK.shape), torch.randn(6, 3, 16)
    before = outputs(model, ids, MASK, images)
    original = model.unimodal_decoder.cls_embed.data
    try:
        model.unimodal_decoder.cls_embed.data = original + torch.randn(16)
        after = outputs(model, ids, MASK, images)
    finally:
        model.unimodal_decoder.cls_embed.data = original
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[2], after[2])
    assert ((before[1] - after[1]).abs().amax(dim=1) > 1e-3).all()


def test_gradients_reach_exactly_what_is_seen(make_model):
    """The derivative of [CLS] by every real word is there, of any word by [CLS], padding and the future is not."""
    model = make_model()
    decoder = model.unimodal_decoder
    ids = torch.arange(30).view(6, 5)  # every place has its own embedding row
    words, cls = decoder(ids, MASK)
    for row in range(6):
        (rows, by_cls) = torch.autograd.grad(
            cls[row].square().sum(), (decoder.token_embed.weight, decoder.cls_embed), retain_graph=True
        )
        assert rows[:30].abs().sum(dim=1).ne(0).view(6, 5)[row].tolist() == MASK[row].tolist()
        assert rows.abs().sum(dim=1).ne(0).sum() == MASK[row].sum()
        assert by_cls.abs().sum() > 0
    places = MASK.nonzero().tolist()
    for index, (row, column) in enumerate(places):
        (rows, by_cls) = torch.autograd.grad(
            words.states[index].square().sum(),
            (decoder.token_embed.weight, decoder.cls_embed),
            retain_graph=True,
            allow_unused=True,
        )
        seen = rows.abs().sum(dim=1).nonzero().flatten().tolist()
        assert seen == [5 * row + k for k in range(column + 1) if MASK[row, k]]
        assert by_cls is None or not by_cls.any()


def test_without_cls_the_words_are_the_same(model: CoCa):
    ids = torch.randint(0, 37, MASK.shape)
    with torch.no_grad():
        with_cls, cls = model.unimodal_decoder(ids, MASK)
        without, none = model.unimodal_decoder(ids, MASK, with_cls=False)
    assert cls is not None
    assert none is None
    torch.testing.assert_close(with_cls.states, without.states, atol=1e-6, rtol=1e-6)
    assert torch.equal(with_cls.layout.positions, without.layout.positions)


def test_a_mask_may_be_given_in_numbers_or_left_out(model: CoCa):
    ids, images = torch.randint(0, 37, MASK.shape), torch.randn(6, 3, 16)
    for a, b in zip(outputs(model, ids, MASK, images), outputs(model, ids, MASK.long(), images), strict=True):
        assert torch.equal(a, b)
    full = torch.ones_like(MASK)
    for a, b in zip(outputs(model, ids, None, images), outputs(model, ids, full, images), strict=True):
        assert torch.equal(a, b)


def test_captions_of_one_image_equal_the_image_repeated(model: CoCa):
    ids, images = torch.randint(0, 37, MASK.shape), torch.randn(2, 3, 16)
    shared = outputs(model, ids, MASK, images)
    repeated = outputs(model, ids, MASK, images.repeat_interleave(3, dim=0))
    torch.testing.assert_close(shared, repeated, atol=1e-6, rtol=1e-6)
    swapped = outputs(model, ids, MASK, images.flip(0))
    assert torch.equal(swapped[0], shared[0])
    assert not torch.allclose(swapped[2], shared[2], atol=1e-3)


def test_uneven_captions_are_an_error(model: CoCa):
    words, _ = model.unimodal_decoder(torch.zeros(3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="3 texts cannot be shared out evenly among 2 images"):
        model.decode(words, torch.randn(2, 3, 16))


def test_too_long_a_text_is_an_error(model: CoCa):
    outputs(model, torch.zeros(1, 12, dtype=torch.long), None, torch.randn(1, 3, 16))
    with pytest.raises(ValueError, match="13 tokens do not fit context_length 12"):
        model.unimodal_decoder(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize("shape", [(2, 0), (2, 3)])
def test_texts_without_words_have_a_cls_alone(model: CoCa, shape: tuple[int, int]):
    for with_gradient in (True, False):
        with torch.set_grad_enabled(with_gradient):
            words, cls = model.unimodal_decoder(torch.zeros(shape, dtype=torch.long), torch.zeros(shape) > 0)
            assert words.states.shape == (0, 16)
            assert cls.isfinite().all()
            assert torch.equal(cls[0], cls[1])
            assert model.decode(words, torch.randn(2, 3, 16)).shape == (2, 0, 16)


def test_multimodal_mlps_are_where_the_configuration_puts_them(make_config):
    layer = MultimodalLayer(make_config())
    assert layer.self_block.mlp is None  # the paper's: one MLP, after cross-attention
    assert layer.cross_block.mlp is not None
    layer = MultimodalLayer(make_config(self_attn_mlp=True))
    assert layer.self_block.mlp is not None
    assert layer.cross_block.mlp is not None
