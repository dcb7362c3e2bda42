"""A session of decoding: steps equal passes over whole texts; what it keeps is its own and never outdated."""

import copy
import gc
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from opencoca.generation.decoding.session import DecodingSession, Room
from opencoca.model.coca import CoCa
from opencoca.model.kernels.linear import Linear

VARIANTS = [
    {},
    {"block": "parallel", "num_kv_heads": 1, "positions": "rotary", "activation": "swiglu", "norm_bias": False},
    {"num_kv_heads": 2, "self_attn_mlp": True, "tie_embeddings": True},
    {"pooler": {"num_queries": 0}, "width": 8, "num_heads": 2},
]
ROOM = Room(12)

needs_mkldnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")


def image_tokens(model: CoCa, count: int = 2) -> Tensor:
    return model.encode_image(torch.randn(count, 3, 12, 12)).tokens


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_steps_equal_whole_texts(make_model, variant: dict):
    model = make_model(**variant)
    images, ids = torch.randn(2, 3, 12, 12), torch.randint(0, 37, (4, 9))
    whole = model.logits(images, ids)
    session, tokens = DecodingSession(model), model.encode_image(images).tokens
    for steps in ([1] * 9, [9], [4, 1, 1, 3], [1, 8]):
        state, start = session.start(tokens, Room(9)), 0
        state.select(torch.tensor([0, 0, 1, 1]))
        for length in steps:
            logits = session.step(ids[:, start : start + length], state)
            start += length
            torch.testing.assert_close(logits, whole[:, start - 1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_decoding_goes_on_with_rows_dropped_reordered_and_repeated(make_model):
    model = make_model()
    images, ids = torch.randn(3, 3, 12, 12), torch.randint(0, 37, (3, 6))
    session = DecodingSession(model)
    state = session.start(model.encode_image(images).tokens)
    session.step(ids[:, :4], state)
    rows = torch.tensor([2, 0])
    state.select(rows, images=rows)
    logits = session.step(ids[rows, 4:5], state)
    torch.testing.assert_close(logits, model.logits(images, ids)[rows, 4], atol=1e-4, rtol=1e-4)
    # Texts alone: two texts of the one image that is left.
    state = session.start(model.encode_image(images[:1]).tokens)
    state.select(torch.tensor([0, 0, 0]))
    session.step(ids[:, :4], state)
    rows = torch.tensor([1, 1])
    state.select(rows)
    logits = session.step(ids[rows, 4:5], state)
    whole = model.logits(images[:1].expand(3, -1, -1, -1), ids)
    torch.testing.assert_close(logits, whole[rows, 4], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [0, 13])
def test_impossible_rooms(make_model, length: int):
    with pytest.raises(ValueError, match=f"room for {length} words .* context_length 12"):
        DecodingSession(make_model()).start(torch.randn(1, 5, 16), Room(length))


@torch.no_grad()
def test_full_caches_are_an_error(make_model):
    model = make_model()
    session = DecodingSession(model)
    state = session.start(image_tokens(model), Room(1))
    session.step(torch.zeros(2, 1, dtype=torch.int64), state)
    with pytest.raises(AssertionError, match="full"):
        session.step(torch.zeros(2, 1, dtype=torch.int64), state)


def test_beams_share_the_prompt_and_have_room_for_their_words():
    assert Room(10, texts=3, shared=True, prompt_length=4).entries == 4 + 3 * 6
    assert Room(10, texts=3, prompt_length=4).entries == 10


def num_packed(model: CoCa) -> int:
    return sum(module._packed is not None and module._packed() is not None for module in linears(model))


def linears(model: nn.Module) -> list[Linear]:
    return [module for module in model.modules() if isinstance(module, Linear)]


def first_logits(session: DecodingSession, tokens: Tensor, room: Room = ROOM) -> Tensor:
    with torch.inference_mode(), session.search(tokens, room) as state:
        return session.step(torch.tensor([[1], [2]]), state)


@needs_mkldnn
def test_weights_are_packed_for_few_texts_and_as_long_as_a_session_is_there(make_model):
    model = make_model()
    tokens = image_tokens(model).detach()
    session, other = DecodingSession(model), DecodingSession(model)
    first_logits(session, tokens, Room(12, texts=33))
    assert num_packed(model) == 0
    first_logits(session, tokens)
    count = num_packed(model)
    assert count == len(linears(model.unimodal_decoder)) + len(linears(model.multimodal_decoder)) + 1
    before = [id(module._packed()) for module in linears(model.multimodal_decoder)]
    first_logits(other, tokens)
    assert [id(module._packed()) for module in linears(model.multimodal_decoder)] == before
    del session
    gc.collect()
    assert num_packed(model) == count
    del other
    gc.collect()
    assert num_packed(model) == 0


@needs_mkldnn
def test_changed_weights_are_used(make_model):
    model = make_model()
    tokens, session = image_tokens(model).detach(), DecodingSession(model)
    first_logits(session, tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(
        first_logits(session, tokens), first_logits(DecodingSession(copy.deepcopy(model)), tokens)
    )
    model.load_state_dict({name: 0.5 * value for name, value in model.state_dict().items()}, assign=True)
    torch.testing.assert_close(
        first_logits(session, tokens), first_logits(DecodingSession(copy.deepcopy(model)), tokens)
    )


def test_models_and_sessions_can_be_copied_and_saved(make_model):
    model = make_model()
    tokens, session = image_tokens(model).detach(), DecodingSession(model, records_steps=False)
    names = set(model.state_dict())
    expected = first_logits(session, tokens)
    assert set(model.state_dict()) == names
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(whole, weights_only=False)):
        assert num_packed(other) == 0
        torch.testing.assert_close(first_logits(DecodingSession(other), tokens), expected)
    for copied in (copy.deepcopy(session), pickle.loads(pickle.dumps(session))):
        assert copied.model is not model
        assert not copied.records_steps
        torch.testing.assert_close(first_logits(copied, tokens), expected)
    pair = copy.deepcopy({"session": session, "model": model})
    assert pair["session"].model is pair["model"]
