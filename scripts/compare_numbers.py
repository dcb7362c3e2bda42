"""Proves that a change of the code moved no number: records what a checkout computes, and compares two records.

    git worktree add ../before COMMIT
    python scripts/compare_numbers.py record --checkout ../before --out /tmp/before --images DIR --captions FILE.csv
    python scripts/compare_numbers.py record --checkout . --out /tmp/after --images DIR --captions FILE.csv \\
        --stored /tmp/before
    python scripts/compare_numbers.py compare /tmp/before /tmp/after

The Python that runs this script runs the package of the checkout too, so both records use the same libraries. All is
float32, on the CPU, one thread a process, with fixed seeds. A record takes six to nine minutes of one core; --jobs 2
uses two, and --only records a few parts. Without --images and --captions the data are the eight photographs in
demo/photos; a CSV file has the columns image and caption, and its first 200 images are used.

A record (numbers.npz) holds, by the names that the table of `compare` shows:
  train/      losses, gradient norms and validation scores of runs of 20 steps: four small models shaped as the paper's,
              open_clip's (with an attentional pooler, and with a class token) and coca_pytorch's; variants of the
              first; recipes/flickr8k.yaml on cached features, with AdamW, and narrower with its own Muon. With --full
              also at its own width with Muon: 20 minutes on a processor that cannot multiply bfloat16 numbers.
  shipped/    captions (greedy, 4 beams, sampled, reranked), their log-probabilities, embeddings, similarities, scores
              of given captions, label probabilities and logits of the model that ships with the package.
  trained/    the same of the models that were trained; random/: of the same networks with new random weights.
  evaluate/   what the commands `evaluate retrieval`, `captioning`, `zero-shot` and `caption` write.
  stored/     the outputs of model folders that were stored earlier, and the rest of a training run that was interrupted
              earlier: by the checkout itself, or with --stored by the checkout of that older record.

Only the command line and the top level of the Python package are used, so that modules may move. Where a key of a
recipe moves or a metric gets another name, compare_numbers.yaml, which also lists what is trained, gets the new one.
"""

import argparse
import csv
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

Numbers = dict[str, np.ndarray]

STOP_AFTER = 6
NUM_PHOTOGRAPHS = 200
NUM_TRAINED_ON = 32
NUM_VALIDATED_ON = 8
LABELS = ("dog", "child", "man", "woman", "people", "water", "cat", "rocket", "coffee")
TEMPLATE = "a photo of a {}."

# What tells how fast a step was, and not what came out of it.
SPEED = re.compile(r"per_sec|_ms$|flops|utili[sz]ation|memory|bytes|gib")

_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
_KEYS: dict[str, dict[str, Any]] = _TABLES["keys"]
_SMALL = _KEYS["all"] | _KEYS["small"]
MODELS = ("paper", "open_clip", "open_clip_class_token", "lucidrains")
VARIANTS = ("accumulation", "grad_cache", "caption_alone", "contrastive_alone", "parts", "ddp")
SHIPPED = ("flickr8k", "flickr8k_muon", "flickr8k_full")
RECIPES: dict[str, dict[str, Any]] = (
    {name: _SMALL | _KEYS[name] for name in MODELS}
    | {name: _SMALL | _KEYS["paper"] | _KEYS[name] for name in (*VARIANTS, "interrupted")}
    | {name: _KEYS["all"] | _KEYS[name] for name in SHIPPED}  # added to recipes/flickr8k.yaml
)


class Photographs(NamedTuple):
    """The folder of images, and the captions of each image by its file's name."""

    folder: Path
    captions: dict[str, list[str]]


class Checkout(NamedTuple):
    """A checkout whose package is run, in processes of their own, with the record's folder as their place."""

    folder: Path
    out: Path

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "src"), "COLUMNS": "200"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=self.out, env=environment, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *arguments: str) -> str:
        """What a Python process prints. Raises SystemExit with its errors if it fails."""
        process = self.start(*arguments)
        printed, errors = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(arguments)[:200]} failed:\n{errors}")
        return printed


