"""Sentences and classes: what the linear branch begins with, and how it is trained."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opencoca.evaluation.prompts import load_imagenet_class_names
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, LinearConfig
from opencoca.store.interop.efficientnet_weights import load_imagenet_classifier
from opencoca.store.safetensors_file import write_tensors
from opencoca.tasks.sentences import read_sentences, start_linear_branch, write_sentences
from opencoca.tokenizer import Tokenizer
from opencoca.tokenizer.languages import LanguageText, language_of
from opencoca.train import train
from opencoca.train.trainer import Trainer
from train.helpers import tiny_recipe, write_pairs

TEXTS = ["a dog runs", "two men  play\nchess", "ein Hund läuft", ""]


def test_texts_and_vectors_come_back(tmp_path: Path) -> None:
    vectors = torch.randn(4, 6)
    write_sentences(tmp_path / "s.safetensors", TEXTS, vectors)
    texts, found = read_sentences(tmp_path / "s.safetensors")
    assert texts == ["a dog runs", "two men play chess", "ein Hund läuft", ""]
    torch.testing.assert_close(found.float(), torch.nn.functional.normalize(vectors, dim=1), atol=1e-3, rtol=0)


def test_texts_keep_the_languages_that_they_know(tmp_path: Path) -> None:
    write_sentences(tmp_path / "s.safetensors", [LanguageText("ein Hund", "de"), "a dog"], torch.eye(2))
    texts, _ = read_sentences(tmp_path / "s.safetensors")
    assert [(str(text), language_of(text)) for text in texts] == [("ein Hund", "de"), ("a dog", None)]


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(FileNotFoundError, match=r"s\.safetensors; make it with scripts/embed_sentences"):
        read_sentences(path)
    text = torch.tensor(list(b"one\ntwo"), dtype=torch.uint8)
    for tensors, problem in (
        ({"vectors": torch.ones(2, 3)}, "no file of sentences"),
        ({"vectors": torch.ones(3, 3), "texts": text}, "2 texts and 3 vectors"),
        ({"vectors": torch.full((2, 3), torch.inf), "texts": text}, "infinities or NaN"),
        ({"vectors": torch.ones(2, 3), "texts": torch.tensor([255, 10], dtype=torch.uint8)}, "not UTF-8"),
    ):
        write_tensors(path, tensors)
        with pytest.raises(ValueError, match=problem):
            read_sentences(path)


def with_branch(dim: int, class_dim: int = 0, image: str = "efficientnet_lite0") -> CoCa:
    torch.manual_seed(0)
    config = replace(CoCaConfig.named("tiny"), linear=LinearConfig(dim, class_dim))
    kind = replace(config.image, name=image, image_size=(64, 64), patch_size=16)
    return CoCa(replace(config, image=kind)).eval()


def test_words_begin_with_what_the_sentences_tell(tmp_path: Path) -> None:
    """Vectors that are linear in words are found: texts that were never seen lie where they should."""
    path, tokenizer, network = tmp_path / "s.safetensors", Tokenizer.clip(), with_branch(6)
    branch = network.linear_branch
    assert branch is not None
    names = ["dog", "cat", "man", "runs", "sits", "sleeps"]
    meanings = torch.eye(6)
    texts = [f"{names[a]} {names[b]}" for a in range(3) for b in range(3, 6)]
    vectors = torch.stack([meanings[a] + meanings[b] for a in range(3) for b in range(3, 6)])
    write_sentences(path, texts[:-1], vectors[:-1])
    assert start_linear_branch(network, tokenizer, path).startswith("words from 8 sentences: mean cosine 0.99")
    ids = torch.tensor(tokenizer.encode_batch(texts[-1:], network.config.text.context_length))
    found = branch.text_vectors(ids)
    torch.testing.assert_close(found, torch.nn.functional.normalize(vectors[-1:], dim=1), atol=0.1, rtol=0)


def test_wide_vectors_keep_what_tells_them_apart(tmp_path: Path) -> None:
    """Vectors of rank 4 in more dimensions than the branch has keep their cosines; narrow ones leave the rest at 0."""
    vectors = torch.nn.functional.normalize(torch.randn(9, 4) @ torch.randn(4, 12), dim=1)
    texts = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    write_sentences(tmp_path / "s.safetensors", texts, vectors)
    tokenizer = Tokenizer.clip()
    ids = [torch.tensor(row) for row in tokenizer.encode_batch(texts, 64)]
    for dim in (5, 20):
        network = with_branch(dim)
        start_linear_branch(network, tokenizer, tmp_path / "s.safetensors")
        assert network.linear_branch is not None
        found = torch.cat([network.linear_branch.text_vectors(row[None]) for row in ids])
        torch.testing.assert_close(found @ found.T, vectors @ vectors.T, atol=0.1, rtol=0)
        if dim > vectors.shape[1]:
            assert not network.linear_branch.word_embed.weight[torch.cat(ids), vectors.shape[1] :].any()


def test_names_lie_where_the_classifier_looks(tmp_path: Path) -> None:
    """A class's name is nearest to what the classifier's weights of it become; a sentence that names none is short."""
    path, tokenizer, network = tmp_path / "s.safetensors", Tokenizer.clip(), with_branch(4, 200)
    branch = network.linear_branch
    assert branch is not None
    assert branch.class_proj is not None
    people = [
        f"{who} {what} {where}" for who in ("two", "they", "we") for what in ("meet", "talk") for where in ("here",)
    ]
    write_sentences(path, people, torch.randn(len(people), 4))
    start_linear_branch(network, tokenizer, path)
    encoder = network.image_encoder
    weights, _ = load_imagenet_classifier(encoder)  # pyright: ignore[reportArgumentType]
    kept = branch.class_proj.weight.detach()
    torch.testing.assert_close(kept @ kept.T, torch.eye(len(kept)), atol=1e-4, rtol=0)
    classes = torch.nn.functional.normalize((weights - weights.mean(dim=0)) @ kept.T, dim=1)
    chosen = [1, 282, 504, 817, 963]
    names = [load_imagenet_class_names()[index] for index in chosen]
    length = network.config.text.context_length

    def named(text: str) -> torch.Tensor:
        return branch.text_vectors(torch.tensor(tokenizer.encode_batch([text], length)))[0, 4:].detach()

    for index, name in zip(chosen, names, strict=True):
        found = named(f"a photo of a {name}.")
        assert int((classes @ found).argmax()) == index
        assert float(found.norm()) > 10 * max(float(named(text).norm()) for text in people)


def test_what_cannot_begin_is_refused(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "s.safetensors", Tokenizer.clip()
    write_sentences(path, ["a dog"], torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"task\.sentences needs a network with a linear branch"):
        start_linear_branch(CoCa(CoCaConfig.named("tiny")), tokenizer, path)
    with pytest.raises(ValueError, match=r"class_dim needs an image encoder with a classifier .* set it to 0"):
        start_linear_branch(with_branch(4, 8, image="vit"), tokenizer, path)


def test_a_linear_branch_trains_alone_or_beside_the_deep_encoder(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 8)
    linear = {"model__linear": {"dim": 16}, "optimizer__learning_rate": 0.01, "batch_size": 8}
    alone = {"task__contrastive_of": "linear", "task__caption_weight": 0.0}
    for changes in (alone, {}):
        trainer = Trainer(tiny_recipe(pairs, tmp_path / f"run{len(changes)}", **linear, **changes))
        model = trainer.model
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        batch = next(iter(trainer.batches.iterate(0)))
        losses = [trainer.step(batch, step + 10, 1000).terms["contrastive"] for step in range(30)]
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
        far = {name: float((t - before[name]).abs().max()) for name, t in model.state_dict().items()}
        moved = {name.split(".")[0] for name, distance in far.items() if distance > 0}
        assert far["linear_branch.word_embed.weight"] > 0.01
        assert far["linear_branch.image_proj.weight"] > 0.01
        assert "linear_branch" in moved
        assert (moved == {"linear_branch"}) == bool(changes)


def test_a_branch_alone_needs_a_branch_and_nothing_else(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 2)
    with pytest.raises(ValueError, match="trains the linear branch alone"):
        tiny_recipe(pairs, tmp_path / "run", task__contrastive_of="linear")
    recipe = tiny_recipe(pairs, tmp_path / "run", task__contrastive_of="linear", task__caption_weight=0.0)
    with pytest.raises(ValueError, match=r"contrastive_of linear needs a network with a linear branch"):
        Trainer(recipe)


def test_a_continued_run_begins_nothing_anew(tmp_path: Path) -> None:
    """What a checkpoint holds replaces it: the file of sentences may be gone."""
    pairs, path = write_pairs(tmp_path / "pairs", 8), tmp_path / "s.safetensors"
    write_sentences(path, ["a dog", "two men"], torch.randn(2, 8))
    changes = {"model__linear": {"dim": 8}, "task__sentences": str(path), "epochs": 2, "batch_size": 8}
    train(tiny_recipe(pairs, tmp_path / "run", **changes, max_steps=1))
    path.unlink()
    train(tiny_recipe(pairs, tmp_path / "run", **changes), continue_with=["max_steps"])
    with pytest.raises(FileNotFoundError, match=r"s\.safetensors"):
        train(tiny_recipe(pairs, tmp_path / "new", **changes))


def test_classes_that_nothing_is_fitted_to_are_refused(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 2)
    with pytest.raises(ValueError, match=r"class_dim is fitted .* where a training has task\.sentences"):
        Trainer(tiny_recipe(pairs, tmp_path / "run", model__linear={"dim": 8, "class_dim": 4}))


@pytest.mark.parametrize("key", ["task.reward_weight", "model.linear.dim"])
def test_what_fully_sharded_training_cannot_have_is_refused(tmp_path: Path, key: str) -> None:
    value = {"model__linear": {"dim": 8}} if key == "model.linear.dim" else {"task__reward_weight": 1.0}
    changes = {**value, "distributed__strategy": "fsdp"}
    with pytest.raises(ValueError, match=rf"{key} does not work with distributed\.strategy fsdp; use ddp"):
        tiny_recipe(write_pairs(tmp_path / "pairs", 2), tmp_path / "run", **changes)


def test_the_script_stores_the_mean_over_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tokenizer of whole words and an encoder that looks up a vector for each."""
    onnx = pytest.importorskip("onnx")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "a": 1, "dog": 2, "runs": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
    helper, types = onnx.helper, onnx.TensorProto
    graph = helper.make_graph(
        [helper.make_node("Gather", ["table", "input_ids"], ["states"])],
        "lookup",
        [helper.make_tensor_value_info("input_ids", types.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("states", types.FLOAT, ["b", "t", 2])],
        [helper.make_tensor("table", types.FLOAT, table.shape, table.flatten().tolist())],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "captions.csv").write_text("image,caption\n1.jpg,a dog runs\n2.jpg,a dog\n3.jpg,a  dog\n")
    table = "caption,english,lang\nein Hund,a dog,de\nein Hund,runs,de\nsie,,de\na,a,en\n"
    (tmp_path / "translated.csv").write_text(table)
    script = Path(__file__).parents[2] / "scripts" / "embed_sentences.py"
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[list[str], torch.Tensor]:
        encoder = ["--onnx", "model.onnx", "--tokenizer", "tokenizer.json"]
        monkeypatch.setattr(sys, "argv", [str(script), "out.safetensors", *arguments, *encoder])
        runpy.run_path(str(script), run_name="__main__")
        texts, vectors = read_sentences(tmp_path / "out.safetensors")
        return texts, vectors.float()

    def directions(*rows: list[float]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.tensor(rows), dim=1)

    texts, vectors = run("captions.csv")
    assert texts == ["a dog runs", "a dog"]
    torch.testing.assert_close(vectors, directions([1.0, 4.0], [1.0, 1.0]), atol=1e-3, rtol=0)
    texts, vectors = run("translated.csv", "--meaning", "english", "--language", "lang")
    assert [(str(text), language_of(text)) for text in texts] == [("ein Hund", "de"), ("a", "en")]
    mean = [0.5**0.5, 0.5**0.5 + 1.0]
    torch.testing.assert_close(vectors, directions(mean, [1.0, 0.0]), atol=1e-3, rtol=0)
    with pytest.raises(SystemExit, match=r"captions\.csv has no column 'english'; it has image, caption"):
        run("captions.csv", "--meaning", "english")
