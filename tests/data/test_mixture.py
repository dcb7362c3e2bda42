from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from opencoca.data import (
    BlockOrder,
    EpochOrder,
    LabelSource,
    MixedOrder,
    MixedSource,
    PreprocessConfig,
    ShardStorage,
    TarShards,
    TrainingLoader,
    TrainTransform,
    make_order,
    open_source,
)

from .helpers import WordTokenizer, write_images
from .test_shards import sample, write_tar


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "photos", [f"{number}.jpg" for number in range(12)])
    rows = "".join(f"{number}.jpg,photo {number}\n" for number in range(12))
    (tmp_path / "photos.csv").write_text("image,caption\n" + rows)
    return open_source(tmp_path / "photos", tmp_path / "photos.csv")


@pytest.fixture
def shards(tmp_path):
    path = tmp_path / "shards"
    path.mkdir()
    members = [member for number in range(8) for member in sample(number, f"shard {number}")]
    return TarShards([write_tar(path / "0.tar", members)], storage=ShardStorage(block_samples=3))


@pytest.fixture
def classes(tmp_path):
    names = [f"{label}/{number}.jpg" for label in ("red_fox", "snow_owl") for number in range(5)]
    write_images(tmp_path / "classes", names)
    return LabelSource(open_source(tmp_path / "classes", labels="folders"), ("a photo of {}.", "look: {}"))


def loader(source, **options):
    order = make_order(source, 3, drop_last=False)
    return TrainingLoader(source, WordTokenizer(), None, order, 6, 2, 20, 3, load_pixels=False, **options)


def texts(batch, tokenizer):
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(batch.token_ids, batch.token_mask, strict=True)]


def test_which_order_a_source_gets(folder, shards):
    assert type(make_order(folder, 0)) is EpochOrder
    assert type(make_order(shards, 0)) is EpochOrder
    assert type(make_order(shards, 0, by_blocks=True)) is BlockOrder
    assert type(make_order(folder, 0, by_blocks=True)) is EpochOrder
    assert shards.block_starts.tolist() == [0, 3, 6]
    shards.is_remote = True
    assert type(make_order(shards, 0)) is BlockOrder
    assert type(make_order(shards, 0, by_blocks=False)) is EpochOrder
    assert type(make_order(MixedSource([folder, shards], [1, 1]), 0)) is MixedOrder


def test_a_mixture_of_all_kinds(folder, shards, classes):
    source = MixedSource([folder, shards, classes], [1, 2, 0.5])
    np.testing.assert_allclose(source.shares, np.array([12, 16, 5]) / 33)
    order = make_order(source, 3, drop_last=False)
    tokenizer = WordTokenizer()
    batches = TrainingLoader(source, tokenizer, None, order, 6, 1, 20, 3, load_pixels=False)
    seen = Counter()
    for batch in batches.batches(stop_epoch=40):
        for key, text in zip(batch.keys, texts(batch, tokenizer), strict=True):
            kind = {"photo": "folder", "shard": "shards"}.get(text.split()[0], "classes")
            assert kind == "classes" or int(text.split()[1]) == int(Path(key).stem), (key, text)
            seen[kind] += 1
    total = sum(seen.values())
    for kind, share in zip(("folder", "shards", "classes"), source.shares, strict=True):
        assert abs(seen[kind] / total - share) < 0.02


def test_captions_read_with_the_image_give_the_same_batches(tmp_path, folder):
    """A folder, whose captions are tokenised beforehand, and shards packed from it, whose captions aren't."""
    from opencoca.data import pack_shards

    pack_shards(folder, tmp_path / "packed", progress=False)
    packed, tokenizer = open_source(tmp_path / "packed"), WordTokenizer()
    assert folder.captions_in_memory
    assert not packed.captions_in_memory
    transform = TrainTransform(PreprocessConfig(image_size=(16, 16)))
    for load_pixels in (True, False):
        a, b = (
            TrainingLoader(s, tokenizer, transform, EpochOrder(12, 0), 4, 2, 20, 1, load_pixels=load_pixels)
            for s in (folder, packed)
        )
        for left, right in zip(a.batches(stop_epoch=2), b.batches(stop_epoch=2), strict=True):
            assert left.keys == right.keys
            assert left.token_ids.tolist() == right.token_ids.tolist()
            assert left.mirrored.tolist() == right.mirrored.tolist()
            assert not load_pixels or bool((left.images == right.images).all())


