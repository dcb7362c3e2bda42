"""Checks a tokenizer.json of unknown origin before the library reads it.

The library believes its file: a false length or an absurd number ends the whole process, an expression of the wrong
kind runs for hours, a replacement makes gigabytes of a word. So a file may only name components that are known here,
with values in bounds.
"""

import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

from opencoca.system.messages import shown
from opencoca.tokenizer.charsmap import charsmap_growth
from opencoca.tokenizer.languages import MAX_LANGUAGES
from opencoca.tokenizer.patterns import is_safe_pattern

# How many times longer a text may become, beside what Unicode's own forms do to it.
_MAX_GROWTH = 128
_MAX_COMPONENTS, _MAX_TOKEN_LENGTH, _MAX_IDS, _MAX_UINT32 = 32, 10_000, 1 << 20, (1 << 32) - 1
_MAX_SPECIAL_TOKENS = 16 + MAX_LANGUAGES

Check = Callable[[Any], bool]


def check_tokenizer_content(content: Any) -> None:
    """Raises ValueError, which says what is wrong, unless the library can read and use this content of a file."""
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    if content.get("added_tokens") or content.get("truncation") is not None:
        raise ValueError("it has added tokens or truncation, which would change the meaning of a text")
    _check_fields(content.get("padding"), _PADDING, "padding")
    growth, decoded_growth = _Count(), _Count()
    for section in ("normalizer", "pre_tokenizer"):
        _check_component(content.get(section), section, growth)
    _check_component(content.get("decoder"), "decoder", decoded_growth)
    _check_component(content.get("post_processor"), "post_processor", _Count())
    _check_model(content.get("model"))


class _Count:
    """How many components there are, and how many times longer they make a text."""

    def __init__(self) -> None:
        self.components, self.growth = 0, 1

    def add(self, section: str, growth: int) -> None:
        self.components, self.growth = self.components + 1, self.growth * growth
        if self.components > _MAX_COMPONENTS:
            raise ValueError(f"its {section} has more than {_MAX_COMPONENTS} components")
        if self.growth > _MAX_GROWTH:
            raise ValueError(f"its {section} makes a text more than {_MAX_GROWTH} times longer")


def _check_component(component: Any, section: str, count: _Count) -> None:
    kind = component.get("type") if isinstance(component, dict) else None
    if kind == "Sequence":
        parts = component.get(_PARTS[section])
        if not isinstance(parts, list):
            raise ValueError(f"its {section} is a Sequence without {_PARTS[section]}")
        count.add(section, 1)
        for part in parts:
            _check_component(part, section, count)
        return
    fields = _COMPONENTS[section].get(kind) if isinstance(kind, str) else None
    if fields is None or not isinstance(kind, str):
        raise ValueError(f"its {section} has the type {_shown(kind)}, which is not supported")
    _check_fields(component, {"type": _is_text, **fields}, f"{section} {kind}")
    if kind == "TemplateProcessing":
        _check_template(component)
    count.add(section, _growth(kind, component))


def _growth(kind: str, component: Mapping[str, Any]) -> int:
    """How many times longer the component can make a text, the forms of Unicode left aside."""
    if kind == "Replace":
        # What is put in may grow by Unicode's forms later; an expression may also find the nothing behind a character.
        found_nothing = "Regex" in component.get("pattern", ())
        return max(1, len(unicodedata.normalize("NFKD", component.get("content", ""))) + found_nothing)
    if kind == "Precompiled":
        return charsmap_growth(component.get("precompiled_charsmap", ""))
    return {"ByteLevel": 2, "Metaspace": 3, "BertNormalizer": 3}.get(kind, 1)


def _check_template(template: Mapping[str, Any]) -> None:
    """The library fails for a special token that is not declared; a text that stands twice would be framed twice."""
    declared = template.get("special_tokens", {})
    for name in ("single", "pair"):
        for piece in template.get(name, ()):
            if "SpecialToken" in piece and piece["SpecialToken"]["id"] not in declared:
                raise ValueError(f"its template has the undeclared token {_shown(piece['SpecialToken']['id'])}")
    if [piece["Sequence"]["id"] for piece in template.get("single", ()) if "Sequence" in piece] != ["A"]:
        raise ValueError("its template for one text does not have the text once")


