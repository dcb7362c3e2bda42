"""Classes and answers: from folders, tables, shards and Hugging Face's imagefolder, checked, packed, and in batches."""

import dataclasses
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opencoca.data import (
    EpochOrder,
    JoinedSource,
    LabelSource,
    PreprocessConfig,
    Sample,
    Subset,
    TrainingLoader,
    TrainTransform,
    check_source,
    format_report,
    open_labelled,
    open_source,
    pack_shards,
)
from opencoca.data.shards import scan_shard
from opencoca.data.targets import parse_target

from .helpers import WordTokenizer, encode, gradient, write_images
from .test_shards import write_tar
from .test_sources import write_table

FORMATS = [".csv", ".tsv", ".jsonl", ".parquet"]
NAMES = ["cat/0.jpg", "cat/1.jpg", "dog/0.jpg"]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path / "images", NAMES)
    return tmp_path / "images"


def targets(source):
    return {source.key(index): source.target(index) for index in range(len(source))}


class TestWhatALabelIs:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            ("cat", "cat"),
            (" red fox ", "red fox"),
            ("", None),
            (None, None),
            (float("nan"), None),
            (7, "7"),
            (np.float64(7.0), "7"),
            (True, "true"),
            ([], None),
            (["cat"], "cat"),
            (["cat", "cat", ""], "cat"),
            (["cat", "dog", "cat", "cat"], {"cat": 0.75, "dog": 0.25}),
            ({"yes": 1, "no": 0.3}, {"yes": 1.0, "no": 0.3}),
            ({"yes": 1, "no": None}, {"yes": 1.0}),
            ([("yes", 0.5)], {"yes": 0.5}),  # a map of a Parquet file
            ('["cat", "dog"]', '["cat", "dog"]'),
        ],
    )
    def test_of_all_kinds(self, value, expected):
        assert parse_target(value, "here") == expected

    def test_json_in_a_cell(self):
        assert parse_target('["cat", "dog"]', "here", parse_json=True) == {"cat": 0.5, "dog": 0.5}
        assert parse_target('{"yes": 0.9}', "here", parse_json=True) == {"yes": 0.9}
        assert parse_target("[a dog]", "here", parse_json=True) == "[a dog]"

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (0.5, r"line 3 has a label .* float \(0.5\)"),
            ([["cat"]], "line 3 has a label .* list"),
            ({"yes": 3}, r"line 3 gives the answer 'yes' the weight 3; weights are numbers in 0\.\.1"),
            ({"yes": -0.1}, "the weight -0.1"),
            ({"yes": True}, "the weight True"),
            ({"yes": float("nan")}, "the weight nan"),
            ({"yes": "1"}, "the weight '1'"),
        ],
    )
    def test_what_is_refused(self, value, message):
        with pytest.raises(ValueError, match=message):
            parse_target(value, "line 3")

    @given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=10))
    def test_weights_of_a_list_are_its_shares(self, names):
        target = parse_target(names, "here")
        weights = {target: 1.0} if isinstance(target, str) else target
        assert weights == pytest.approx({name: names.count(name) / len(names) for name in names})


class TestFolders:
    def test_the_folder_of_an_image_is_its_class(self, folder):
        assert targets(open_source(folder, labels="folders")) == {name: name[:3] for name in NAMES}
        assert set(targets(open_source(folder)).values()) == {None}

    def test_a_split_by_its_path_or_all_at_once(self, tmp_path):
        write_images(tmp_path, [f"{split}/{name}" for split in ("train", "test") for name in NAMES])
        assert targets(open_source(tmp_path / "train", labels="folders")) == {name: name[:3] for name in NAMES}
        assert set(targets(open_source(tmp_path, labels="folders")).values()) == {"cat", "dog"}

    def test_an_image_in_no_folder_has_no_class(self, folder):
        write_images(folder, ["loose.jpg"])
        assert targets(open_source(folder, labels="folders"))["loose.jpg"] is None
        with pytest.raises(ValueError, match=r"'loose\.jpg' lies in .* not in a sub-folder"):
            open_labelled(folder)

    def test_with_captions_of_a_table(self, folder, tmp_path):
        table = write_table(tmp_path / "t.csv", [("dog/0.jpg", "a dog runs")])
        source = open_source(folder, table, "folders")
        assert source.read(0) == Sample(((folder / "dog/0.jpg").read_bytes(),), ("a dog runs",), "dog")


