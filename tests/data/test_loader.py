import dataclasses
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opencoca.data import (
    EpochOrder,
    PreprocessConfig,
    Sample,
    SampleSource,
    TokenizedCaptions,
    TrainingLoader,
    TrainTransform,
    collate_captions,
)
from opencoca.data.captions import choose_captions

from .helpers import WordTokenizer, encode, gradient


class MemorySource(SampleSource):
    """Images in memory, with the captions given; `broken` ones hold rubbish."""

    def __init__(self, captions, broken=()):
        self.all = [tuple(own) for own in captions]
        self.broken = set(broken)
        self.data = [encode(gradient(seed=index)) for index in range(len(self.all))]

    def __len__(self):
        return len(self.all)

    def key(self, index):
        return f"{index}.jpg"

    def read(self, index, *, images=True, texts=True, target=True):
        return Sample((self.open_bytes(index),) if images else (), tuple(self.all[index]))

    def open_bytes(self, index):
        if index in self.broken and index % 2:
            raise FileNotFoundError(2, "No such file", self.key(index))
        return b"rubbish" if index in self.broken else self.data[index]


def captions_of(count, per_image=5):
    return [[f"image {i} text {j}" + " word" * ((i + j) % 4) for j in range(per_image)] for i in range(count)]


def make(source, *, batch_size=4, texts_per_sample=2, tokenizer=None, seed=1, drop_last=True, **options):
    transform = options.pop("transform", TrainTransform(PreprocessConfig(image_size=(16, 16)), color_jitter=0.2))
    order = EpochOrder(len(source), 0, drop_last=drop_last)
    tokenizer = tokenizer or WordTokenizer()
    return TrainingLoader(source, tokenizer, transform, order, batch_size, texts_per_sample, 20, seed, **options)


def assert_same(a, b):
    for field in dataclasses.fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right, field.name