def _check_fields(content: Any, fields: Mapping[str, Check], name: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"its {name} is missing")
    for field, value in content.items():
        if field not in fields:
            raise ValueError(f"its {name} has the unknown field {_shown(field)}")
        if not fields[field](value):
            raise ValueError(f"its {name} has the {field} {_shown(value)}, which is not supported")


def _check_model(model: Any) -> None:
    kind = model.get("type") if isinstance(model, dict) else None
    fields = _MODELS.get(kind) if isinstance(kind, str) else None
    if fields is None or not isinstance(kind, str):
        raise ValueError(f"its model is {_shown(kind)}, which is none of {', '.join(_MODELS)}")
    vocab = model.get("vocab")
    if not isinstance(vocab, list if kind == "Unigram" else dict) or not 0 < len(vocab) <= _MAX_IDS:
        raise ValueError(f"its model has no vocabulary of 1 to {_MAX_IDS:,} ids")
    tokens = [pair[0] if isinstance(pair, list) and pair else pair for pair in vocab] if kind == "Unigram" else vocab
    if not all(isinstance(token, str) and len(token) <= _MAX_TOKEN_LENGTH for token in tokens):
        raise ValueError(f"its vocabulary has a token of more than {_MAX_TOKEN_LENGTH:,} characters, or one without")
    _check_fields({name: value for name, value in model.items() if name != "vocab"}, fields, f"model {kind}")
    unknown = model.get("unk_token", {"WordPiece": "[UNK]", "WordLevel": "<unk>"}.get(kind))
    if unknown not in vocab and kind in ("WordPiece", "WordLevel"):
        raise ValueError(f"its vocabulary does not have the unk_token {_shown(unknown)}")
    if (prefix := model.get("continuing_subword_prefix")) and kind == "BPE":
        # The library cuts as many bytes off what it joins, whatever they are.
        seconds = [merge.split(" ")[-1] if isinstance(merge, str) else merge[-1] for merge in model.get("merges", ())]
        if not all(second.startswith(prefix) for second in seconds):
            raise ValueError(f"its model joins tokens that do not begin with {_shown(prefix)}")


def _shown(value: object) -> str:
    return shown(value, 40) if isinstance(value, str | int | float | dict | None) else type(value).__name__