class TestTables:
    @pytest.mark.parametrize("suffix", FORMATS)
    def test_a_column_of_labels(self, folder, tmp_path, suffix):
        table = write_table(tmp_path / f"t{suffix}", [("cat/0.jpg", "cat"), ("dog/0.jpg", "")], ("image", "label"))
        assert targets(open_source(folder, labels=table)) == {"cat/0.jpg": "cat", "dog/0.jpg": None}

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_numbers_and_other_names_of_columns(self, folder, tmp_path, suffix):
        table = write_table(tmp_path / f"t{suffix}", [("cat/0.jpg", 0), ("dog/0.jpg", 12)], ("file", "class"))
        source = open_source(folder, labels=table, image_column="file", label_column="class")
        assert targets(source) == {"cat/0.jpg": "0", "dog/0.jpg": "12"}

    @pytest.mark.parametrize("suffix", FORMATS)
    def test_captions_and_labels_of_one_table(self, folder, tmp_path, suffix):
        rows = [("cat/0.jpg", "a cat", "cat"), ("cat/0.jpg", "it sleeps", "cat"), ("dog/0.jpg", "a dog", "dog")]
        table = write_table(tmp_path / f"t{suffix}", rows, ("image", "caption", "label"))
        source = open_source(folder, table, table)
        assert [source.captions(index) for index in range(2)] == [("a cat", "it sleeps"), ("a dog",)]
        assert targets(source) == {"cat/0.jpg": "cat", "dog/0.jpg": "dog"}
        assert set(targets(open_source(folder, table)).values()) == {None}

    def test_captions_and_labels_of_two_tables(self, folder, tmp_path):
        captions = write_table(tmp_path / "c.csv", [("dog/0.jpg", "a dog"), ("cat/1.jpg", "a cat")])
        labels = write_table(tmp_path / "l.jsonl", [("cat/0.jpg", "cat"), ("dog/0.jpg", "dog")], ("image", "labels"))
        source = open_source(folder, captions, labels)
        assert targets(source) == {"dog/0.jpg": "dog", "cat/1.jpg": None, "cat/0.jpg": "cat"}
        assert [source.captions(index) for index in range(3)] == [("a dog",), ("a cat",), ()]

    @pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
    def test_answers_in_a_list(self, folder, tmp_path, suffix):
        table = write_table(tmp_path / f"t{suffix}", [("cat/0.jpg", ["yes", "no", "yes", "yes"])], ("image", "label"))
        assert targets(open_source(folder, labels=table)) == {"cat/0.jpg": {"yes": 0.75, "no": 0.25}}

    def test_answers_with_weights(self, folder, tmp_path):
        (tmp_path / "t.jsonl").write_text('{"image": "cat/0.jpg", "label": {"yes": 0.9, "no": 0.3}}')
        (tmp_path / "t.csv").write_text('image,label\ncat/0.jpg,"{""yes"": 0.9, ""no"": 0.3}"\n')
        weights = pa.array([[("yes", 0.9), ("no", 0.3)]], pa.map_(pa.string(), pa.float64()))
        pq.write_table(pa.table({"image": ["cat/0.jpg"], "label": weights}), tmp_path / "t.parquet")
        for suffix in (".jsonl", ".csv", ".parquet"):
            source = open_source(folder, labels=tmp_path / f"t{suffix}")
            assert targets(source) == {"cat/0.jpg": {"yes": 0.9, "no": 0.3}}

    def test_rows_of_one_image_are_joined(self, folder, tmp_path):
        rows = [("cat/0.jpg", "cat"), ("cat/0.jpg", "pet"), ("cat/0.jpg", "cat"), ("cat/0.jpg", "")]
        table = write_table(tmp_path / "t.csv", rows, ("image", "label"))
        assert targets(open_source(folder, labels=table)) == {"cat/0.jpg": {"cat": 2 / 3, "pet": 1 / 3}}
        mixed = write_table(tmp_path / "m.csv", [*rows, ("cat/0.jpg", '{"cat": 1}')], ("image", "label"))
        with pytest.raises(ValueError, match=r"rows of '.*m\.csv' give 'cat/0.jpg' different answers"):
            open_source(folder, labels=mixed)

    @pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
    @pytest.mark.parametrize("column", ["image", "images"])
    def test_several_images_a_sample(self, folder, tmp_path, suffix, column):
        rows = [
            (["cat/0.jpg", "dog/0.jpg"], "both are cats", "false"),
            (["cat/1.jpg", "cat/0.jpg"], "two cats", "true"),
        ]
        table = write_table(tmp_path / f"t{suffix}", rows, (column, "caption", "label"))
        source = open_source(folder, table, table)
        assert targets(source) == {"cat/0.jpg + dog/0.jpg": "false", "cat/1.jpg + cat/0.jpg": "true"}
        data = {name: (folder / name).read_bytes() for name in NAMES}
        assert source.read(1) == Sample((data["cat/1.jpg"], data["cat/0.jpg"]), ("two cats",), "true")
        assert source.open_bytes(0) == data["cat/0.jpg"]
        assert source.place(1).file == str(folder / "cat/1.jpg")

    def test_one_missing_image_of_a_pair(self, folder, tmp_path):
        rows = [(["cat/0.jpg", "gone.jpg"], "x"), (["cat/1.jpg", "cat/0.jpg"], "y")]
        table = write_table(tmp_path / "t.jsonl", rows, ("images", "label"))
        with pytest.raises(FileNotFoundError, match=r"1 of the 2 images .*: gone\.jpg"):
            open_source(folder, labels=table)
        source = open_source(folder, labels=table, strict=False)
        assert targets(source) == {"cat/1.jpg + cat/0.jpg": "y"}
        assert source.missing_images == ("gone.jpg",)

    @pytest.mark.parametrize(
        ("name", "data", "message"),
        [
            ("t.csv", "image,label\ncat/0.jpg,\n", r"the table '.*t\.csv' holds no labels"),
            ("t.csv", "image,kind\ncat/0.jpg,x\n", "has no column 'label'; its columns are: 'image', 'kind'"),
            ("t.jsonl", '{"image": "cat/0.jpg", "label": 0.5}', r"line 1 of '.*t\.jsonl' has a label"),
            ("t.jsonl", '{"image": "cat/0.jpg", "label": {"a": 2}}', r"line 1 of '.*t\.jsonl' gives the answer 'a'"),
        ],
    )
    def test_unusable_labels_name_their_place(self, folder, tmp_path, name, data, message):
        (tmp_path / name).write_text(data)
        with pytest.raises(ValueError, match=message):
            open_source(folder, labels=tmp_path / name)

    def test_every_image_has_one_class(self, folder, tmp_path):
        blank = write_table(tmp_path / "b.csv", [("cat/0.jpg", "cat"), ("dog/0.jpg", "")], ("image", "label"))
        with pytest.raises(ValueError, match=r"'dog/0\.jpg' has no label"):
            open_labelled(folder, blank)
        twice = write_table(tmp_path / "t.csv", [("cat/0.jpg", "cat"), ("cat/0.jpg", "pet")], ("image", "label"))
        with pytest.raises(ValueError, match=r"'cat/0.jpg' has 2 labels \(cat, pet\)"):
            open_labelled(folder, twice)


