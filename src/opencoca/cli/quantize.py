"""`opencoca quantize`: writes a model with weights of 8 bits, if its scores stay the same."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opencoca.cli.common import (
    CommandError,
    add_command,
    check_writable,
    format_table,
    positive_int,
    write_json,
)

if TYPE_CHECKING:
    from opencoca.data import SampleSource
    from opencoca.inference.pipeline import Pipeline
    from opencoca.store.model_folder import LoadedModel

_LOST, _PERCENT = 1, 100


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "quantize",
        run_quantize,
        "Write a smaller model, faster on a CPU: its linear maps and token embeddings have weights of 8 bits.",
        example="opencoca quantize coca-flickr8k coca-int8 --images DIR --captions val.csv",
        more="With --images and --captions the model is scored before and after, and written only if no score\n"
        "(CIDEr-D, recall at 1 in both directions) falls by more than --max-loss; the exit code is 1 if one does.\n"
        "The folder is used like any other: opencoca caption photo.jpg --model coca-int8.",
    )
    parser.add_argument("model", metavar="MODEL", help="name of a model, or a model's or training run's folder")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="folder to write")
    parser.add_argument("--images", metavar="DIR", help="folder of images, or tar shards, to score the model on")
    parser.add_argument("--captions", metavar="CSV", help="table with the columns image and caption")
    parser.add_argument("--limit", type=positive_int, metavar="N", help="only the first N images")
    parser.add_argument(
        "--max-loss", type=float, default=1.0, metavar="X", help="points of 100 that a score may fall (default: 1.0)"
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=32, metavar="N", help="images at a time (default: 32)"
    )
    parser.add_argument("--out", metavar="FILE", help="write sizes, scores and seconds as JSON")


def run_quantize(arguments: argparse.Namespace) -> int:
    from opencoca.inference.loading import load, load_model
    from opencoca.store.model_folder import WEIGHTS_FILE, save_model_folder
    from opencoca.store.quantization import is_quantized, quantize

    check_writable(Path(arguments.out_dir) / WEIGHTS_FILE, arguments.out)
    source = _open_source(arguments)
    loaded = load_model(arguments.model)
    if is_quantized(loaded.model):
        raise CommandError(f"{arguments.model} is quantized already")
    num_bytes = _weight_bytes(loaded.model)
    quantize(loaded.model)
    sizes = {"weights_before_bytes": num_bytes, "weights_after_bytes": _weight_bytes(loaded.model)}
    rows = [("weights", *(f"{size / 1e6:.1f} MB" for size in sizes.values()))]
    report: dict[str, Any] = {"model": arguments.model, **sizes}
    losses: dict[str, float] = {}
    if source is not None:
        before = _scores(load(arguments.model, "cpu"), source, arguments.batch_size)
        after = _scores(_pipeline_of(loaded), source, arguments.batch_size)
        report |= {"images": len(source), "before": before, "after": after}
        losses = {name: before[name] - after[name] for name in before if name != "seconds"}
        rows += [(name.replace("_", " "), f"{before[name]:.2f}", f"{after[name]:.2f}") for name in before]
    print(format_table([(name, f"{one:>12}{two:>12}") for name, one, two in [("", "before", "after"), *rows]]))
    if arguments.out:
        write_json(arguments.out, report)
    if lost := [name for name, loss in losses.items() if not loss <= arguments.max_loss]:
        names = ", ".join(name.replace("_", " ") for name in lost)
        raise CommandError(
            f"nothing was written: more than {arguments.max_loss:g} points are lost in {names}; allow more with "
            "--max-loss, or keep the model as it is",
            _LOST,
        )
    save_model_folder(arguments.out_dir, loaded.model, loaded.tokenizer, loaded.preprocess, info=loaded.info)
    print(f"wrote {arguments.out_dir}")
    return 0


def _open_source(arguments: argparse.Namespace) -> "SampleSource | None":
    from opencoca.data import ImageFolder, Subset, open_source

    if arguments.images is None:
        if arguments.captions:
            raise CommandError("--captions needs --images, the folder of the images that are captioned")
        return None
    source = open_source(arguments.images, arguments.captions)
    if arguments.captions is None and isinstance(source, ImageFolder):
        raise CommandError(f"{arguments.images!r} is a folder of images without captions; add --captions CSV")
    return source if arguments.limit is None else Subset(source, range(min(arguments.limit, len(source))))


def _pipeline_of(loaded: "LoadedModel") -> "Pipeline":
    import copy

    from opencoca.inference.pipeline import Pipeline
    from opencoca.inference.preprocess import Preprocess

    model = copy.deepcopy(loaded.model).float()
    return Pipeline(model, loaded.tokenizer, Preprocess(loaded.preprocess))


def _weight_bytes(model: Any) -> int:
    """Adds up the bytes of all tensors; shared ones count once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _scores(pipeline: "Pipeline", source: "SampleSource", batch_size: int) -> dict[str, float]:
    """Measures scores, in percent, and the seconds that captioning and retrieval took."""
    from opencoca.evaluation.captioning import evaluate_captioning
    from opencoca.evaluation.retrieval import evaluate_retrieval

    started = time.perf_counter()
    run: dict[str, Callable[..., Any]] = {"captions": evaluate_captioning, "retrieval": evaluate_retrieval}
    found = {
        name: evaluate(pipeline, source, batch_size=batch_size, progress=True).scores for name, evaluate in run.items()
    }
    return {
        "cider_d": _PERCENT * found["captions"].cider_d,
        "image_to_text_r1": _PERCENT * found["retrieval"].image_to_text_r1,
        "text_to_image_r1": _PERCENT * found["retrieval"].text_to_image_r1,
        "seconds": time.perf_counter() - started,
    }
