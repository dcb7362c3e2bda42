"""Model folders that somebody changed to do harm, or that came to harm: each loads or is refused by one sentence.

Every variant differs from a sound folder in one of its three files, by a rule drawn from a seed, and is loaded and used
in a process of its own, so that an abort is seen as well.
"""

import copy
import json
import multiprocessing
import random
import shutil
import struct
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import trials
from PIL import Image
from trials import Trial

import opencoca
from opencoca.data.transforms import PreprocessConfig
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.store.model_folder import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, save_model_folder
from opencoca.tokenizer import train_tokenizer

_MAX_SECONDS, _MAX_BYTES, _TIMEOUT_S = 2.0, 500_000_000, 60.0
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["opencoca.inference.loading", "opencoca.generation.loop"])


def attempt(seed: int, first: int, count: int) -> list[Trial]:
    """Makes some variants of a seed and tries each."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        sound = Path(folder) / "sound"
        make_sound_folder(sound)
        for number in range(first, first + count):
            variant = Path(folder) / f"variant-{number}"
            change = write_variant(sound, variant, random.Random(f"{seed}/{number}"))
            found.append(_try(variant, f"{number}: {change}"))
            shutil.rmtree(variant)
    return found


def make_sound_folder(folder: Path) -> None:
    """Writes a model of a few thousand weights."""
    torch.manual_seed(0)
    text = TextConfig(300, 14, 32, unimodal_depth=1, multimodal_depth=1, num_heads=4, mlp_width=48)
    image = ImageEncoderConfig("vit", (16, 24), 8, width=24, depth=1, num_heads=2, mlp_width=32)
    model = CoCa(CoCaConfig(24, image, PoolerConfig(num_heads=4, num_queries=5), text))
    tokenizer = train_tokenizer(["a dog runs", "a cat sleeps", "a dog sleeps"], 265)
    save_model_folder(folder, model, tokenizer, PreprocessConfig((16, 24)), info={"scores": {"CIDEr": 0.5}})


def write_variant(sound: Path, folder: Path, rng: random.Random) -> str:
    """Writes a copy of the sound folder with one change, and says which."""
    folder.mkdir()
    names = (TOKENIZER_FILE, CONFIG_FILE, WEIGHTS_FILE)
    name = rng.choice(names)
    content = (sound / name).read_bytes()
    if rng.random() < 0.15:
        change, changed = _damage(content, rng)
    elif name == WEIGHTS_FILE:
        change, changed = _change_weights(content, rng)
    else:
        components = _HOSTILE_PARTS if name == TOKENIZER_FILE else []
        change, changed = _change_json(content, components, rng)
    for other in names:
        if other != name:
            (folder / other).hardlink_to(sound / other)
    (folder / name).write_bytes(changed)
    return f"{name}: {change}"


def _damage(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Cuts a file short, turns some of its bits, or puts something else in its place."""
    kind = rng.choice(("cut", "bits", "deep", "empty", "numbers"))
    if kind == "cut":
        return kind, content[: rng.randrange(len(content))]
    if kind == "bits":
        changed = bytearray(content)
        for _ in range(rng.randint(1, 20)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return kind, bytes(changed)
    return kind, {"deep": b"[" * 100_000, "empty": b"", "numbers": b"1" * 1_000_000}[kind]


_VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 7, 1000, 10**6, 10**9, 2**31, 2**40, 10**30, -(2**63)),
    *(0.5, -1e-9, 1e300, float("nan"), float("inf"), "", "x", "\x1b[2J\n", "\ud800", "<end>", "x" * 100_000),
    *([], {}, [[]], [0] * 1000, ["a", "b"], [float("nan")] * 3, [10**9, 10**9], {"Regex": "(a*)*b"}, {"type": "NFC"}),
]
_EXPAND = {"type": "Replace", "pattern": {"Regex": "."}, "content": "a" * 1000}
_SLOW = {"type": "Split", "pattern": {"Regex": "(.*.*.*)*x"}, "behavior": "Isolated", "invert": False}
_UNDECLARED = [{"SpecialToken": {"id": "z", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
_HOSTILE_PARTS: list[tuple[str, Any]] = [
    ("padding", {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "p"}),
    ("truncation", {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 2**40}),
    ("added_tokens", [{"id": 2**31, "content": "a", "special": False}] * 100),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "////////AAAA"}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "CAAAAAAAAAAAAAA="}),
    ("normalizer", {"type": "Sequence", "normalizers": [_EXPAND] * 5}),
    ("normalizer", {"type": "Prepend", "prepend": "a" * 10**6}),
    ("normalizer", {"type": "Replace", "pattern": {"String": ""}, "content": "aa"}),
    ("pre_tokenizer", _SLOW),
    ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 1000}),
    ("pre_tokenizer", {"type": "FixedLength", "length": 0}),
    ("decoder", {"type": "Strip", "content": " ", "start": 2**40, "stop": 2**40}),
    ("decoder", {"type": "Sequence", "decoders": [_EXPAND] * 5}),
    ("post_processor", {"type": "TemplateProcessing", "single": _UNDECLARED, "pair": [], "special_tokens": {}}),
    ("model", {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"], "continuing_subword_prefix": "####"}),
    ("model", {"type": "Unigram", "vocab": [["a", float("nan")]], "unk_id": 10**6}),
    ("model", {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "?", "max_input_chars_per_word": 2**40}),
]


def _change_json(content: bytes, parts: list[tuple[str, Any]], rng: random.Random) -> tuple[str, bytes]:
    """Changes, removes, doubles or renames one value of a JSON file, or puts a harmful component into it."""
    tree = json.loads(content)
    if parts and rng.random() < 0.4:
        name, part = rng.choice(parts)
        tree[name] = copy.deepcopy(part)
        return f"{name} = {str(part)[:60]}", json.dumps(tree).encode()
    places = [place for place in _places(tree, ()) if len(place) < 2 or place[:2] != ("model", "vocab")]
    *way, name = rng.choice(places)
    parent = tree
    for step in way:
        parent = parent[step]
    label = "/".join(map(str, (*way, name)))
    kind = rng.choice(("value", "value", "value", "removed", "twice", "renamed"))
    if kind == "removed":
        del parent[name]
    elif kind == "renamed" and isinstance(parent, dict):
        parent[f"{name}\x07"] = parent.pop(name)
    elif kind == "twice" and isinstance(parent, dict):
        parent["\x00twice"] = parent[name]
        return f"{label} twice", json.dumps(tree).replace('"\\u0000twice"', json.dumps(name)).encode()
    else:
        parent[name] = copy.deepcopy(rng.choice(_VALUES))
        label += f" = {str(parent[name])[:60]!r}"
    return f"{kind} {label}", json.dumps(tree).encode()


def _places(tree: Any, way: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The ways to the values of a tree; of a long list or dict the first ones."""
    inner = list(tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ())
    for name, value in inner[:30]:
        yield (*way, name)
        yield from _places(value, (*way, name))


def _change_weights(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Changes the header of a safetensors file, or the numbers behind it."""
    length = struct.unpack("<Q", content[:8])[0]
    header, numbers = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = rng.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    kind = rng.choice(("dtype", "shape", "offsets", "name", "value", "length", "numbers", "more"))
    if kind == "dtype":
        entry["dtype"] = rng.choice(("F8_E4M3", "F8_E5M2", "F4", "C64", "I32", "BOOL", "F16", "F64", "U64", "x", ""))
        size = {"F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "F16": 2, "F64": 8, "C64": 8, "U64": 8}.get(entry["dtype"], 4)
        entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // size]
    elif kind == "shape":
        entry["shape"] = rng.choice(([10**9, 10**9], [2**63, 2], [0], [], [-1], None, [1] * 100_000, "x"))
    elif kind == "offsets":
        entry["data_offsets"] = rng.choice(([0, 2**63], [5, 1], [-4, 4], [0, 0], [], None, [2**64, 2**65]))
    elif kind == "name":
        header[rng.choice(("", "x" * 50_000, "\x1b[2J\n", "../../x"))] = header.pop(name)
    elif kind == "value":
        header[name] = rng.choice(_VALUES)
    elif kind == "length":
        false = rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, length + 4))
        return f"length {false}", struct.pack("<Q", false) + content[8:]
    elif kind == "numbers":
        numbers = rng.choice((b"\xff", b"\x7f", rng.randbytes(64))) * len(numbers)
        numbers = numbers[: len(content) - 8 - length]
    else:
        header |= {f"more.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
    encoded = json.dumps(header).encode()
    return f"{kind} of {name}: {str(header.get(name))[:60]}", struct.pack("<Q", len(encoded)) + encoded + numbers


def _try(folder: Path, name: str) -> Trial:
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_try_here, args=(folder, name, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(_TIMEOUT_S):
            return receiver.recv()
        return Trial(name, "", "it does not end", _TIMEOUT_S, 0)
    except EOFError:
        process.join()
        return Trial(name, "", f"the process died with {process.exitcode}", 0.0, 0)
    finally:
        process.kill()
        process.join()


def _try_here(folder: Path, name: str, sender: Connection) -> None:
    torch.set_num_threads(1)
    sender.send(trials.attempt(name, lambda: use(folder), _MAX_SECONDS, _MAX_BYTES))


def use(folder: Path) -> None:
    """Loads a model and uses it as commands would."""
    pipeline = opencoca.load(folder, device="cpu")
    pipeline.caption(Image.new("RGB", (40, 30)))
    ids = pipeline.tokenizer(["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "A \ufdfa dog  . ."], 14).token_ids
    pipeline.tokenizer.decode_batch(ids)