def test_weights_must_make_sense(folder):
    for weights in ([], [1, 1], [0], [-1], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="weights"):
            MixedSource([folder], weights)


# labels


def test_labels_are_shuffled_joined_and_prompted(tmp_path):
    write_images(tmp_path / "i", ["a.jpg", "b.jpg"])
    (tmp_path / "t.jsonl").write_text(
        '{"image": "a.jpg", "tags": ["dog", "big_ball", "grass"]}\n{"image": "b.jpg", "tags": "cat"}\n'
    )
    images = open_source(tmp_path / "i", labels=tmp_path / "t.jsonl", label_column="tags")
    source = LabelSource(images, prompts=("a photo of {}.", "{}"), separator=" and ")
    assert source.target(0) == dict.fromkeys(("dog", "big_ball", "grass"), 1 / 3)
    assert source.captions(0) == ("a photo of dog and big ball and grass.",)
    drawn = Counter()
    for seed in range(600):
        first, second = source.draw_texts(0, source.read(0), 2, np.random.PCG64(seed))
        assert [first, second] == source.draw_texts(0, source.read(0, images=False), 2, np.random.PCG64(seed))
        drawn[first] += 1
        assert sorted(first.removeprefix("a photo of ").removesuffix(".").split(" and ")) == [
            "big ball",
            "dog",
            "grass",
        ]
    assert len(drawn) == 12  # 6 orders in 2 prompts
    assert min(drawn.values()) > 25
    assert set(source.draw_texts(1, source.read(1, images=False), 4, np.random.PCG64(0))) <= {"a photo of cat.", "cat"}


def test_folders_as_labels(classes):
    assert classes.target(0) == "red_fox"
    assert classes.captions(0) == ("a photo of red fox.",)
    assert {classes.target(index) for index in range(10)} == {"red_fox", "snow_owl"}
    tokenizer = WordTokenizer()
    order = make_order(classes, 0)
    batches = TrainingLoader(classes, tokenizer, None, order, 10, 1, 20, 0, load_pixels=False)
    first, second = batches.batch(0, 0), batches.batch(1, 0)
    expected = {
        "red_fox": {"a photo of red fox.", "look: red fox"},
        "snow_owl": {"a photo of snow owl.", "look: snow owl"},
    }
    for batch in (first, second):
        for key, text in zip(batch.keys, texts(batch, tokenizer), strict=True):
            assert text in expected[key.split("/")[0]]
    assert batches.batch(0, 0).token_ids.tolist() == first.token_ids.tolist()


def test_images_without_a_label_are_bad(tmp_path):
    write_images(tmp_path, ["x/a.jpg", "x/c.jpg", "b.jpg"])
    source = LabelSource(open_source(tmp_path, labels="folders"))
    order = make_order(source, 0)
    batches = TrainingLoader(source, WordTokenizer(), None, order, 3, 1, 20, 0, load_pixels=False, max_bad_share=0.5)
    with pytest.warns(UserWarning, match=r"'b.jpg' has no caption"):
        assert set(batches.batch(0, 0).keys) == {"x/a.jpg", "x/c.jpg"}


@pytest.mark.parametrize("prompts", [(), ("no place",), ("{} and {}",)])
def test_prompts_need_one_place(classes, prompts):
    with pytest.raises(ValueError, match="prompt"):
        LabelSource(classes, prompts=prompts)
