"""Recorded decoding steps against unrecorded ones; on a CPU by a recorder that replays operations."""

import gc
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from captioner import make_model, make_tokens
from recorded_ops import RecordedOps
from torch import Tensor

from opencoca.generation import GeneratedCaption, GenerationOptions, generate
from opencoca.generation.decoding import graphs as decoding_graphs
from opencoca.generation.decoding.arena import ArenaSize, DecodingArena
from opencoca.generation.decoding.session import DecodingSession, Room
from opencoca.model.coca import CoCa
from opencoca.tokenizer import Tokenizer

HIDDEN_ID = 242
TEXTS = [
    {},
    {"positions": "rotary", "num_kv_heads": 2},
    {"hidden_id": HIDDEN_ID},
    {"hidden_id": HIDDEN_ID, "hide_next": True},
    {"self_attn_mlp": True, "block": "parallel", "activation": "swiglu", "norm_bias": False},
]
OPTIONS = [
    GenerationOptions(),
    GenerationOptions(min_new_tokens=13),
    GenerationOptions(prefix="a brown dog"),
    GenerationOptions(temperature=1.3, num_captions=3, top_p=0.9, seed=3),
    GenerationOptions(num_beams=2),
    GenerationOptions(num_beams=6, num_captions=4, min_new_tokens=9),
    GenerationOptions(num_beams=6, num_groups=3, diversity_penalty=0.7, num_captions=3, repetition_penalty=1.2),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> str:
    """A device, and steps of few enough entries that a caption takes several."""
    monkeypatch.setattr(decoding_graphs, "_FEWEST_ENTRIES", 4)
    return request.param


@pytest.fixture
def recorder(device, monkeypatch) -> RecordedOps:
    """What records on this device; it counts."""
    counting = RecordedOps()
    if device == "cuda":
        made = decoding_graphs.CudaRecorder(torch.device("cuda"))
        counting = _Counting(made)
    monkeypatch.setitem(decoding_graphs.RECORDERS, device, lambda _: counting)
    return counting


class _Counting(RecordedOps):
    def __init__(self, recorder: decoding_graphs.CudaRecorder):
        super().__init__()
        self.recorder, self.memory = recorder, recorder.memory

    def __call__(self, function):
        self.num_recorded += 1
        replay = self.recorder(function)

        def count_and_replay() -> Tensor:
            self.num_replayed += 1
            return replay()

        return count_and_replay


def model_and_tokens(tokenizer: Tokenizer, device: str, text: dict | None = None) -> tuple[CoCa, Tensor]:
    model = make_model(tokenizer, text)
    tokens = make_tokens(model)
    return model.to(device), tokens.to(device)


def in_session(session: DecodingSession, *arguments, **keywords) -> list[tuple[GeneratedCaption, ...]]:
    return generate(session.model, *arguments, **keywords, session=session)


def captions_without(model: CoCa, *arguments, **keywords) -> list[tuple[GeneratedCaption, ...]]:
    return generate(model, *arguments, **keywords, session=DecodingSession(model, records_steps=False))


def assert_same(found: list[tuple[GeneratedCaption, ...]], expected: list[tuple[GeneratedCaption, ...]]) -> None:
    assert [[c.token_ids for c in one] for one in found] == [[c.token_ids for c in one] for one in expected]
    for one, other in zip((c for of in found for c in of), (c for of in expected for c in of), strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-8)
        if one.text_embed is not None and other.text_embed is not None:
            torch.testing.assert_close(one.text_embed, other.text_embed, atol=1e-6, rtol=0)


# By default every text model with the last search, which has most to keep, and every search with the first model.
PAIRS = [
    pytest.param(text, options, marks=() if text == TEXTS[0] or options == OPTIONS[-1] else pytest.mark.slow)
    for text in TEXTS
    for options in OPTIONS
]


@pytest.mark.parametrize(("text", "options"), PAIRS, ids=str)
def test_recorded_steps_find_the_same_captions(tokenizer, device, recorder, text, options):
    model, tokens = model_and_tokens(tokenizer, device, text)
    expected = captions_without(model, tokens, tokenizer, options, with_text_embed=True)
    assert recorder.num_recorded == 0
    session = DecodingSession(model)
    for count in (12, 5, 12, 1):
        found = in_session(session, tokens[:count], tokenizer, options, with_text_embed=True, image_seeds=range(count))
        assert_same(found, expected[:count])
    assert recorder.num_replayed > recorder.num_recorded > 0


def test_what_is_recorded_serves_later_calls(tokenizer, device, recorder):
    model, tokens = model_and_tokens(tokenizer, device)
    session, options = DecodingSession(model), GenerationOptions(min_new_tokens=13)
    in_session(session, tokens[:8], tokenizer, options)
    recorded = recorder.num_recorded
    assert recorded == 3  # of 4, 8 and 14 entries
    for count in (8, 7, 5):
        in_session(session, tokens[:count], tokenizer, options)
    assert recorder.num_recorded == recorded
    in_session(session, tokens[:4], tokenizer, options)
    assert recorder.num_recorded == 2 * recorded
    generate(model, tokens[:8], tokenizer, options)  # in a session of its own
    assert recorder.num_recorded == 3 * recorded


def test_each_kind_of_search_keeps_its_steps_beside_the_others(tokenizer, device, recorder):
    model, tokens = model_and_tokens(tokenizer, device)
    kinds = [GenerationOptions(), GenerationOptions(num_beams=3), GenerationOptions(temperature=1.0, num_captions=2)]
    session = DecodingSession(model)
    for _ in range(2):
        for options in kinds:
            in_session(session, tokens, tokenizer, options)
    recorded = recorder.num_recorded
    for options in kinds:
        assert_same(
            in_session(session, tokens, tokenizer, options), captions_without(model, tokens, tokenizer, options)
        )
    assert recorder.num_recorded == recorded


@pytest.mark.parametrize(
    "options",
    [
        GenerationOptions(),
        GenerationOptions(num_beams=2, early_stopping=True),
        GenerationOptions(temperature=0.7, num_captions=2),
    ],
    ids=str,
)
def test_steps_follow_the_search_to_fewer_images(tokenizer, device, recorder, monkeypatch, options):
    model = make_model(tokenizer)
    tokens = make_tokens(model, 34).to(device)
    model.to(device)
    monkeypatch.setattr("opencoca.generation.loop._DROP_FROM_SHARE_OF_GRAPHS", 0.0)
    sizes = []
    of = decoding_graphs._Shape.of
    monkeypatch.setattr(decoding_graphs._Shape, "of", lambda state: sizes.append(of(state)) or sizes[-1])
    found = generate(model, tokens, tokenizer, options, with_text_embed=True)
    assert_same(found, captions_without(model, tokens, tokenizer, options, with_text_embed=True))
    images = [size.images for size in sizes]
    assert images == sorted(images, reverse=True)
    assert images[0] == 64
    assert images[-1] <= 32


def test_no_number_of_a_spoiled_image_stays(tokenizer, device, recorder):
    model, tokens = model_and_tokens(tokenizer, device)
    options = GenerationOptions(num_beams=2, min_new_tokens=13)
    expected = captions_without(model, tokens, tokenizer, options)
    session = DecodingSession(model)
    in_session(session, tokens, tokenizer, options)
    in_session(session, torch.full_like(tokens, torch.nan), tokenizer, GenerationOptions(num_beams=2))
    assert_same(in_session(session, tokens, tokenizer, options), expected)


def test_new_weights_are_used(tokenizer, device, recorder):
    model, tokens = model_and_tokens(tokenizer, device)
    session = DecodingSession(model)
    before = in_session(session, tokens, tokenizer)
    recorded = recorder.num_recorded
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.roll(3, dims=0))  # where the old ones were
    assert_same(in_session(session, tokens, tokenizer), captions_without(model, tokens, tokenizer))
    assert recorder.num_recorded == recorded
    moved = {name: weight.clone() for name, weight in model.state_dict().items()}
    moved["lm_head.weight"] = moved["lm_head.weight"].roll(-3, dims=0)
    model.load_state_dict(moved, assign=True)
    assert_same(in_session(session, tokens, tokenizer), before)
    assert recorder.num_recorded == 2 * recorded


