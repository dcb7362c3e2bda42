"""Bad recipes, made by seeded changes of a good one, and what `opencoca train` makes of them.

Each must be refused in one sentence, before data are looked for, in little time and memory, and without a traceback.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trials
import yaml
from trials import Trial

_MOST_SECONDS, _MOST_BYTES = 2.0, 500e6
_MISSING = "no-such-folder-of-images"


def attempt(seed: int, first: int, count: int) -> list[Trial]:
    """Gives recipes to `opencoca train`, in this process, of every kind in turn; the same ones for the same seeds."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # else a busy machine gets a line about its threads
    found = []
    with tempfile.TemporaryDirectory() as folder:
        good = Path(folder, "good.yaml")
        good.write_text(_dump(_good()))
        _train(good)  # what is imported, and made once, is no recipe's fault
        for number in range(first, first + count):
            make = _KINDS[number % len(_KINDS)]
            made = make(random.Random(f"{seed} {number}"))
            path = Path(folder, "recipe.yaml")
            path.write_bytes(made if isinstance(made, bytes) else made.encode("utf-8", "surrogateescape"))
            name = f"{make.__name__.removeprefix('_')} {number}"
            trial = trials.attempt(name, lambda path=path: _train(path), _MOST_SECONDS, _MOST_BYTES)
            taken = not (trial.refusal or trial.fault)
            found.append(trial._replace(fault="it was taken for a good one") if taken else trial)
    return found


def _train(path: Path) -> None:
    """Raises the sentence of a refusal as a ValueError."""
    from opencoca.cli import main

    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = main(["train", str(path), "--output", str(path.with_name("run"))])
    lines = err.getvalue().splitlines()
    if code != 2 or len(lines) != 1:
        raise RuntimeError(f"exit code {code}, {len(lines)} lines")
    if _MISSING not in lines[0] and not path.with_name("run").exists():
        raise ValueError(lines[0])


def _good() -> dict[str, Any]:
    return {
        "size": "tiny",
        "model": {"embed_dim": 64, "image": {"width": 64, "depth": 2, "num_heads": 2}, "text": {"context_length": 20}},
        "data": {"train_images": _MISSING, "num_workers": 0, "crop_scale": [0.5, 1.0]},
        "tokenizer": {"source": "train", "vocab_size": 300},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2, "decay": "cosine"},
        "checkpoint": {"every_steps": 10},
        "batch_size": 8,
        "epochs": 2,
        "seed": 1,
        "device": "cpu",
    }


