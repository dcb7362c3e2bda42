"""The whole model: one pass equals its parts, a half switched off costs nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from opencoca.generation.decoding.session import DecodingSession
from opencoca.losses import captioning_loss, contrastive_loss
from opencoca.model.coca import CoCa

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1], [0, 1, 0, 0, 0], [0] * 5]) > 0

VARIANTS = [
    {},
    {"block": "parallel", "num_kv_heads": 1, "positions": "rotary", "activation": "swiglu", "norm_bias": False},
    {"num_kv_heads": 2, "self_attn_mlp": True, "tie_embeddings": True},
    {"pooler": {"arrangement": "parallel"}, "positions": "rotary"},
    {"pooler": {"arrangement": "shared"}},
    {"pooler": {"num_queries": 0}, "width": 8, "num_heads": 2},
]


def inputs(images: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(images, 3, 12, 12), torch.randint(0, 37, MASK.shape)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_one_pass_equals_its_parts(make_model, variant: dict):
    model = make_model(**variant)
    images, ids = inputs()
    with torch.no_grad():
        output = model(images, ids, MASK)
        image, text = model.encode_image(images), model.encode_text(ids, MASK)
        hidden = model.decode(text.words, image.tokens)
        logits = model.logits(images, ids, MASK)
    torch.testing.assert_close(output.image_embed, image.embed)
    torch.testing.assert_close(output.text_embed, text.embed)
    for embed, count in ((output.image_embed, 3), (output.text_embed, 6)):
        assert embed.shape == (count, 8)
        torch.testing.assert_close(embed.norm(dim=1), torch.ones(count))
    # Words with a next word, text by text, and that next word.
    states, predicted, nexts = [], [], []
    for row in range(6):
        words = ids[row][MASK[row]].tolist()
        for place in range(len(words) - 1):
            states.append(hidden[row, place])
            predicted.append(logits[row, place])
            nexts.append(words[place + 1])
    assert output.next_ids.tolist() == nexts
    torch.testing.assert_close(output.hidden, torch.stack(states), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.lm_head(output.hidden), torch.stack(predicted), atol=1e-4, rtol=1e-4)


lengths = st.lists(st.integers(0, 7), min_size=1, max_size=5)


@given(lengths)
@settings(max_examples=50)
def test_labels_are_the_next_real_words(make_model, counts: list[int]):
    model = make_model(unimodal_depth=1, multimodal_depth=1)
    width = max(counts)
    ids = torch.arange(width * len(counts)).view(len(counts), width) % 37
    mask = torch.arange(width) < torch.tensor(counts)[:, None]
    with torch.no_grad():
        output = model(torch.randn(1, 3, 12, 12), ids, mask)
    expected = [word for row, count in enumerate(counts) for word in ids[row, 1:count].tolist()]
    assert output.next_ids.tolist() == expected
    assert output.hidden.shape == (len(expected), 16)
    assert output.hidden.isfinite().all()


def test_texts_without_a_next_word_train_without_nan(make_model):
    model = make_model().train()
    output = model(torch.randn(2, 3, 12, 12), torch.zeros(2, 1, dtype=torch.long))
    loss = captioning_loss(output.hidden, output.next_ids, model.lm_head.weight)
    loss = loss + contrastive_loss(output.image_embed, output.text_embed, output.logit_scale)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def calls_of(modules: dict[str, nn.Module]) -> tuple[dict[str, int], list]:
    """Counts the forward calls of all leaves below each module."""
    counts = dict.fromkeys(modules, 0)
    handles = []
    for name, module in modules.items():
        for leaf in module.modules():
            if not list(leaf.children()):

                def hook(*_: object, name: str = name) -> None:
                    counts[name] += 1

                handles.append(leaf.register_forward_hook(hook))
    return counts, handles


@pytest.mark.parametrize("arrangement", ["cascade", "parallel"])
def test_a_half_switched_off_costs_nothing_and_leaves_the_other_as_it_is(make_model, arrangement: str):
    model = make_model(pooler={"arrangement": arrangement})
    poolers = model.image_pooling.poolers
    counts, _ = calls_of(
        {
            "multimodal": model.multimodal_decoder,
            "head": model.lm_head,
            "caption pooler": poolers.caption_pooler,
            "contrastive pooler": poolers.contrastive_pooler,
            "image_proj": model.image_proj,
            "text_proj": model.text_proj,
        }
    )
    unimodal_rows: list[int] = []
    model.unimodal_decoder.blocks[0].norm1.register_forward_hook(lambda _m, _i, out: unimodal_rows.append(len(out)))

    def run(**halves: bool):
        counts.update(dict.fromkeys(counts, 0))
        unimodal_rows.clear()
        with torch.no_grad():
            output = model(images, ids, MASK, **halves)
        return output, {name for name, count in counts.items() if count}, unimodal_rows[0]

    images, ids = inputs()
    words, texts = int(MASK.sum()), len(MASK)
    both, called, rows = run()
    assert called == {*counts} - {"head"}  # the head is the loss's
    assert rows == words + texts

    contrastive, called, _ = run(captioning=False)
    needed = {"caption pooler"} if arrangement == "cascade" else set()
    assert called == {"contrastive pooler", "image_proj", "text_proj"} | needed
    assert contrastive.hidden is None
    assert contrastive.next_ids is None
    assert torch.equal(contrastive.image_embed, both.image_embed)
    assert torch.equal(contrastive.text_embed, both.text_embed)

    captioning, called, rows = run(contrastive=False)
    assert called == {"multimodal", "caption pooler"}
    assert rows == words  # no [CLS] is computed
    assert captioning.image_embed is None
    assert captioning.text_embed is None
    torch.testing.assert_close(captioning.hidden, both.hidden, atol=1e-5, rtol=1e-5)
    assert torch.equal(captioning.next_ids, both.next_ids)


def test_stored_features_of_any_stage_give_the_same_output(make_model):
    model = make_model()
    images, ids = inputs()
    with torch.no_grad():
        whole = model(images, ids, MASK)
        for stage in range(model.image_encoder.num_stages + 1):
            features = model.image_encoder.run_stages(images, 0, stage)
            output = model(features, ids, MASK, from_stage=stage)
            assert torch.equal(output.image_embed, whole.image_embed)
            assert torch.equal(output.hidden, whole.hidden)


def test_captions_of_one_image_equal_the_image_repeated(make_model):
    model = make_model()
    images, ids = inputs(images=2)
    with torch.no_grad():
        shared, repeated = model(images, ids, MASK), model(images.repeat_interleave(3, dim=0), ids, MASK)
    torch.testing.assert_close(shared.hidden, repeated.hidden, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shared.image_embed.repeat_interleave(3, dim=0), repeated.image_embed)
    with pytest.raises(ValueError, match="6 texts cannot be shared out evenly among 4 images"):
        model(torch.randn(4, 3, 12, 12), ids, MASK)


def test_temperature_starts_as_configured_and_is_clamped(make_model):
    model = make_model()
    assert model.logit_scale.item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        model.log_logit_scale.fill_(math.log(99.0))
    assert model.logit_scale.item() == pytest.approx(99, rel=1e-5)
    with torch.no_grad():
        model.log_logit_scale.fill_(10.0)
    assert model.logit_scale.item() == 100
    assert model(*inputs(), MASK).logit_scale.item() == 100


def test_both_losses_reach_every_parameter(make_model):
    for variant in VARIANTS:
        model = make_model(**variant).train()
        images, ids = inputs()
        output = model(images, ids, MASK)
        loss = captioning_loss(output.hidden, output.next_ids, model.lm_head.weight)
        (loss + contrastive_loss(output.image_embed, output.text_embed, output.logit_scale)).backward()
        missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert missing == []


def test_low_precision_training_is_close_to_full(make_model):
    model = make_model()
    images, ids = inputs()
    full = model(images, ids, MASK)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(images, ids, MASK)
    assert low.hidden.dtype == torch.bfloat16 or low.hidden.dtype == torch.float32
    assert low.image_embed.dtype == torch.float32
    assert low.text_embed.dtype == torch.float32
    for a, b in ((full.image_embed, low.image_embed), (full.text_embed, low.text_embed), (full.hidden, low.hidden)):
        similarity = torch.nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)
        assert similarity.min() > 0.99


class LargestOutput(TorchDispatchMode):
    """Remembers the most elements any operation's result had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_a_training_step_has_no_tensor_of_words_by_vocabulary(make_model):
    model = make_model(vocab_size=5000).train()
    ids = torch.randint(0, 5000, (16, 12))
    with LargestOutput() as largest:
        output = model(torch.randn(16, 3, 12, 12), ids)
        captioning_loss(output.hidden, output.next_ids, model.lm_head.weight, chunk_words=16).backward()
    assert largest.elements <= 5000 * 16  # a chunk, or the vocabulary matrix; all words would be 16 x 11 x 5000
    with LargestOutput() as largest, torch.no_grad():
        model.logits(torch.randn(16, 3, 12, 12), ids)
    assert largest.elements == 16 * 12 * 5000  # the measure does see one


