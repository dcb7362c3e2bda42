"""A tokenizer.json of unknown origin: what is sound loads, what would harm is refused before the library reads it."""

import base64
import json
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from opencoca.tokenizer import Tokenizer, train_tokenizer
from opencoca.tokenizer.charsmap import charsmap_growth
from opencoca.tokenizer.patterns import is_safe_pattern
from opencoca.tokenizer.tokenizer import MAX_TEXT_LENGTH

Change = Callable[[dict[str, Any]], object]


def content() -> dict[str, Any]:
    return json.loads(train_tokenizer(["a dog runs", "a dog sleeps"], 265).to_json())


def load(tmp_path: Path, changed: dict[str, Any] | str) -> Tokenizer:
    file = tmp_path / "tokenizer.json"
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    return Tokenizer.load(file)


def charsmap(texts: bytes = b"bc\0", size: int | None = None, text_start: int = 0, far: int = 0) -> str:
    """SentencePiece's table of one rule: a becomes the text. Unit 1 ^ "a" is that of the letter, its child the leaf."""
    units = [0] * 256
    units[0] = 1 << 10  # the children of the root stand at 1 ^ letter
    letter = 1 ^ ord("a")
    units[letter] = ord("a") | 1 << 8 | (2 + far) << 10
    units[letter ^ 2] = 1 << 31 | text_start
    packed = struct.pack("<256I", *units)
    return base64.b64encode(struct.pack("<I", len(packed) if size is None else size) + packed + texts).decode()


def test_a_sound_table_of_characters_loads_and_is_used(tmp_path: Path):
    changed = content()
    changed["normalizer"]["normalizers"].insert(0, {"type": "Precompiled", "precompiled_charsmap": charsmap()})
    assert load(tmp_path, changed).normalize("xa.") == "xbc"
    assert charsmap_growth(charsmap()) == 2


@pytest.mark.parametrize(
    "table",
    [
        "////////AAAA",
        "CAAAAAAAAAAAAAA=",
        "",
        "no base64!",
        charsmap(size=2**31),
        charsmap(size=1022),
        charsmap(text_start=3),
        charsmap(far=2000),
        charsmap(texts=b"bc"),
        charsmap(texts=b"\xff\0"),
        charsmap(texts="\u00e9\0".encode(), text_start=1),
        charsmap(texts=b"b" * 150 + b"\0"),
    ],
)
def test_a_table_of_characters_with_false_sizes_is_refused(tmp_path: Path, table: str):
    refused(tmp_path, lambda file: file.update(normalizer={"type": "Precompiled", "precompiled_charsmap": table}))


def refused(tmp_path: Path, change: Change) -> str:
    changed = content()
    change(changed)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "tokenizer.json"))) as caught:
        load(tmp_path, changed)
    sentence = str(caught.value)
    assert len(sentence) < 230 + len(str(tmp_path))
    assert sentence.isprintable()
    return sentence


def replace(text: str, pattern: str = ".") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": text}