class TestImagefolder:
    def test_captions_and_labels_of_its_metadata(self, folder):
        (folder / "metadata.csv").write_text("file_name,text,label\ndog/0.jpg,a dog,dog\ncat/0.jpg,a cat,\n")
        source = open_source(folder)
        assert targets(source) == {"dog/0.jpg": "dog", "cat/0.jpg": None}
        assert source.captions(1) == ("a cat",)

    def test_labels_alone(self, folder):
        rows = [{"file_name": name, "label": number} for number, name in enumerate(NAMES)]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        assert targets(open_source(folder)) == {name: str(number) for number, name in enumerate(NAMES)}

    def test_what_is_named_goes_first(self, folder, tmp_path):
        (folder / "metadata.csv").write_text("file_name,text\ndog/0.jpg,a dog\n")
        table = write_table(tmp_path / "t.csv", [("cat/0.jpg", "a cat")])
        assert list(targets(open_source(folder, table))) == ["cat/0.jpg"]
        assert targets(open_source(folder, labels="folders")) == {name: name[:3] for name in NAMES}

    def test_a_table_of_something_else_is_no_metadata(self, folder):
        (folder / "metadata.csv").write_text("camera,lens\nx,y\n")
        assert list(targets(open_source(folder))) == NAMES


class TestShards:
    def members(self, number, **parts):
        suffixes = {"label": "cls", "details": "json", "text": "txt"}
        own = [(f"{number:05d}.{suffixes[name]}", value.encode()) for name, value in parts.items()]
        return [(f"{number:05d}.jpg", encode(gradient(seed=number))), *own]

    def scan_without_classes(self, path, chosen):
        index = scan_shard(path)
        return dataclasses.replace(index, members=index.members[:, :3])

    def write(self, tmp_path, *samples):
        members = [member for number, parts in enumerate(samples) for member in self.members(number, **parts)]
        return write_tar(tmp_path / "0.tar", members)

    def test_where_labels_come_from(self, tmp_path):
        path = self.write(
            tmp_path,
            {"label": "7\n"},
            {"details": '{"label": "cat"}'},
            {"label": "3", "details": '{"label": {"yes": 0.5}}'},
            {"details": '{"label": ["a", "b"], "caption": "x"}', "text": "y"},
            {"details": '{"label": null}'},
            {},
        )
        source = open_source(path)
        assert list(targets(source).values()) == ["7", "cat", {"yes": 0.5}, {"a": 0.5, "b": 0.5}, None, None]
        assert source.read(3)[1:] == (("x",), {"a": 0.5, "b": 0.5})
        assert source.read(0, images=False) == Sample((), (), "7")
        assert source.read(3, images=False, target=False) == Sample((), ("x",), None)

    def test_other_fields_and_labels_stored_as_captions(self, tmp_path):
        path = self.write(tmp_path, {"details": '{"tags": ["a", "b"], "caption": "x"}'}, {"text": "c"})
        assert list(targets(open_source(path, label_column="tags")).values()) == [{"a": 0.5, "b": 0.5}, None]
        assert list(targets(open_source(path, label_column="caption")).values()) == ["x", "c"]

    def test_folders_in_keys(self, tmp_path):
        data = encode(gradient())
        path = write_tar(tmp_path / "0.tar", [("cat/0.jpg", data), ("1.jpg", data)])
        assert list(targets(open_source(path, labels="folders")).values()) == ["cat", None]

    def test_an_unusable_label_names_its_place_and_spoils_nothing_else(self, tmp_path):
        source = open_source(self.write(tmp_path, {"details": '{"label": 0.5, "caption": "x"}'}))
        with pytest.raises(ValueError, match=r"the sample '00000' of '.*0\.tar' has a label .* float \(0\.5\)"):
            source.target(0)
        assert source.read(0, target=False).texts == ("x",)

    def test_a_table_of_labels_goes_first(self, tmp_path):
        path = self.write(tmp_path, {"label": "7", "text": "x"}, {"label": "8"})
        source = open_source(path, labels=write_table(tmp_path / "l.csv", [("00000", "9")], ("image", "label")))
        assert targets(source) == {"00000": "9"}
        assert source.captions(0) == ("x",)

    def test_an_index_made_before_classes_were_looked_for_is_made_again(self, tmp_path, monkeypatch):
        path = self.write(tmp_path, {"label": "7"}, {"label": "8"})
        with monkeypatch.context() as patch:
            patch.setattr("opencoca.data.shard_index._VERSION", 2)
            patch.setattr("opencoca.data.shard_index.scan_shard", self.scan_without_classes)
            assert list(targets(open_source(path)).values()) == [None, None]
        assert list(targets(open_source(path)).values()) == ["7", "8"]