def test_a_step_that_cannot_be_recorded_is_done_without(tokenizer, monkeypatch):
    first_word = generate(*model_and_tokens(tokenizer, "cpu"), tokenizer)[0][0].token_ids[1]
    # What is hidden depends on the word before, which the failed step must not have taken up.
    model, tokens = model_and_tokens(tokenizer, "cpu", {"hidden_id": first_word, "hide_next": True})
    recorder = RecordedOps(fails=True)
    monkeypatch.setitem(decoding_graphs.RECORDERS, "cpu", lambda _: recorder)
    for options in (GenerationOptions(), GenerationOptions(num_beams=3)):
        expected = captions_without(model, tokens, tokenizer, options, with_text_embed=True)
        session = DecodingSession(model)
        with pytest.warns(UserWarning, match="goes on without CUDA graphs: operation not permitted"):
            found = in_session(session, tokens, tokenizer, options, with_text_embed=True)
        assert_same(found, expected)
        tries = recorder.num_recorded
        assert_same(in_session(session, tokens, tokenizer, options), expected)
        assert recorder.num_recorded == tries


def test_one_search_at_a_time_has_them(tokenizer, device, recorder):
    model, tokens = model_and_tokens(tokenizer, device)
    expected, session = captions_without(model, tokens, tokenizer), DecodingSession(model)
    with torch.inference_mode(), session.search(tokens, Room(14)) as state:
        assert state.recorded is not None
        found = []
        thread = threading.Thread(target=lambda: found.append(in_session(session, tokens, tokenizer)))
        thread.start()
        thread.join()
        assert recorder.num_recorded == 0
        assert_same(found[0], expected)
    assert_same(in_session(session, tokens, tokenizer), expected)
    assert recorder.num_recorded > 0