def record(arguments: argparse.Namespace) -> None:
    """Runs everything and writes numbers.npz and settings.json."""
    started = time.monotonic()
    checkout = Checkout(arguments.checkout.resolve(), arguments.out.resolve())
    stored = (arguments.stored or checkout.out).resolve()
    runs = [*MODELS, *VARIANTS, *SHIPPED[: None if arguments.full else 2]]
    jobs: dict[str, Callable[[], Numbers]] = {name: lambda name=name: train(checkout, name) for name in runs}
    jobs |= {command: lambda command=command: evaluate(checkout, command) for command in EVALUATIONS}
    jobs |= {"interrupted": lambda: continue_run(checkout, stored), "shipped": lambda: outputs(checkout, "shipped")}
    if unknown := set(arguments.only or ()) - {*jobs, "small"}:
        raise SystemExit(f"there is no part {unknown.pop()}; the parts are {', '.join(jobs)}, small")
    wanted = [name for name in (*jobs, "small") if not arguments.only or name in arguments.only]
    checkout.out.mkdir(parents=True)
    photographs = read_photographs(arguments)
    write_data(checkout.out, photographs)
    where = Path(checkout.run("-c", "import opencoca; print(opencoca.__file__)").strip())
    if not where.is_relative_to(checkout.folder):
        raise SystemExit(f"{where} would be recorded, which is not in {checkout.folder}")
    write_recipes(checkout)
    numbers: Numbers = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        first = [name for name in wanted if name in jobs]
        for name, found in zip(first, pool.map(lambda name: jobs[name](), first), strict=True):
            print(f"{time.monotonic() - started:4.0f} s: {name}", flush=True)
            numbers |= found
    if "small" in wanted:  # loads what the runs have stored
        numbers |= outputs(checkout, "small", stored)
    np.savez_compressed(checkout.out / "numbers.npz", **numbers)  # pyright: ignore[reportArgumentType]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = {"seconds": round(time.monotonic() - started), "cpu_seconds": round(used.ru_utime + used.ru_stime)}
    settings = describe(checkout, photographs) | {"only": arguments.only} | seconds
    (checkout.out / "settings.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    print(f"{checkout.out}: {len(numbers)} arrays in {seconds['seconds']} s, {seconds['cpu_seconds']} s of processors")


def describe(checkout: Checkout, photographs: Photographs) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    git = ["git", "-C", str(checkout.folder), "describe", "--always", "--dirty", "--abbrev=12"]
    data = json.dumps(photographs.captions).encode()
    for name in photographs.captions:
        data += (photographs.folder / name).read_bytes()
    versions = "torch.__version__, torch.backends.cpu.get_cpu_capability()"
    return {
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "data": hashlib.sha256(data).hexdigest()[:16],
        "threads": 1,
        "python": platform.python_version(),
        "torch": checkout.run("-c", f"import torch; print({versions})").strip(),
    }


def read_photographs(arguments: argparse.Namespace) -> Photographs:
    """The first images of the CSV file, or the photographs of the demonstration, whose names are their captions."""
    if arguments.images is None:
        folder = Path(__file__).resolve().parents[1] / "demo" / "photos"
        return Photographs(folder, {path.name: [f"A {path.stem} ."] for path in sorted(folder.glob("*.jpg"))})
    captions: dict[str, list[str]] = {}
    with open(arguments.captions, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            captions.setdefault(row["image"], []).append(row["caption"])
    return Photographs(arguments.images.resolve(), dict(list(captions.items())[:NUM_PHOTOGRAPHS]))


def write_data(out: Path, photographs: Photographs) -> None:
    """Tables of captions and labels, and a link to the images: recipes then name the same files in every record."""
    (out / "images").symlink_to(photographs.folder)
    rows = [(name, caption) for name, captions in photographs.captions.items() for caption in captions]
    names = list(photographs.captions)
    tables = {"photographs": names, "train": names[:NUM_TRAINED_ON], "val": names[-NUM_VALIDATED_ON:]}
    for table, chosen in tables.items():
        wanted = set(chosen)
        write_csv(out / f"{table}.csv", "caption", [row for row in rows if row[0] in wanted])
    words = {name: re.findall(r"\w+", " ".join(captions).lower()) for name, captions in photographs.captions.items()}
    found = {name: next((label for label in LABELS if label in words[name]), None) for name in names}
    write_csv(out / "labels.csv", "label", [(name, label) for name, label in found.items() if label])


def write_csv(path: Path, column: str, rows: list[tuple[str, str]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", column), *rows])


def write_recipes(checkout: Checkout) -> None:
    """One recipe for each run, with the keys at the places that the checkout has for them."""
    printed = checkout.run("-m", "opencoca", "train", "--help")
    known = set(re.findall(r"^  --([\w.]+)", printed, re.MULTILINE))
    shipped = (checkout.folder / "recipes/flickr8k.yaml").read_text(encoding="utf-8")
    (checkout.out / "recipes").mkdir()
    for name, keys in RECIPES.items():
        recipe = yaml.safe_load(shipped) if name in SHIPPED else {}
        for key, value in (keys | {"output": f"runs/{name}"}).items():
            *sections, last = place_of(key, known).split(".")
            section = recipe
            for part in sections:
                section = section.setdefault(part, {})
            section[last] = value
        (checkout.out / f"recipes/{name}.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def place_of(key: str, known: set[str]) -> str:
    """The key under which the checkout's recipes have what ``key`` says. Raises SystemExit if there is none."""
    moved = [new + key.removeprefix(old) for old, new in _TABLES["places"] if key.startswith(old)]
    for place in (key, *moved):
        if place in known:
            return place
    raise SystemExit(f"the checkout's recipes have no key {key}; add its place to compare_numbers.yaml")


def train(checkout: Checkout, name: str) -> Numbers:
    processes = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    launcher = processes if name == "ddp" else ()
    checkout.run("-m", *launcher, "opencoca", "train", f"recipes/{name}.yaml")
    folder = checkout.out / "runs" / name
    for large in ("checkpoints", "features"):
        shutil.rmtree(folder / large, ignore_errors=True)
    return read_metrics(folder / "metrics.jsonl", f"train/{name}")


def read_metrics(path: Path, group: str) -> Numbers:
    """Series of every number that a run logged, but for those that tell how fast it was."""
    series: dict[str, list[float]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        kind = line.pop("kind")
        for key, value in line.items():
            if isinstance(value, int | float) and not SPEED.search(key):
                series.setdefault(f"{group}/{kind} {_TABLES['renamed_metrics'].get(key, key)}", []).append(value)
    return {name: np.array(values, np.float64) for name, values in series.items()}


def continue_run(checkout: Checkout, stored: Path) -> Numbers:
    """Stops a run by Ctrl-C, unless an older record holds one that was, and continues a copy of it."""
    command = ("-m", "opencoca", "train", "recipes/interrupted.yaml")
    if stored == checkout.out:
        interrupt(checkout.start(*command), checkout.out / "runs/interrupted/metrics.jsonl")
    shutil.copytree(stored / "runs/interrupted", checkout.out / "runs/continued")
    process = checkout.start(*command, "--output", "runs/continued")
    _, errors = process.communicate()
    if not process.returncode:
        return read_metrics(checkout.out / "runs/continued/metrics.jsonl", "stored/continued")
    if stored == checkout.out or "Traceback" in errors:
        raise SystemExit(f"continuing {stored / 'runs/interrupted'} failed:\n{errors}")
    return {"stored/continued/refused": np.array([errors.strip().splitlines()[-1]])}


def interrupt(process: subprocess.Popen[str], metrics: Path) -> None:
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= STOP_AFTER):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    if process.returncode != 130:
        raise SystemExit(f"the run that was to be interrupted ended with exit code {process.returncode}:\n{errors}")


EVALUATIONS = {
    "retrieval": "evaluate retrieval --images images --captions photographs.csv --out retrieval.json",
    "captioning": "evaluate captioning --images images --captions photographs.csv --out captioning.json",
    "zero-shot": "evaluate zero-shot --images images --labels labels.csv --by both --templates simple "
    "--out zero-shot.json",
    "caption": "caption val.csv --image-root images --num-beams 4 --batch-size 8 --rerank default --out caption.jsonl",
}


def evaluate(checkout: Checkout, name: str) -> Numbers:
    checkout.run("-m", "opencoca", *EVALUATIONS[name].split())
    if name == "caption":
        rows = [json.loads(line) for line in (checkout.out / "caption.jsonl").read_text(encoding="utf-8").splitlines()]
        return {f"evaluate/caption/{key}": np.array([row[key] for row in rows]) for key in ("image", *_OF_CAPTIONS)}
    metrics = json.loads((checkout.out / f"{name}.json").read_text(encoding="utf-8"))["metrics"]
    return {f"evaluate/{name}/{metric}": np.array([value]) for metric, value in metrics.items()}


_OF_CAPTIONS = ("caption", "log_probability", "length")


def outputs(checkout: Checkout, which: str, stored: Path | None = None) -> Numbers:
    """What models make of the photographs, found by a process that imports the checkout's package."""
    file = checkout.out / f"{which}.npz"
    checkout.run(str(Path(__file__).resolve()), "outputs", which, str(file), str(stored or checkout.out))
    with np.load(file) as found:
        return dict(found)


def record_outputs(arguments: argparse.Namespace) -> None:
    """The process that `outputs` starts."""
    import opencoca

    numbers: Numbers = {}
    if arguments.which == "shipped":
        numbers |= model_outputs("shipped", opencoca.load(device="cpu"), "photographs.csv")
    for name in MODELS if arguments.which == "small" else ():
        pipeline = opencoca.load(f"runs/{name}", device="cpu")
        numbers |= model_outputs(f"trained/{name}", pipeline, "val.csv")
        set_random_weights(pipeline)
        numbers |= model_outputs(f"random/{name}", pipeline, "val.csv")
    for name in (*MODELS, "flickr8k") if arguments.which == "small" else ():
        try:
            pipeline = opencoca.load(arguments.stored / "runs" / name, device="cpu")
        except ValueError as error:
            numbers[f"stored/{name}/refused"] = np.array([str(error)])
        else:
            numbers |= model_outputs(f"stored/{name}", pipeline, "val.csv")
    np.savez(arguments.file, **numbers)  # pyright: ignore[reportArgumentType]


def set_random_weights(pipeline: Any) -> None:
    """Replaces the weights by those of a new network of the same configuration, drawn with a fixed seed."""
    import torch

    import opencoca

    torch.manual_seed(1)
    pipeline.model.load_state_dict(opencoca.CoCa(pipeline.model.config).state_dict())


def model_outputs(group: str, pipeline: Any, table: str) -> Numbers:
    """What a model makes of the photographs of a table, as arrays whose names begin with ``group``."""
    import torch

    with open(table, encoding="utf-8", newline="") as file:
        captions = {row["image"]: row["caption"] for row in csv.DictReader(file)}
    photographs, texts = [f"images/{name}" for name in captions], list(captions.values())
    few = photographs[:NUM_VALIDATED_ON]
    numbers: Numbers = {}
    for name, chosen, options in (
        ("greedy", photographs, {}),
        ("4 beams", photographs, {"num_beams": 4}),
        ("sampled", photographs, {"temperature": 1.0, "top_p": 0.95, "seed": 5}),
        ("reranked", few, {"num_beams": 4, "num_captions": 3, "rerank": True}),
    ):
        found = [one for each in pipeline.caption_details(chosen, **options) for one in each]
        numbers[f"{name}: captions"] = np.array([caption.text for caption in found])
        numbers[f"{name}: token ids"] = np.array([" ".join(map(str, caption.token_ids)) for caption in found])
        numbers[f"{name}: log-probabilities"] = np.array([caption.log_probability for caption in found])
    images = pipeline.embed_images(photographs)
    numbers["image embeddings"], numbers["text embeddings"] = images.numpy(), pipeline.embed_texts(texts).numpy()
    numbers["similarity"] = pipeline.similarity(few, texts).numpy()
    numbers["scores of captions"] = pipeline.score_captions(few, texts[: len(few)]).numpy()
    for rule in ("similarity", "likelihood"):
        ranked = pipeline.classify(few, LABELS, TEMPLATE, by=rule)
        by_label = [dict(row) for row in ranked]
        numbers[f"labels by {rule}"] = np.array([[row[label] for label in LABELS] for row in by_label])
    batch = pipeline.tokenizer(texts[:4], pipeline.model.config.text.context_length)
    with torch.inference_mode():
        logits = pipeline.model.logits(pipeline.preprocess(few[:4]), batch.token_ids, batch.token_mask)
    numbers["logits"] = logits.numpy()
    return {f"{group}/{name}": array for name, array in numbers.items()}


def compare(arguments: argparse.Namespace) -> None:
    """Prints a table of both records; exits with 1 if a number is outside of the tolerance or missing.

    Where the second checkout refused, by one sentence, what the first had stored, the table holds that sentence.
    """
    is_partial = bool(check_settings(arguments.first, arguments.second)["only"])
    with np.load(arguments.first / "numbers.npz") as file:
        ours = dict(file)
    with np.load(arguments.second / "numbers.npz") as file:
        theirs = dict(file)
    groups: dict[str, list[str]] = {}
    for name in ours:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    failed: list[str] = []
    print(f"{'what':<32} {'arrays':>6} {'values':>8}  largest relative difference")
    for group, names in groups.items():
        refusal = theirs.get(f"{group}/refused", [""])[0]
        if refusal and "\n" not in refusal:
            print(f"{group:<32} refused: {refusal}")
            continue
        if is_partial and not any(name.startswith(f"{group}/") for name in theirs):
            print(f"{group:<32} not recorded")
            continue
        found = {name: difference(ours[name], theirs.get(name)) for name in names}
        worst = max(found, key=lambda name: found[name].size)
        failed += [f"{name}: {found[name]}" for name in names if not found[name].size <= arguments.tolerance]
        where = f" ({worst.rpartition('/')[2]}, {found[worst].where})" if found[worst].size else ""
        values = sum(ours[name].size for name in names)
        print(f"{group:<32} {len(names):>6} {values:>8}  {found[worst].size:.1e}{where}")
    if added := sorted(theirs.keys() - ours.keys()):
        print(f"only in {arguments.second}: {', '.join(added[:5])}{', ...' if len(added) > 5 else ''} ({len(added)})")
    for line in failed:
        print(f"FAILED {line}")
    print(f"{len(failed)} of {len(ours)} arrays differ by more than {arguments.tolerance:g}")
    sys.exit(bool(failed))


def check_settings(first: Path, second: Path) -> dict[str, Any]:
    """The settings of the second record. Raises SystemExit if the two cannot be compared."""
    ours, theirs = (json.loads((folder / "settings.json").read_text(encoding="utf-8")) for folder in (first, second))
    for name in ("data", "threads"):
        if ours[name] != theirs[name]:
            raise SystemExit(f"the records cannot be compared: {name} is {ours[name]} and {theirs[name]}")
    for name in ("commit", "python", "torch"):
        print(f"{name}: {ours[name]}" + ("" if ours[name] == theirs[name] else f" and {theirs[name]}"))
    return theirs


class Difference(NamedTuple):
    """The largest relative difference, and where it is; infinite where texts or shapes differ."""

    size: float
    where: str = ""

    def __str__(self) -> str:
        return f"{self.size:.1e}, {self.where}"


def difference(ours: np.ndarray, theirs: np.ndarray | None) -> Difference:
    """Numbers in a series are compared with their own size, those of a vector with its largest component."""
    if theirs is None:
        return Difference(np.inf, "missing in the second record")
    if ours.shape != theirs.shape:
        return Difference(np.inf, f"shape {ours.shape} and {theirs.shape}")
    if np.array_equal(ours, theirs):
        return Difference(0.0)
    if ours.dtype.kind == "U" or theirs.dtype.kind == "U":
        place = int(np.flatnonzero(ours != theirs)[0])
        return Difference(np.inf, f"number {place}: {str(ours[place])!r} and {str(theirs[place])!r}")
    size = np.maximum(abs(ours), abs(theirs)).astype(np.float64)
    size = size if ours.ndim == 1 else np.broadcast_to(size.max(-1, keepdims=True), size.shape)
    apart = abs(ours.astype(np.float64) - theirs)
    relative = np.divide(apart, size, out=np.zeros_like(apart), where=apart != 0)
    relative[np.isnan(relative)] = np.inf
    place = np.unravel_index(int(relative.argmax()), relative.shape)
    values = f"{ours[place]:.9g} and {theirs[place]:.9g}"
    return Difference(float(relative[place]), f"number {', '.join(map(str, place))}: {values}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    recorder = commands.add_parser("record", help="run a checkout's package and write down what it computes")
    recorder.add_argument("--checkout", type=Path, required=True, help="its folder; the package is in src/")
    recorder.add_argument("--out", type=Path, required=True, help="new folder for the record")
    recorder.add_argument("--images", type=Path, help="folder of photographs (default: demo/photos)")
    recorder.add_argument("--captions", type=Path, help="CSV file with the columns image and caption")
    recorder.add_argument("--stored", type=Path, help="older record, whose models and run are to be continued")
    recorder.add_argument("--jobs", type=int, default=1, help="processes at a time (default: 1)")
    recorder.add_argument("--full", action="store_true", help="also train by recipes/flickr8k.yaml as it is")
    recorder.add_argument("--only", nargs="+", metavar="PART", help="a few parts, such as: paper lucidrains shipped")
    recorder.set_defaults(run=record)
    comparer = commands.add_parser("compare", help="compare two records; exit code 1 if a number moved")
    comparer.add_argument("first", type=Path)
    comparer.add_argument("second", type=Path)
    comparer.add_argument("--tolerance", type=float, default=1e-6, help="largest relative difference (default: 1e-6)")
    comparer.set_defaults(run=compare)
    worker = commands.add_parser("outputs", help="used by record itself, in a process of the checkout")
    worker.add_argument("which", choices=("shipped", "small"))
    worker.add_argument("file", type=Path)
    worker.add_argument("stored", type=Path)
    worker.set_defaults(run=record_outputs)
    arguments = parser.parse_args()
    if (getattr(arguments, "images", None) is None) != (getattr(arguments, "captions", None) is None):
        parser.error("--images and --captions go together")
    arguments.run(arguments)


if __name__ == "__main__":
    main()