def test_parts_and_joins_of_sources_keep_targets(folder):
    source = open_source(folder, labels="folders")
    part = Subset(source, [2, 0])
    assert targets(part) == {"dog/0.jpg": "dog", "cat/0.jpg": "cat"}
    assert part.read(0).target == "dog"
    joined = JoinedSource([part, source])
    assert [joined.target(index) for index in range(5)] == ["dog", "cat", "cat", "cat", "dog"]
    assert joined.read(4, images=False) == Sample((), (), "dog")
    assert LabelSource(joined).target(0) == "dog"


# data check and data pack


@pytest.fixture
def labelled(folder, tmp_path):
    """Captions, a class, answers with weights, and an image without a label."""
    rows = [
        {"image": "cat/0.jpg", "caption": "a cat", "label": "house cat"},
        {"image": "cat/1.jpg", "caption": "a cat again", "label": {"yes": 0.9, "nö": 0.1}},
        {"image": "dog/0.jpg", "caption": "a dog", "label": None},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_source(folder, tmp_path / "t.jsonl", tmp_path / "t.jsonl")


def test_a_round_trip_through_shards(labelled, tmp_path):
    pack_shards(labelled, tmp_path / "out", samples_per_shard=2, progress=False)
    packed = open_source(tmp_path / "out")
    assert [packed.read(index) for index in range(3)] == [labelled.read(index) for index in range(3)]
    assert targets(packed) == targets(labelled)
    pack_shards(packed, tmp_path / "again", samples_per_shard=2, progress=False)
    for name in ("00000.tar", "00001.tar", "pack.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_other_labels_are_another_data_set(labelled, folder, tmp_path):
    pack_shards(labelled, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="was packed from other images, captions or labels"):
        pack_shards(open_source(folder, tmp_path / "t.jsonl"), tmp_path / "out", progress=False)


def test_pairs_do_not_go_into_shards(folder, tmp_path):
    table = write_table(tmp_path / "t.jsonl", [(["cat/0.jpg", "dog/0.jpg"], "x")], ("images", "label"))
    with pytest.raises(ValueError, match="has 2 images; tar shards hold one a sample"):
        pack_shards(open_source(folder, labels=table), tmp_path / "out", progress=False)


def test_check_counts_targets(labelled):
    report = check_source(labelled, progress=False)
    assert (report.num_images, report.num_targets) == (3, 2)
    assert report.classes == (("house cat", 1),)
    assert report.answers == (("yes", 1), ("nö", 1))
    assert report.images_without_target == ("dog/0.jpg",)
    assert report.errors
    assert report.errors["images without label"] == ("dog/0.jpg",)
    json.dumps(report.to_dict())


def test_the_printed_report_names_the_most_frequent_and_the_rarest(tmp_path):
    counts = {"a": 4, "b": 3, "c": 2, "d": 1}
    write_images(tmp_path, [f"{name}/{number}.jpg" for name, count in counts.items() for number in range(count)])
    report = check_source(open_source(tmp_path, labels="folders"), progress=False)
    assert report.classes == tuple(counts.items())
    assert not report.errors
    text = format_report(report)
    assert "images with a label" in text
    assert "4; most frequent: a (4), b (3), c (2); rarest: d (1), c (2), b (3)" in text
    assert "label" not in format_report(check_source(open_source(tmp_path), progress=False))


def test_check_looks_at_every_image_of_a_sample(folder, tmp_path):
    (folder / "dog/0.jpg").write_bytes(b"no image")
    table = write_table(tmp_path / "t.jsonl", [(["cat/0.jpg", "dog/0.jpg"], "x")], ("images", "label"))
    report = check_source(open_source(folder, labels=table), progress=False)
    assert [key for key, _ in report.broken_images] == ["cat/0.jpg + dog/0.jpg"]
    assert report.formats == {"JPEG": 1}


def test_check_goes_on_after_an_unusable_label(tmp_path):
    path = write_tar(tmp_path / "0.tar", TestShards().members(0, details='{"label": 0.5}'))
    report = check_source(open_source(path), progress=False)
    assert [key for key, _ in report.unusable_targets] == ["00000"]
    assert "has a label that is neither text nor a whole number" in format_report(report)
    assert report.errors


# batches

CLASSES = {"cat": 0, "dog": 1}


def class_of(target):
    if not isinstance(target, str) or target not in CLASSES:
        raise ValueError(f"{target!r} is not a class")
    return np.asarray(CLASSES[target])


def loader(source, *, texts=0, encode=class_of, batch_size=3, drop_last=True, **options):
    transform = TrainTransform(PreprocessConfig(image_size=(8, 8)))
    order = EpochOrder(len(source), 0, drop_last=drop_last)
    tokenizer = WordTokenizer() if texts else None
    return TrainingLoader(
        source, tokenizer, transform, order, batch_size, texts, 20, 1, encode_target=encode, **options
    )


class TestBatches:
    def test_classes_without_texts(self, folder):
        source = open_source(folder, labels="folders")
        batch = loader(source).batch(0, 0)
        assert batch.targets is not None
        assert batch.targets.dtype == torch.int64
        assert batch.targets.tolist() == [CLASSES[key[:3]] for key in batch.keys]
        assert batch.token_ids.shape == (0, 0)
        assert loader(source, encode=None).batch(0, 0).targets is None

    def test_crops_do_not_depend_on_targets(self, folder):
        source = open_source(folder, labels="folders")
        assert torch.equal(loader(source).batch(0, 0).images, loader(source, encode=None).batch(0, 0).images)

    def test_weights_beside_texts(self, labelled):
        answers = ("yes", "nö")

        def weights_of(target):
            return np.array([dict(target)[name] for name in answers], dtype=np.float32)

        source = Subset(labelled, [1])
        batch = loader(source, texts=2, encode=weights_of, batch_size=1).batch(0, 0)
        assert batch.targets is not None
        assert batch.targets.tolist() == [pytest.approx([0.9, 0.1])]
        assert batch.targets.dtype == torch.float32
        assert len(batch.token_ids) == 2 * batch.num_samples

    def test_from_shards_in_workers(self, folder, tmp_path):
        pack_shards(open_source(folder, labels="folders"), tmp_path / "out", progress=False)
        source = open_source(tmp_path / "out")
        for workers in (0, 2):
            batch = next(loader(source, num_workers=workers).batches())
            assert batch.targets is not None
            assert batch.targets.tolist() == [CLASSES[key[:3]] for key in batch.keys]

    def test_samples_without_a_usable_target_are_bad_and_replaced(self, folder, tmp_path):
        rows = [("cat/0.jpg", "cat"), ("cat/1.jpg", ""), ("dog/0.jpg", "wolf")]
        source = open_source(folder, labels=write_table(tmp_path / "t.csv", rows, ("image", "label")))
        batches = loader(source, max_bad_share=1.0)
        with pytest.warns(UserWarning, match="another image takes its place"):
            batch = batches.batch(0, 0)
        assert batch.keys == ("cat/0.jpg",) * 3
        assert {index: bad.reason for index, bad in batches.bad_samples.by_index.items()} == {
            1: "the image 'cat/1.jpg' has no label",
            2: "the image 'dog/0.jpg': 'wolf' is not a class",
        }

    def test_too_many_bad_ones_stop_the_run(self, folder, tmp_path):
        rows = [("cat/0.jpg", "cat"), ("cat/1.jpg", ""), ("dog/0.jpg", "")]
        source = open_source(folder, labels=write_table(tmp_path / "t.csv", rows, ("image", "label")))
        with pytest.raises(ValueError, match="2 images are broken"), pytest.warns(UserWarning, match="has no label"):
            loader(source).batch(0, 0)

    def test_pairs_of_images(self, folder, tmp_path):
        pairs = [["cat/0.jpg", "dog/0.jpg"], ["dog/0.jpg", "cat/1.jpg"], ["cat/1.jpg", "cat/0.jpg"]]
        rows = [(pair, f"text {number}", "cat") for number, pair in enumerate(pairs)]
        table = write_table(tmp_path / "t.jsonl", rows, ("images", "caption", "label"))
        source = open_source(folder, table, table)
        batch = loader(source, texts=1, images_per_sample=2, batch_size=3).batch(0, 0)
        assert batch.images is not None
        assert (batch.images_per_sample, batch.images.shape) == (2, (6, 3, 8, 8))
        assert not torch.equal(batch.images[0], batch.images[1])
        with pytest.raises(ValueError, match=r"in a row are broken: .* has 2 images instead of 1"):
            loader(source).batch(0, 0)

    def test_an_empty_share_is_of_the_same_kind(self, folder):
        source = open_source(folder, labels="folders")
        shares = [
            loader(source, batch_size=4, drop_last=False, rank=rank, world_size=4).batch(0, 0) for rank in range(4)
        ]
        assert sorted(share.num_samples for share in shares) == [0, 1, 1, 1]
        for share in shares:
            assert share.images is not None
            assert share.targets is not None
            assert share.images.shape[1:] == (3, 8, 8)
            assert share.targets.dtype == torch.int64
            blank = share.stand_in()
            assert blank.images is not None
            assert (blank.num_samples, blank.images.shape) == (1, (1, 3, 8, 8))
            assert blank.token_ids.shape == (0, 0)


def test_labels_are_read_without_their_images(folder):
    source = open_source(folder, labels="folders")
    for name in NAMES:
        os.remove(folder / name)
    batch = loader(source, load_pixels=False).batch(0, 0)
    assert batch.images is None
    assert batch.targets is not None
    assert batch.targets.tolist() == [CLASSES[key[:3]] for key in batch.keys]
