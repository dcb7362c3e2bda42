import threading
import time

import numpy as np
import pytest
import torch

from opencoca.data import EvalTransform, PreprocessConfig, decode_image, iterate_images, open_source
from opencoca.data.read_ahead import batches_ahead, one_ahead, parallel_map

from .helpers import gradient, write_images

TRANSFORM = EvalTransform(PreprocessConfig(image_size=(8, 12)))


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, [f"{number}.jpg" for number in range(7)])
    return tmp_path


@pytest.mark.parametrize("num_workers", [None, 0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_every_image_once_in_order(folder, num_workers, batch_size):
    batches = list(iterate_images(open_source(folder), TRANSFORM, batch_size, num_workers))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(7))
    assert {len(batch.indices) for batch in batches[:-1]} <= {batch_size}
    pixels = torch.cat([batch.pixels for batch in batches])
    expected = torch.stack([TRANSFORM(decode_image(folder / f"{number}.jpg")) for number in range(7)])
    assert torch.equal(pixels, expected)


def test_broken_images_are_reported_instead(folder):
    (folder / "2.jpg").write_bytes(b"rubbish")
    source = open_source(folder)
    (folder / "5.jpg").unlink()
    batches = list(iterate_images(source, TRANSFORM, 3, 2))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1], [3, 4], [6]]
    assert [len(batch.pixels) for batch in batches] == [2, 2, 1]
    errors = [error for batch in batches for error in batch.errors]
    assert [index for index, _ in errors] == [2, 5]
    assert "'2.jpg'" in errors[0][1]
    assert "5.jpg" in errors[1][1]


def test_only_broken_images(folder):
    (folder / "0.jpg").write_bytes(b"")
    (batch,) = iterate_images([folder / "0.jpg", folder / "none.jpg"], TRANSFORM, 4, 1)
    assert batch.pixels.shape == (0, 3, 8, 12)
    assert len(batch.errors) == 2
    assert "0.jpg': the file is empty" in batch.errors[0][1]
    assert "none.jpg': there is no such file" in batch.errors[1][1]
    assert list(iterate_images([], TRANSFORM, 4, 1)) == []


def test_paths(folder):
    gradient().convert("L").save(folder / "grey.png")
    paths = [folder / "1.jpg", str(folder / "2.jpg"), folder / "grey.png"]
    (batch,) = iterate_images(paths, TRANSFORM, 8, 2)
    assert torch.equal(batch.pixels, torch.stack([TRANSFORM(decode_image(path)) for path in paths]))


def test_mistakes(folder):
    with pytest.raises(ValueError, match="batch_size must be 1 or more, got 0"):
        iterate_images([], TRANSFORM, 0)
    with pytest.raises(ValueError, match="num_workers must be 0 or more"):
        list(iterate_images([], TRANSFORM, 1, -1))


def test_work_is_ahead_of_the_consumer_but_bounded():
    begun = []
    results = parallel_map(lambda item: begun.append(item) or item, range(100), num_threads=2, window=6)
    assert next(results) == 0
    deadline = time.monotonic() + 60
    while len(begun) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(begun) == 6
    threads = threading.active_count()
    results.close()
    assert threading.active_count() < threads
    assert len(begun) <= 8


def test_order_is_kept_and_errors_arrive():
    delays = np.random.default_rng(0).uniform(0, 0.004, 40)
    assert list(parallel_map(lambda i: time.sleep(delays[i]) or i, range(40), 8, 16)) == list(range(40))
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(lambda item: 1 / item, [1, 0, 1], 2, 4))


@pytest.mark.parametrize("num_threads", [0, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 30])
def test_batches_ahead_are_the_results_in_order(num_threads, batch_size):
    batches = list(batches_ahead(lambda item: item * item, range(21), batch_size, num_threads))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert [result for batch in batches for result in batch] == [item * item for item in range(21)]
    assert not list(batches_ahead(lambda item: item, [], batch_size, num_threads))


def test_two_batches_are_under_way_and_none_after_closing():
    begun = []
    batches = batches_ahead(lambda item: begun.append(item) or item, range(100), 3, 2)
    assert next(batches) == [0, 1, 2]
    assert len(begun) <= 9
    threads = threading.active_count()
    batches.close()
    assert threading.active_count() < threads


def test_one_ahead_works_while_the_caller_does_and_closes_what_it_reads():
    made, closed = [], []

    def items():
        try:
            for number in range(5):
                made.append(number)
                yield number
        finally:
            closed.append(True)

    assert list(one_ahead(items(), 5)) == [0, 1, 2, 3, 4]
    assert closed == [True]
    made.clear()
    early = one_ahead(items(), 5)
    assert next(early) == 0
    deadline = time.monotonic() + 60
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [0, 1]
    early.close()
    assert closed == [True, True]
