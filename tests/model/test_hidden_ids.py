"""hidden_id and hide_next against a written-out reference on padded rows, with a mask for every pair of positions."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from opencoca.generation.decoding.session import DecodingSession
from opencoca.model.layers.blocks import TransformerBlock
from opencoca.model.text_decoder import UnimodalDecoder

CONTEXT, HIDDEN = 12, 3
LENGTHS = [0, 1, 2, 7, CONTEXT - 1, CONTEXT]
SHIFTED, PLAIN = {"hidden_id": HIDDEN, "hide_next": True}, {"hidden_id": HIDDEN}


def texts(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 8, (len(LENGTHS), CONTEXT), generator=generator)  # one word in eight is HIDDEN
    ids[:, 0] = 20
    return ids, torch.arange(CONTEXT) < torch.tensor(LENGTHS)[:, None]


def masked_block(block: TransformerBlock, x: Tensor, mask: Tensor) -> Tensor:
    """One block over padded rows x (B, T, D), mask (B, T, T) True = may see."""
    attn, normed = block.attn, block.norm1(x)
    queries = attn.q_proj(normed).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    keys, values = attn.project_context(normed)
    mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None])
    x = x + attn.out_proj(mixed.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


def reference(decoder: UnimodalDecoder, ids: Tensor, mask: Tensor, shifted: bool) -> tuple[Tensor, Tensor]:
    """Word states (B, T, D) and [CLS] (B, D): rows padded with HIDDEN, [CLS] behind the padding."""
    ids = ids.where(mask, HIDDEN)
    is_word = ids != HIDDEN
    visible = pad(is_word, (1, 0), value=True) if shifted else pad(is_word, (0, 1), value=True)
    visible[:, 0] = True
    seen = visible[:, None] & torch.ones(CONTEXT + 1, CONTEXT + 1, dtype=torch.bool).tril()
    cls = decoder.cls_embed.expand(len(ids), 1, -1)
    x = torch.cat((decoder.token_embed(ids), cls), dim=1) + decoder.pos_embed
    for block in decoder.blocks:
        x = masked_block(block, x, seen)
    return x[:, :-1], decoder.norm(x[:, -1])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fields", [SHIFTED, PLAIN], ids=["shifted", "plain"])
def test_words_and_cls_equal_the_reference(make_model, fields: dict, training: bool):
    decoder = make_model(**fields).unimodal_decoder.double()
    ids, mask = texts()
    with torch.set_grad_enabled(training):  # two ways of attention
        words, cls = decoder(ids, mask)
        alone, _ = decoder(ids, mask, with_cls=False)
        expected_words, expected_cls = reference(decoder, ids, mask, "hide_next" in fields)
    torch.testing.assert_close(words.padded()[mask], expected_words[mask])
    torch.testing.assert_close(alone.padded()[mask], expected_words[mask])
    torch.testing.assert_close(cls[1:], expected_cls[1:])


@pytest.mark.parametrize("fields", [SHIFTED, PLAIN], ids=["shifted", "plain"])
def test_gradients_equal_the_references(make_model, fields: dict):
    decoder = make_model(**fields).unimodal_decoder.double().train()
    ids, mask = texts()
    parameters = list(decoder.parameters())
    found = []
    for words, cls in (decoder(ids, mask), reference(decoder, ids, mask, "hide_next" in fields)):
        states = words if isinstance(words, Tensor) else words.padded()
        found.append(torch.autograd.grad(states[mask].sin().sum() + cls[1:].sin().sum(), parameters))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("fields", [SHIFTED, PLAIN], ids=["shifted", "plain"])
def test_gradients_are_finite_and_reach_every_parameter(make_model, fields: dict):
    decoder = make_model(**fields).unimodal_decoder.train()
    words, cls = decoder(*texts())
    (words.states.square().sum() + cls.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_a_text_does_not_depend_on_its_padding_or_its_batch(make_model):
    decoder = make_model(**SHIFTED).unimodal_decoder.double()
    ids, mask = texts()
    with torch.no_grad():
        words, cls = decoder(ids, mask)
        for row, length in enumerate(LENGTHS[1:], start=1):
            own_words, own_cls = decoder(ids[row : row + 1, :length])
            torch.testing.assert_close(own_cls[0], cls[row])
            torch.testing.assert_close(own_words.padded()[0], words.padded()[row, :length])


@pytest.mark.parametrize("fields", [SHIFTED, PLAIN], ids=["shifted", "plain"])
@pytest.mark.parametrize("steps", [[1] * CONTEXT, [5, 1, 6], [CONTEXT]], ids=str)
def test_cached_decoding_hides_the_same(make_model, fields: dict, steps: list[int]):
    model = make_model(**fields).double()
    ids, _ = texts()
    ids[1, 0] = HIDDEN  # a first word is seen all the same
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        whole = model.logits(images, ids)
        session = DecodingSession(model)
        state = session.start(model.encode_image(images).tokens)
        state.select(torch.arange(2).repeat_interleave(len(ids) // 2))
        start = 0
        for length in steps:
            logits = session.step(ids[:, start : start + length], state)
            start += length
            torch.testing.assert_close(logits, whole[:, start - 1])


def test_cached_decoding_hides_the_same_after_rows_were_reordered(make_model):
    model = make_model(**SHIFTED).double()
    ids, _ = texts()
    images, rows = torch.randn(1, 3, 12, 12, dtype=torch.float64), torch.tensor([4, 2, 2, 0, 5])
    with torch.no_grad():
        session = DecodingSession(model)
        state = session.start(model.encode_image(images).tokens)
        state.select(torch.zeros(len(ids), dtype=torch.int64))
        session.step(ids[:, :6], state)
        state.select(rows)
        logits = session.step(ids[rows, 6:8], state)
        torch.testing.assert_close(logits, model.logits(images, ids[rows])[:, 7])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hide_next": True}, "hide_next needs a text_hidden_id"),
        ({"hidden_id": 37}, "hidden_id 37 is not an id of a vocabulary of 37"),
    ],
)
def test_impossible_fields(make_config, fields: dict, sentence: str):
    with pytest.raises(ValueError, match=sentence):
        make_config(**fields)