def test_they_are_free_again_after_an_error(tokenizer, device, recorder):
    model, tokens = model_and_tokens(tokenizer, device)
    session = DecodingSession(model)
    with torch.inference_mode(), pytest.raises(ZeroDivisionError), session.search(tokens, Room(14)):
        raise ZeroDivisionError
    in_session(session, tokens, tokenizer)
    assert recorder.num_recorded > 0


@pytest.fixture(params=["records_steps", "hooks", "autocast", "texts", "memory", "nothing"])
def obstacle(request, monkeypatch, recorder, device) -> Iterator[str]:
    if request.param == "texts":
        monkeypatch.setattr(decoding_graphs, "_MOST_TEXTS", 11)
    if request.param == "memory":
        monkeypatch.setattr(recorder, "memory", 10_000)
    with torch.autocast(device, enabled=request.param == "autocast"):
        yield request.param


def test_where_steps_are_not_recorded(tokenizer, device, recorder, obstacle):
    model, tokens = model_and_tokens(tokenizer, device)
    calls = []
    if obstacle == "hooks":
        model.multimodal_decoder.norm.register_forward_hook(lambda *arguments: calls.append(arguments))
    session = DecodingSession(model.float(), records_steps=obstacle != "records_steps")
    in_session(session, tokens.float(), tokenizer, GenerationOptions(min_new_tokens=13))
    assert (recorder.num_recorded > 0) == (obstacle == "nothing")
    assert len(calls) == (13 if obstacle == "hooks" else 0)


def test_they_go_with_their_session(tokenizer, device, recorder):
    model, tokens = model_and_tokens(tokenizer, device)
    session = DecodingSession(model)
    in_session(session, tokens, tokenizer)
    graphs = weakref.ref(session._graphs)
    del session
    gc.collect()
    assert graphs() is None


def test_a_model_that_leaves_the_device_gives_its_memory_back(tokenizer, recorder, device, monkeypatch):
    model, tokens = model_and_tokens(tokenizer, device)
    session = DecodingSession(model)
    in_session(session, tokens, tokenizer)
    arena = weakref.ref(session._graphs.arena)
    monkeypatch.delitem(decoding_graphs.RECORDERS, "cpu", raising=False)
    generate(model.cpu(), tokens.cpu(), tokenizer, session=session)
    gc.collect()
    assert arena() is None


def test_the_size_that_is_counted_is_the_arenas(tokenizer):
    model = make_model(tokenizer, {"num_kv_heads": 2, "unimodal_depth": 3})
    size = ArenaSize(images=3, rows=6, entries=14, image_tokens=5)
    arena = DecodingArena(model, size, torch.empty(0, dtype=torch.float64))
    tensors = (*arena.unimodal, *arena.multimodal, *arena.images)
    assert sum(tensor.nbytes for tensor in tensors) == size.num_bytes(model, torch.float64)


def test_rows_of_an_arena_change_places(tokenizer):
    model = make_model(tokenizer)
    arena = DecodingArena(model, ArenaSize(images=4, rows=4, entries=6, image_tokens=5), torch.empty(0))
    cache = arena.new_caches(num_rows=3, entries=5)[0][0]
    cache.memory[:, :, :, :2] = written = torch.randn(2, 3, 4, 2, 8)
    cache.select(torch.tensor([2, 0, 0, 1]))
    assert torch.equal(cache.memory[:, :, :, :2], written[:, [2, 0, 0, 1]])
    assert cache.memory.shape == (2, 4, 4, 5, 8)
    assert cache.memory.untyped_storage().data_ptr() == arena.unimodal[0].untyped_storage().data_ptr()


@pytest.mark.gpu
def test_a_replay_that_differs_is_refused():
    recorder = decoding_graphs.CudaRecorder(torch.device("cuda"))
    x = torch.zeros(8, device="cuda")
    with pytest.raises(RuntimeError, match="differ"):
        recorder(lambda: x.add_(1).clone())


@pytest.mark.gpu
def test_after_a_failed_recording_work_goes_on():
    recorder = decoding_graphs.CudaRecorder(torch.device("cuda"))
    x, stream = torch.zeros(8, device="cuda"), torch.cuda.current_stream()
    before = torch.cuda.memory_allocated()
    with pytest.raises(RuntimeError):
        recorder(lambda: x + float(x.sum()))  # waits for the device
    assert torch.cuda.current_stream() == stream
    assert float(recorder(lambda: x + 1)().sum()) == 8
    assert torch.rand(8, device="cuda").min() >= 0  # no part of PyTorch believes that it is being recorded
    freed = torch.zeros(1 << 20, device="cuda")
    other = torch.cuda.Stream()
    freed.record_stream(other)
    del freed
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() < before + (1 << 20)