def _places(values: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Every mapping of the recipe with each of its keys."""
    found = []
    for key, value in values.items():
        found.append((values, key))
        if isinstance(value, dict):
            found += _places(value)
    return found


def _dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False)


def _word(rng: random.Random, length: int = 8) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=length))


def _misspelt_key(rng: random.Random) -> str:
    values = _good()
    place, key = rng.choice(_places(values))
    at = rng.randrange(len(key))
    changed = rng.choice(
        [key[:at] + "x" + key[at:], key[:at] + key[at + 1 :] + "q", key + _word(rng), key.upper() + "\x1b"]
    )
    place[changed] = place.pop(key)
    return _dump(values)


def _wrong_type(rng: random.Random) -> str:
    values = _good()
    places = [(place, key) for place, key in _places(values) if isinstance(place[key], int | float | dict)]
    place, key = rng.choice(places)
    place[key] = rng.choice(
        [None, _word(rng), [_word(rng)], [[1], {"a": 2}], {"": None}, "\x07" * 900, "9" * 90_000 + "z"]
    )
    return _dump(values)


_NUMBERS = {
    "batch_size": 8, "epochs": 2, "seed": 1, "grad_cache_steps": 1, "accumulation_steps": 1, "max_steps": 9,
    "report_images": 8, "log_every_steps": 1, "data.num_workers": 0, "data.captions_per_image": 1, "data.cache_gb": 1,
    "data.shuffle_window": 64, "tokenizer.vocab_size": 300, "tokenizer.min_frequency": 2, "optimizer.warmup_steps": 2,
    "checkpoint.every_steps": 10, "checkpoint.keep_last": 2, "model.embed_dim": 64, "model.image.width": 64,
    "model.image.depth": 2, "model.image.num_heads": 2, "model.image.patch_size": 16, "model.text.context_length": 20,
    "model.text.width": 64, "model.text.unimodal_depth": 2, "model.text.vocab_size": 300, "model.text.mlp_width": 64,
    "model.pooler.num_queries": 8, "task.max_new_tokens": 8, "compute.recompute_every": 1, "encoder.cache_views": 2,
    "safety.hang_minutes": 8, "distributed.timeout_minutes": 10, "checkpoint_minutes": 10,
}  # fmt: skip


def _absurd_number(rng: random.Random) -> str:
    values, name = _good(), rng.choice(list(_NUMBERS))
    *sections, key = name.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    if rng.random() < 0.2:
        place[key] = rng.choice([float("nan"), float("inf"), float("-inf"), -(10 ** rng.randint(1, 30))])
    else:
        place[key] = 10 ** rng.choice([20, 21, 30, 100, 300, 1000]) + rng.randrange(10)
    return _dump(values)


def _too_deep(rng: random.Random) -> str:
    depth, (left, right) = rng.choice([30, 100, 900, 5000, 60_000]), rng.choice([("{a: ", "}"), ("[", "]")])
    return f"model: {left * depth}1{right * rng.choice([depth, depth // 2])}"


def _aliases(rng: random.Random) -> str:
    wide, levels, name = rng.randint(5, 12), rng.randint(6, 30), _word(rng)
    bomb = f"a0: &a0 [{','.join('x' * wide)}]\n" + "".join(
        f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * wide)}]\n" for n in range(1, levels)
    )
    merges = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{f'*a{n - 1}, ' * wide}]}}\n" for n in range(1, levels))
    itself = f"size: tiny\nmodel: &{name} {{embed_dim: 4, text: *{name}}}\n"
    return rng.choice([bomb, merges, itself, f"a: &{name} [*{name}]", f"epochs: *{name}", f"- &{name} 1\n- &{name} 2"])


def _twice(rng: random.Random) -> str:
    lines = _dump(_good()).splitlines()
    at = rng.choice([number for number, line in enumerate(lines) if ": " in line])
    return "\n".join([*lines[: at + 1], lines[at], *lines[at + 1 :]])


def _damaged(rng: random.Random) -> str:
    lines, at = _dump(_good()).splitlines(), rng.randrange(3, 9)
    lines[at] = rng.choice(
        ["\t" + lines[at], "a: [1, 2", "'unclosed", "key: 'a", "}: {", "a: b: c", "%YAML 9", "@", "? : :"]
    )
    return "\n".join(lines)


def _bytes(rng: random.Random) -> bytes:
    noise = bytes(rng.choices(range(256), k=rng.randint(10, 5000)))
    text = _dump(_good())
    inserted = text.encode()[:40] + bytes([rng.choice([0, 7, 27, 128, 255])]) + text.encode()[40:]
    return rng.choice(
        [b"\xff\xd8\xff" + noise, inserted, text.encode("utf-16-le"), text.encode("utf-32"), b"\0" * 5000]
    )


def _large(rng: random.Random) -> str:
    text, count = _dump(_good()), rng.randint(20_000, 300_000)
    return rng.choice(
        [
            text + "#" * max(count, 210_000),
            f"{text}extra: [{'1,' * count}]",
            text + "".join(f"k{n}: {n}\n" for n in range(count // 10)),
            f"{text}{'k' * count}: 1",
            f"{text}device: {'d' * count}",
            f"{text}max_steps: {'9' * count}",
        ]
    )


def _tag(rng: random.Random) -> str:
    value = rng.choice(
        ["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!binary '@@@@'", "!nothing 3",
         "!!set {a}", "!!timestamp 2001-99-99", "2001-99-99", "!!int abc", "!!float abc", "!!omap [1]"]
    )  # fmt: skip
    return f"{_dump(_good())}max_steps: {value}\n"


def _no_mapping(rng: random.Random) -> str:
    return rng.choice(
        ["- a\n- b", "words", "3", f"{_dump(_good())}\n---\na: 1", "[]", "!!set {a, b}", "2020-01-01", "'\\x1b[2J'"]
    )


def _no_word(rng: random.Random) -> str:
    key = rng.choice(
        ["1", "null", "true", "? [a, b]\n", "? {a: b}\n", "1.5", "2020-01-01", "''", "~", "0x10", "'\x85'"]
    )
    return f"{key}: 1\n{_dump(_good())}"


def _unknown_choice(rng: random.Random) -> str:
    values = _good()
    key = rng.choice(["size", "task", "precision", "device", "init_from"])
    bad = ["\x1b[31mred", "x" * 5000, "../../etc/passwd", "\n\n\n", "-1", "cuda:999999999999999999999", "tiny "]
    values[key] = rng.choice([text for text in bad if key != "init_from" or text != "x" * 5000])
    return _dump(values)


def _too_large(rng: random.Random) -> str:
    """Every number is possible, but not all together."""
    values, width = _good(), rng.choice([8192, 16_384, 32_768])
    deep = {"width": width, "num_heads": 64, "mlp_width": 4 * width}
    values["model"] = {
        "embed_dim": width,
        "pooler": {"num_heads": 64},
        "image": deep | {"depth": rng.randint(300, 500)},
    }
    values["model"]["text"] = deep | {"unimodal_depth": rng.randint(1, 200), "multimodal_depth": rng.randint(1, 200)}
    return _dump(values)


_KINDS: tuple[Callable[[random.Random], str | bytes], ...] = (
    _misspelt_key, _wrong_type, _absurd_number, _too_deep, _aliases, _twice, _damaged, _bytes, _large, _tag,
    _no_mapping, _no_word, _unknown_choice, _too_large, _absurd_number,
)  # fmt: skip