# What the fields of components may be


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_optional_bool(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 64


def _is_optional_text(value: Any) -> bool:
    return value is None or _is_text(value)


def _is_character(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 1


def _is_in(*choices: Any) -> Check:
    return lambda value: isinstance(value, str | None) and value in choices


def _is_count(least: int, most: int) -> Check:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) != 1:
        return False
    [(kind, pattern)] = value.items()
    if not isinstance(pattern, str):
        return False
    return is_safe_pattern(pattern) if kind == "Regex" else kind == "String" and 0 < len(pattern) <= 1000


def _is_rate(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1)


def _is_merges(value: Any) -> bool:
    """Pairs of tokens, or both with a space between, as older files have them."""
    return isinstance(value, list) and all(
        isinstance(merge, str)
        or (isinstance(merge, list) and len(merge) == 2 and isinstance(merge[0], str) and isinstance(merge[1], str))
        for merge in value
    )


def _is_token_and_id(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _is_text(value[0]) and _is_id(value[1])


def _is_pieces(value: Any) -> bool:
    """The parts of a template: special tokens, and texts A and B."""
    return isinstance(value, list) and len(value) <= 16 and all(map(_is_piece, value))


def _is_piece(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) != 1:
        return False
    [(kind, part)] = value.items()
    if kind not in ("SpecialToken", "Sequence") or not isinstance(part, dict) or set(part) != {"id", "type_id"}:
        return False
    return _is_id(part["type_id"]) and (_is_text(part["id"]) if kind == "SpecialToken" else part["id"] in ("A", "B"))


def _is_special_tokens(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= _MAX_SPECIAL_TOKENS and all(map(_is_special_token, value.values()))


def _is_special_token(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"id", "ids", "tokens"} or not _is_text(value["id"]):
        return False
    ids, tokens = value["ids"], value["tokens"]
    listed = isinstance(ids, list) and isinstance(tokens, list) and len(ids) == len(tokens) == 1
    return listed and _is_id(ids[0]) and _is_text(tokens[0])


_is_id = _is_count(0, _MAX_UINT32)
_PADDING: dict[str, Check] = {
    "strategy": _is_in("BatchLongest"),
    "direction": _is_in("Right", "Left"),
    "pad_to_multiple_of": _is_in(None),
    "pad_id": _is_id,
    "pad_type_id": _is_id,
    "pad_token": _is_text,
}
_BYTE_LEVEL: dict[str, Check] = dict.fromkeys(("add_prefix_space", "trim_offsets", "use_regex"), _is_bool)
_METASPACE: dict[str, Check] = {
    "replacement": _is_character,
    "str_rep": _is_text,
    "add_prefix_space": _is_bool,
    "prepend_scheme": _is_in("always", "first", "never"),
    "split": _is_bool,
}
_REPLACE: dict[str, Check] = {"pattern": _is_pattern, "content": _is_text}
_BEHAVIORS = ("Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
_FRAME: dict[str, Check] = {"sep": _is_token_and_id, "cls": _is_token_and_id}
_PARTS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}
_COMPONENTS: dict[str, dict[str, dict[str, Check]]] = {
    "normalizer": {
        **{kind: {} for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")},
        "Strip": {"strip_left": _is_bool, "strip_right": _is_bool},
        "Replace": _REPLACE,
        "Prepend": {"prepend": _is_text},
        "Precompiled": {"precompiled_charsmap": lambda value: isinstance(value, str)},
        "BertNormalizer": {
            **dict.fromkeys(("clean_text", "handle_chinese_chars", "lowercase"), _is_bool),
            "strip_accents": _is_optional_bool,
        },
    },
    "pre_tokenizer": {
        **{kind: {} for kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")},
        "ByteLevel": _BYTE_LEVEL,
        "Metaspace": _METASPACE,
        "Split": {"pattern": _is_pattern, "behavior": _is_in(*_BEHAVIORS), "invert": _is_bool},
        "Punctuation": {"behavior": _is_in(*_BEHAVIORS)},
        "Digits": {"individual_digits": _is_bool},
        "CharDelimiterSplit": {"delimiter": _is_character},
    },
    "decoder": {
        **{kind: {} for kind in ("Fuse", "ByteFallback")},
        "ByteLevel": _BYTE_LEVEL,
        "Metaspace": _METASPACE,
        "Replace": _REPLACE,
        # The library fails where as many characters are cut off an end as a word has.
        "Strip": {"content": _is_character, "start": _is_count(0, 16), "stop": _is_count(0, 0)},
        "WordPiece": {"prefix": _is_text, "cleanup": _is_bool},
        "BPEDecoder": {"suffix": _is_text},
        "CTC": {"pad_token": _is_text, "word_delimiter_token": _is_text, "cleanup": _is_bool},
    },
    "post_processor": {
        "ByteLevel": _BYTE_LEVEL,
        "TemplateProcessing": {"single": _is_pieces, "pair": _is_pieces, "special_tokens": _is_special_tokens},
        "RobertaProcessing": {**_FRAME, "trim_offsets": _is_bool, "add_prefix_space": _is_bool},
        "BertProcessing": _FRAME,
    },
}
_BPE: dict[str, Check] = {
    "dropout": _is_rate,
    **dict.fromkeys(("unk_token", "continuing_subword_prefix", "end_of_word_suffix"), _is_optional_text),
    **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), _is_bool),
    "merges": _is_merges,
}
_MODELS: dict[str, dict[str, Check]] = {
    kind: {"type": _is_text, **fields}
    for kind, fields in {
        "BPE": _BPE,
        "WordPiece": {
            "unk_token": _is_text,
            "continuing_subword_prefix": _is_text,
            "max_input_chars_per_word": _is_count(1, 1000),
        },
        "WordLevel": {"unk_token": _is_text},
        "Unigram": {
            "unk_id": lambda value: value is None or _is_id(value),
            "byte_fallback": _is_bool,
        },
    }.items()
}