UNDECLARED = [{"SpecialToken": {"id": "zz", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
HARMFUL: dict[str, Change] = {
    "padding to a length": lambda file: file["padding"].update(strategy={"Fixed": 2**40}),
    "padding to multiples": lambda file: file["padding"].update(pad_to_multiple_of=2**40),
    "another number for padding": lambda file: file["padding"].update(pad_id=2**64),
    "an undeclared token": lambda file: file["post_processor"].update(single=UNDECLARED),
    "an undeclared token of a pair": lambda file: file["post_processor"].update(pair=UNDECLARED),
    "the text twice": lambda file: file["post_processor"]["single"].append(UNDECLARED[1]),
    "an id outside of the vocabulary": lambda file: file["post_processor"]["special_tokens"]["<end>"].update(ids=[999]),
    "a long search": lambda file: file.update(pre_tokenizer=split("(a|a|aa)+$|(.*.*.*.*.*.*.*.*)*x")),
    "growth": lambda file: file.update(normalizer={"type": "Sequence", "normalizers": [replace("aaaaaaaaaaaa")] * 2}),
    "growth by form": lambda file: file.update(normalizer=replace("\ufdfa" * 8)),
    "growth in bytes": lambda file: file.update(pre_tokenizer=sequence([file["pre_tokenizer"]] * 8)),
    "growth when decoding": lambda file: file.update(
        decoder={"type": "Sequence", "decoders": [replace("aaaaaaaa")] * 3}
    ),
    "a long text": lambda file: file["normalizer"]["normalizers"][-1].update(prepend="a" * 10**6),
    "many components": lambda file: file.update(pre_tokenizer=sequence([{"type": "Whitespace"}] * 33)),
    "an unknown component": lambda file: file.update(pre_tokenizer={"type": "Delegate\x1b[2J" * 100}),
    "an unknown field": lambda file: file["pre_tokenizer"].update({"more\n" * 100: 1}),
    "cut words": lambda file: file["decoder"]["decoders"][-1].update(start=2**40),
    "cut ends": lambda file: file["decoder"]["decoders"][-1].update(stop=1),
    "cut tokens": lambda file: file["model"].update(continuing_subword_prefix="####"),
    "a vocabulary of nothing": lambda file: file["model"].update(vocab={}),
    "a long token": lambda file: file["model"]["vocab"].update({"a" * 20_000: len(file["model"]["vocab"])}),
    "a vocabulary without the unknown": lambda file: file.update(model={"type": "WordLevel", "vocab": {"a": 0}}),
    "no model": lambda file: file.update(model=[]),
    "a part that is a number": lambda file: file.update(normalizer=5),
}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def sequence(parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": parts}


@pytest.mark.parametrize("harm", HARMFUL)
def test_what_would_harm_is_refused(tmp_path: Path, harm: str):
    refused(tmp_path, HARMFUL[harm])


def test_json_that_is_deep_or_says_things_twice_is_refused(tmp_path: Path):
    for text in ("[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, '{"model": {}, "model": {}}', "1" * 10_000):
        with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
            load(tmp_path, text)


SAFE = {
    "GPT-2's": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "with numbers in threes": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}]+[\r\n]*|\s*[\r\n]+|\s+",
    "spaces": r" {2,}",
    "ours": r"(?<![\p{White_Space}.])[\p{White_Space}.]++\z",
}


@pytest.mark.parametrize("name", SAFE)
def test_known_expressions_are_safe_and_quick(name: str):
    assert is_safe_pattern(SAFE[name])
    splitter = tokenizers.pre_tokenizers.Split(tokenizers.Regex(SAFE[name]), "isolated")
    start = time.perf_counter()
    for text in ("a" * 2000, " " * 2000, ". " * 1000, "'" * 2000, "\n " * 1000):
        splitter.pre_tokenize_str(text)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "pattern",
    ["(a*)*b", "(a|a)+", "a*a*a*b", ".*.*x", "a?a?a?a?b", "(?=a+)b", r"(a)\1", "(?:a*)+", "a{50000}", "(", "[", ""],
)
def test_expressions_that_may_take_long_are_not_safe(pattern: str):
    assert not is_safe_pattern(pattern)


def test_a_failure_inside_of_the_library_is_a_sentence(tmp_path: Path):
    """A word without an id: the library notices when a text has it."""
    changed = content()
    words = {"<pad>": 0, "<start>": 1, "<end>": 2, "a": 3}
    changed["model"] = {"type": "Unigram", "unk_id": None, "vocab": [[word, -1.0] for word in words]}
    tokenizer = load(tmp_path, changed)
    with pytest.raises(ValueError, match="cannot encode"):
        tokenizer.encode("dogs")
    with pytest.raises(ValueError, match="cannot encode"):
        tokenizer(["dogs"], 8)


def test_the_rest_of_a_very_long_text_is_not_read():
    tokenizer = train_tokenizer(["a dog"], 259, strip_final_period=False)
    assert tokenizer.encode("a" * (MAX_TEXT_LENGTH + 5)) == tokenizer.encode("a" * MAX_TEXT_LENGTH)