def test_shapes_and_which_text_belongs_to_which_image():
    source, tokenizer = MemorySource(captions_of(10)), WordTokenizer()
    loader = make(source, tokenizer=tokenizer, texts_per_sample=3)
    assert loader.steps_per_epoch == 2
    for batch in loader.batches(stop_epoch=1):
        assert batch.images.shape == (4, 3, 16, 16)
        assert batch.images.dtype == torch.float32
        assert batch.sample_ids.dtype == batch.token_ids.dtype == torch.int64
        assert len(batch.token_ids) == 3 * batch.num_samples
        assert batch.keys == tuple(f"{i}.jpg" for i in batch.sample_ids.tolist())
        assert batch.token_ids.shape == batch.token_mask.shape == (12, int(batch.token_mask.sum(1).max()))
        for row, (ids, mask) in enumerate(zip(batch.token_ids, batch.token_mask, strict=True)):
            assert tokenizer.decode(ids[mask].tolist()) in source.captions(int(batch.sample_ids[row // 3]))
            assert (ids[~mask] == tokenizer.pad_id).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_from_any_position_on_equals_the_whole_run(num_workers):
    source = MemorySource(captions_of(10))
    whole = list(make(source).batches(stop_epoch=3))
    assert len(whole) == 6
    for epoch, step in [(0, 0), (1, 1), (2, 0), (1, 2)]:
        resumed = list(make(source, num_workers=num_workers).batches(epoch, step, stop_epoch=3))
        assert len(resumed) == 6 - (2 * epoch + step)
        for a, b in zip(whole[2 * epoch + step :], resumed, strict=True):
            assert_same(a, b)
    assert_same(make(source).batch(2, 1), whole[5])


def test_endless_and_repeatable():
    loader = make(MemorySource(captions_of(4)))
    first = [batch for _, batch in zip(range(5), loader.batches(), strict=False)]
    assert len(first) == 5
    assert_same(first[0], next(loader.batches()))
    assert not torch.equal(first[0].images, first[1].images)


def test_the_global_generators_are_left_alone():
    """What dropout draws next must not depend on whether a loader was started."""
    loader = make(MemorySource(captions_of(8)))
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    state, legacy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for num_workers in (0, 1):
        loader.num_workers = num_workers
        next(loader.batches())
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(legacy, np.random.get_state()[1])  # noqa: NPY002


def test_two_ranks_see_what_one_sees():
    source, tokenizer = MemorySource(captions_of(11)), WordTokenizer()
    for drop_last in (True, False):
        one = make(source, tokenizer=tokenizer, drop_last=drop_last)
        two = [make(source, tokenizer=tokenizer, rank=r, world_size=2, drop_last=drop_last) for r in range(2)]
        for step in range(one.steps_per_epoch):
            whole, parts = one.batch(1, step), [loader.batch(1, step) for loader in two]
            for name in ("sample_ids", "images", "mirrored"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
            rows = [
                ids[mask].tolist() for part in parts for ids, mask in zip(part.token_ids, part.token_mask, strict=True)
            ]
            assert rows == [ids[mask].tolist() for ids, mask in zip(whole.token_ids, whole.token_mask, strict=True)]


def test_without_pixels_captions_and_mirroring_are_the_same():
    source = MemorySource(captions_of(12), broken=[])
    for with_pixels, without in zip(
        make(source).batches(stop_epoch=2), make(source, load_pixels=False).batches(stop_epoch=2), strict=True
    ):
        assert without.images is None
        assert_same(dataclasses.replace(with_pixels, images=None), without)
    source.open_bytes = None  # not even read
    next(make(source, load_pixels=False, num_workers=2).batches())
    assert not next(make(source, load_pixels=False, transform=None).batches()).mirrored.any()


def test_images_are_mirrored_as_said():
    """With the crop and colours off, a mirrored row is the mirror image of the unmirrored one."""
    source = MemorySource(captions_of(6))
    plain = TrainTransform(PreprocessConfig(image_size=(16, 16)), scale=(1, 1), ratio=(1.5, 1.5), flip_probability=0)
    both = TrainTransform(PreprocessConfig(image_size=(16, 16)), scale=(1, 1), ratio=(1.5, 1.5), flip_probability=0.5)
    seen = set()
    for epoch in range(5):
        a = make(source, transform=plain, batch_size=6).batch(epoch, 0)
        b = make(source, transform=both, batch_size=6).batch(epoch, 0)
        for left, right, mirrored in zip(a.images, b.images, b.mirrored.tolist(), strict=True):
            seen.add(mirrored)
            assert torch.allclose(left.flip(-1) if mirrored else left, right, atol=0.03)
    assert seen == {True, False}


def test_an_image_with_a_side_in_its_caption_is_never_mirrored():
    source = MemorySource([["a dog on the left", "a dog"], ["a cat", "a cat"]] * 4)
    tokenizer = WordTokenizer()
    loader = make(source, tokenizer=tokenizer, texts_per_sample=1, batch_size=8, load_pixels=False)
    mirrored = Counter()
    for epoch in range(150):
        batch = loader.batch(epoch, 0)
        for ids, flag in zip(batch.token_ids.tolist(), batch.mirrored.tolist(), strict=True):
            mirrored[tokenizer.decode([i for i in ids if i]), flag] += 1
    assert mirrored["a dog on the left", True] == 0
    for caption in ("a dog", "a cat"):
        share = mirrored[caption, True] / (mirrored[caption, True] + mirrored[caption, False])
        assert 0.4 < share < 0.6


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**9))
def test_choice_of_captions(available, wanted, seed):
    chosen = choose_captions(available, wanted, np.random.PCG64(seed)).tolist()
    assert chosen == choose_captions(available, wanted, np.random.PCG64(seed)).tolist()
    assert len(chosen) == wanted
    assert set(chosen) <= set(range(available))
    assert len(set(chosen)) == min(available, wanted)
    if wanted >= available:
        assert chosen[:available] == list(range(available))


def test_every_caption_gets_its_turn():
    source, tokenizer = MemorySource(captions_of(2)), WordTokenizer()
    loader = make(source, tokenizer=tokenizer, batch_size=2, texts_per_sample=1, load_pixels=False)
    counts = Counter()
    for epoch in range(500):
        batch = loader.batch(epoch, 0)
        counts.update(
            tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(batch.token_ids, batch.token_mask, strict=True)
        )
    assert set(counts) == {caption for own in source.all for caption in own}
    assert min(counts.values()) > 60


def test_broken_images_are_replaced_by_the_next_good_one():
    source = MemorySource(captions_of(40), broken=[6, 7])
    good = MemorySource(captions_of(40))
    with pytest.warns(UserWarning, match="takes its place") as caught:
        batches = list(make(source, batch_size=8).batches(stop_epoch=2))
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2  # once per file, though met in both epochs
    assert any("'6.jpg'" in message and "takes its place" in message for message in messages)
    assert any("7.jpg" in message for message in messages)
    for got, wanted in zip(batches, make(good, batch_size=8).batches(stop_epoch=2), strict=True):
        expected = [8 if index in (6, 7) else index for index in wanted.sample_ids.tolist()]
        assert got.sample_ids.tolist() == expected
        rows = [row for row, index in enumerate(wanted.sample_ids.tolist()) if index not in (6, 7)]
        assert torch.equal(got.images[rows], wanted.images[rows])


def test_broken_images_are_reported_out_of_worker_processes():
    loader = make(MemorySource(captions_of(40), broken=[6]), batch_size=8, num_workers=2)
    with pytest.warns(UserWarning, match=r"6\.jpg") as caught:
        list(loader.batches(stop_epoch=2))
    assert len(caught) == 1
    assert list(loader.bad_samples.by_index) == [6]


def test_too_many_broken_images_stop_the_run():
    loader = make(MemorySource(captions_of(40), broken=range(10, 15)), batch_size=8)
    with (
        pytest.warns(UserWarning, match="takes its place"),
        pytest.raises(ValueError, match="5 images are broken, more than 10% of the 40"),
    ):
        list(loader.batches(stop_epoch=2))
    everything = make(MemorySource(captions_of(6), broken=range(6)))
    with pytest.raises(ValueError, match="6 images in a row are broken: "):
        everything.batch(0, 0)


def test_images_to_skip_and_images_without_captions():
    captions = captions_of(20)
    captions[3] = []
    with pytest.warns(UserWarning, match="1 of 20 images have no caption, for example '3.jpg'"):
        loader = make(MemorySource(captions, broken=[4]), batch_size=20, skip=[4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = loader.batch(0, 0)
    wanted = EpochOrder(20, 0).take(0, np.arange(20)).tolist()
    assert batch.sample_ids.tolist() == [5 if index in (3, 4) else index for index in wanted]
    with pytest.raises(ValueError, match="none of the 5 images has a caption"):
        make(MemorySource([[]] * 5))
    with pytest.raises(ValueError, match=r"5 of 10 images have no caption, .* more than 10%"):
        make(MemorySource([["x"], []] * 5))
    with pytest.raises(ValueError, match="no image is left"):
        make(MemorySource(captions_of(4)), skip=range(4))


def test_mistakes():
    source = MemorySource(captions_of(6))
    order = EpochOrder(5, 0)
    with pytest.raises(ValueError, match="the order is for 5 images, the source has 6"):
        TrainingLoader(source, WordTokenizer(), None, order, 2, 1, 9, 0, load_pixels=False)
    with pytest.raises(ValueError, match="a transform is needed"):
        make(source, transform=None)
    with pytest.raises(ValueError, match="texts_per_sample must be 0 or more"):
        make(source, texts_per_sample=-1)
    with pytest.raises(ValueError, match="can't be divided between 3"):
        make(source, world_size=3)
    with pytest.raises(ValueError, match="there is no step 2 of 1 in epoch 0"):
        next(make(source).batches(0, 2))


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=9))
def test_collation(rows):
    token_ids, token_mask = collate_captions(rows, pad_id=7)
    assert token_ids.shape == (len(rows), max(map(len, rows)))
    assert [ids[mask].tolist() for ids, mask in zip(token_ids, token_mask, strict=True)] == rows
    assert (token_ids[~token_mask] == 7).all()
    assert (token_mask.int().diff(dim=1) <= 0).all(), "padding stands at the end"


def test_tokenised_captions_in_pieces(monkeypatch):
    monkeypatch.setattr("opencoca.data.captions._CHUNK", 3)
    source, tokenizer = MemorySource([["a b c"], [], ["d", "e f left"], ["g"]]), WordTokenizer()
    captions = TokenizedCaptions(source, tokenizer, 4)
    assert captions.counts().tolist() == [1, 0, 2, 1]
    texts = [tokenizer.decode(captions.token_ids(i).tolist()) for i in range(4)]
    assert texts == ["a b", "d", "e f", "g"]  # cut to the context
    assert captions.sides.tolist() == [False, False, True, False]


def test_batches_move_between_devices():
    batch = make(MemorySource(captions_of(4))).batch(0, 0)
    assert_same(batch.to("cpu"), batch)
    moved = batch.to("meta")
    assert moved.images.device.type == moved.token_mask.device.type == "meta"
    assert moved.keys == batch.keys
