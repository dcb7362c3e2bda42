"""Write caption_facts.json: what pycocoevalcap 1.2 says of the captions in caption_examples.py.

Needs Java and ``pip install pycocoevalcap==1.2``, not opencoca::

    python tests/evaluation/make_caption_facts.py
"""

import json
from pathlib import Path

from caption_examples import HARD_CAPTIONS, example_captions
from pycocoevalcap_peer import peer_scores, peer_tokens

NOTE = (
    "Made by make_caption_facts.py with pycocoevalcap 1.2 (Stanford CoreNLP 3.4.1's PTBTokenizer, OpenJDK 17). "
    "tokens: caption and its tokens. sets: captions and their scores."
)


def single_cases() -> list[tuple[dict[str, str], dict[str, list[str]]]]:
    """Sets whose scores depend on one rule each: lengths and ties, clipping, empty captions, no common word."""
    return [
        ({"a": "a dog runs in the snow"}, {"a": ["a dog runs in the snow"]}),
        (
            {"a": "the the the the", "b": "a cat sits"},
            {"a": ["the cat is on the mat", "there is a cat on the mat"], "b": ["a cat sits", "a cat"]},
        ),
        ({"a": "a b c d", "b": "x"}, {"a": ["a b c", "a b c d e"], "b": ["y z", "x"]}),
        ({"a": "", "b": "a man"}, {"a": ["a dog", ""], "b": ["."]}),
        ({"a": "one two three", "b": "four"}, {"a": ["five six"], "b": ["seven"]}),
        ({"a": "1 1/2 cups of tea", "b": "tea"}, {"a": ["a cup of tea and 1 1/2 cakes"], "b": ["some tea (hot)"]}),
    ]


def main() -> None:
    sets = [*single_cases(), example_captions(40, seed=1)]
    facts = {
        "note": NOTE,
        "tokens": list(zip(HARD_CAPTIONS, peer_tokens(HARD_CAPTIONS), strict=True)),
        "sets": [
            {"candidates": candidates, "references": references, "scores": peer_scores(candidates, references)}
            for candidates, references in sets
        ],
    }
    text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
    Path(__file__).with_name("caption_facts.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
