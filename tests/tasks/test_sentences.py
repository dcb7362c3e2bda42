"""Sentences: the text tower learns the directions of a sentence encoder's vectors."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.store.safetensors_file import write_tensors
from opencoca.tasks.sentences import SentenceTeacher, read_sentences, write_sentences
from opencoca.tokenizer import Tokenizer
from opencoca.tokenizer.languages import LanguageText, language_of
from opencoca.train.trainer import Trainer
from train.helpers import tiny_recipe, write_pairs

TEXTS = ["a dog runs", "two men  play\nchess", "ein Hund läuft", ""]


@pytest.fixture(scope="module")
def network() -> CoCa:
    torch.manual_seed(0)
    return CoCa(CoCaConfig.named("tiny")).eval()


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


def test_the_loss_is_zero_where_the_tower_agrees_and_grows_to_two(network: CoCa, tmp_path: Path) -> None:
    """Vectors that are narrower than the tower's are compared with its first channels."""
    path, tokenizer = tmp_path / "s.safetensors", Tokenizer.clip()
    ids = torch.tensor(tokenizer.encode_batch(["a dog runs"], network.config.text.context_length))
    with torch.no_grad():
        cls = network.encode_cls(ids)
    narrow = cls[:, :5]
    for vectors, expected in ((cls, 0.0), (-cls, 2.0), (narrow, 0.0), (-narrow, 2.0)):
        write_sentences(path, ["a dog runs"], vectors)
        loss = SentenceTeacher(path, network, tokenizer, 3).loss(network)
        assert float(loss.detach()) == pytest.approx(3 * expected, abs=1e-2)


def test_wide_vectors_keep_what_tells_them_apart(network: CoCa, tmp_path: Path) -> None:
    """Vectors of rank 4 in more dimensions than the tower has keep their cosines."""
    width = network.config.text.width
    vectors = torch.nn.functional.normalize(torch.randn(9, 4) @ torch.randn(4, 3 * width), dim=1)
    write_sentences(tmp_path / "s.safetensors", [f"text {index}" for index in range(9)], vectors)
    teacher = SentenceTeacher(tmp_path / "s.safetensors", network, Tokenizer.clip(), 2)
    kept = teacher._vectors.float()
    assert kept.shape == (9, width)
    torch.testing.assert_close(kept @ kept.T, vectors @ vectors.T, atol=5e-3, rtol=0)


def test_training_on_sentences_alone_brings_the_tower_to_the_teacher(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 8)
    path = tmp_path / "s.safetensors"
    torch.manual_seed(1)
    write_sentences(
        path, [f"{a} {b}" for a in ("a dog", "a cat", "two men") for b in ("runs", "sits")], torch.randn(6, 8)
    )
    changes = {"task__contrastive_weight": 0.0, "task__caption_weight": 0.0, "task__sentences": str(path)}
    changes |= {"task__sentence_texts": 12, "optimizer__learning_rate": 0.01, "batch_size": 8}
    trainer = Trainer(tiny_recipe(pairs, tmp_path / "run", task__sentence_weight=1.0, **changes))
    assert [term.name for term in trainer.task.terms] == ["sentence"]
    batch = next(iter(trainer.batches.iterate(0)))
    losses = [trainer.step(batch, step + 10, 1000).terms["sentence"] for step in range(40)]
    assert losses[0] > 0.5  # a mean over the drawn texts, not their sum
    assert losses[0] < 1.5
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_a_weight_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task\.sentence_weight needs task\.sentences"):
        tiny_recipe(write_pairs(tmp_path / "pairs", 2), tmp_path / "run", task__sentence_weight=1.0)


@pytest.mark.parametrize("term", ["sentence_weight", "naming_weight", "reward_weight"])
def test_terms_that_fully_sharded_training_cannot_have_are_refused(tmp_path: Path, term: str) -> None:
    changes = {f"task__{term}": 1.0, "task__sentences": "s.safetensors", "distributed__strategy": "fsdp"}
    with pytest.raises(ValueError, match=rf"task\.{term} does not work with distributed\.strategy fsdp; use ddp"):
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
