"""Every method of a batch, for all kinds of samples: several images or texts each, none, and with targets."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opencoca.data import Batch


def make(samples: int = 5, images: int = 1, texts: int = 1, *, targets: bool = False, seed: int = 0) -> Batch:
    """Every tensor holds different values in every row."""
    generator = torch.Generator().manual_seed(seed)
    length = 6 if texts else 0
    mask = torch.arange(length) < torch.randint(2, 7, (samples * texts, 1), generator=generator)
    return Batch(
        sample_ids=torch.randperm(100, generator=generator)[:samples],
        images=torch.randn(samples * images, 3, 4, 5, generator=generator),
        token_ids=torch.randint(1, 1000, (samples * texts, length), generator=generator),
        token_mask=mask,
        targets=torch.rand(samples, 7, generator=generator) if targets else None,
        mirrored=torch.arange(samples) % 3 == 0,
        keys=tuple(f"sample {number}" for number in range(samples)),
        from_stage=2,
        images_per_sample=images,
    )


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}


SHAPES = pytest.mark.parametrize(
    ("images", "texts", "targets"), [(1, 1, False), (3, 2, True), (1, 0, True), (2, 0, False)]
)


@SHAPES
def test_counts(images: int, texts: int, targets: bool) -> None:
    batch = make(5, images, texts, targets=targets)
    assert (batch.num_samples, batch.images_per_sample) == (5, images)
    assert batch.num_tokens == sum(row.count(True) for row in batch.token_mask.tolist())


@SHAPES
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8])
def test_parts_are_even_and_give_back_every_row_in_order(images: int, texts: int, targets: bool, parts: int) -> None:
    batch = make(5, images, texts, targets=targets)
    pieces = batch.split(parts)
    sizes = [piece.num_samples for piece in pieces]
    assert len(pieces) == parts
    assert max(sizes) - min(sizes) <= 1
    assert all(len(piece.token_ids) == texts * piece.num_samples for piece in pieces)
    assert all((piece.from_stage, piece.images_per_sample) == (2, images) for piece in pieces)
    for name, whole in tensors(batch).items():
        assert torch.equal(torch.cat([tensors(piece)[name] for piece in pieces]), whole), name
    assert sum((piece.keys for piece in pieces), ()) == batch.keys


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(1, 3), st.integers(0, 3))
def test_micro_batches_have_the_sizes_they_are_given(sizes: list[int], images: int, texts: int) -> None:
    batch = replace(make(sum(sizes), images, texts, targets=True), micro_batch_sizes=tuple(sizes))
    pieces = batch.split(len(sizes))
    assert [piece.num_samples for piece in pieces] == sizes
    assert all(piece.micro_batch_sizes == () for piece in pieces)
    start = 0
    for piece in pieces:
        rows = slice(start, start + piece.num_samples)
        assert torch.equal(piece.sample_ids, batch.sample_ids[rows])
        assert piece.targets is not None
        assert torch.equal(piece.targets, batch.targets[rows])  # pyright: ignore[reportOptionalSubscript]
        assert torch.equal(piece.images, batch.images[rows.start * images : rows.stop * images])  # pyright: ignore
        assert torch.equal(piece.token_ids, batch.token_ids[rows.start * texts : rows.stop * texts])
        start = rows.stop


def test_sizes_that_do_not_add_up_are_a_mistake_of_the_caller() -> None:
    for sizes in ((2, 2), (2, 2, 1)):
        with pytest.raises(AssertionError):
            replace(make(5), micro_batch_sizes=sizes).split(2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_device_gets_every_field(dtype: torch.dtype) -> None:
    batch = replace(make(5, 2, 3, targets=True), micro_batch_sizes=(3, 2))
    batch = replace(batch, images=batch.images.to(dtype))  # pyright: ignore[reportOptionalMemberAccess]
    moved = batch.to("cpu", non_blocking=True)
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if field.name == "images":
            assert after.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert torch.equal(after, before.to(after.dtype))
        elif isinstance(before, torch.Tensor):
            assert torch.equal(after, before)
            assert after.dtype == before.dtype
        else:
            assert after == before
    elsewhere = batch.to("meta")
    assert {tensor.device.type for tensor in tensors(elsewhere).values()} == {"meta"}
    assert elsewhere.micro_batch_sizes == (3, 2)


def test_a_batch_without_images_moves_too() -> None:
    batch = replace(make(), images=None).to("cpu")
    assert batch.images is None
    assert batch.split(2)[0].images is None
    assert batch.stand_in().images is None


@SHAPES
@pytest.mark.parametrize("empty", [False, True])
def test_a_stand_in_is_one_blank_sample_of_the_same_kind(images: int, texts: int, targets: bool, empty: bool) -> None:
    batch = make(5, images, texts, targets=targets)
    if empty:
        batch = batch.split(6)[-1]
        assert batch.num_samples == 0
    blank = batch.stand_in()
    assert blank.num_samples == 1
    assert blank.images is not None
    assert blank.images.shape == (images, 3, 4, 5)
    assert not blank.images.any()
    assert blank.token_ids.shape == ((1, 2) if texts else (0, 0))
    assert blank.token_mask.all()
    assert (blank.targets is not None) == targets
    assert blank.targets is None or (blank.targets.shape == (1, 7) and not blank.targets.any())
    assert (blank.from_stage, blank.images_per_sample) == (2, images)
    assert {name: value.dtype for name, value in tensors(blank).items()} == {
        name: value.dtype for name, value in tensors(batch).items()
    }


def test_rows_that_belong_to_no_sample_are_a_mistake_of_the_caller() -> None:
    batch = make(4)
    for wrong in ({"images_per_sample": 2}, {"token_ids": batch.token_ids[:3]}, {"targets": torch.zeros(3)}):
        with pytest.raises(AssertionError):
            replace(batch, **wrong)


@pytest.mark.gpu
def test_pinned_memory_keeps_every_field() -> None:
    batch = replace(make(5, 2, 3, targets=True), micro_batch_sizes=(3, 2))
    pinned = batch.pin_memory()
    assert all(tensor.is_pinned() for tensor in tensors(pinned).values())
    assert all(torch.equal(tensors(pinned)[name], value) for name, value in tensors(batch).items())
    assert (pinned.keys, pinned.micro_batch_sizes) == (batch.keys, (3, 2))