def test_eight_pairs_are_learned_by_heart(make_config):
    begin, end = 1, 2
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 12, 12, generator=generator)
    captions = [
        [begin, *torch.randint(3, 37, (int(n),), generator=generator).tolist(), end]
        for n in torch.randint(3, 9, (8,), generator=generator)
    ]
    width = max(map(len, captions))
    ids = torch.tensor([caption + [0] * (width - len(caption)) for caption in captions])
    mask = torch.arange(width) < torch.tensor([len(caption) for caption in captions])[:, None]
    model = CoCa(make_config(width=32, mlp_width=64, image={"width": 32, "mlp_width": 64})).train()
    optimizer = AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        output = model(images, ids, mask)
        loss = contrastive_loss(output.image_embed, output.text_embed, output.logit_scale)
        loss = loss + 2 * captioning_loss(output.hidden, output.next_ids, model.lm_head.weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        image, text = model.encode_image(images), model.encode_text(ids, mask)
        similarity = image.embed @ text.embed.T
        session = DecodingSession(model)
        state = session.start(image.tokens)
        words = [torch.full((8,), begin)]
        for _ in range(width - 1):
            words.append(session.step(words[-1][:, None], state).argmax(dim=1))
    written = torch.stack(words, dim=1).tolist()
    assert [row[: row.index(end) + 1] if end in row else row for row in written] == captions
    assert similarity.argmax(dim=0).tolist() == list(range(8))
    assert similarity.argmax(dim=1).tolist() == list(range(8))
