"""`opencoca quantize`: writes a model with weights of 8 bits, if its scores stay the same."""

import argparse
import time
import warnings
from typing import TYPE_CHECKING, Any

from opencoca.cli.common import (
    CommandError,
    add_captioned_images,
    add_command,
    add_model_and_folder,
    add_overwrite,
    check_new,
    check_new_folder,
    choose_threads,
    format_table,
    open_captioned,
    positive_int,
)
from opencoca.system.notice import LeftOut

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
    add_model_and_folder(parser)
    add_overwrite(parser)
    add_captioned_images(parser, required=False)
    parser.add_argument("--max-loss", type=float, default=1.0, metavar="X", help="points of 100 that a score may fall")
    parser.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="images at a time")
    parser.add_argument("--out", metavar="FILE", help="write sizes, scores and seconds as JSON")


def run_quantize(arguments: argparse.Namespace) -> int:
    from opencoca.inference.loading import load, load_model
    from opencoca.store.model_folder import WEIGHTS_FILE, save_model_folder
    from opencoca.store.quantization import is_quantized, quantize

    check_new(arguments, arguments.out)
    check_new_folder(arguments, arguments.out_dir, WEIGHTS_FILE)
    if arguments.captions and arguments.images is None:
        raise CommandError("--captions needs --images, the folder of the images that are captioned")
    source = open_captioned(arguments) if arguments.images is not None else None
    choose_threads()
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
        from opencoca.system.files import write_json

        write_json(arguments.out, report)
    if lost := [name for name, loss in losses.items() if not loss <= arguments.max_loss]:
        names = ", ".join(name.replace("_", " ") for name in lost)
        raise CommandError(
            f"nothing was written: more than {arguments.max_loss:g} points are lost in {names}; allow more with "
            "--max-loss, or keep the model as it is",
            _LOST,
        )
    parts = loaded.model, loaded.tokenizer, loaded.preprocess
    save_model_folder(arguments.out_dir, *parts, info=loaded.info, task=loaded.task)
    print(f"wrote {arguments.out_dir}")
    return 0


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
    report = evaluate_captioning(pipeline, source, batch_size=batch_size, progress=True)
    for image in report.broken_images:
        warnings.warn(image.reason, LeftOut, stacklevel=1)  # told once, although they are met before and after
    captions = report.scores
    retrieval = evaluate_retrieval(pipeline, source, batch_size=batch_size, progress=True).scores
    return {
        "cider_d": _PERCENT * captions.cider_d,
        "image_to_text_r1": _PERCENT * retrieval.image_to_text_r1,
        "text_to_image_r1": _PERCENT * retrieval.text_to_image_r1,
        "seconds": time.perf_counter() - started,
    }
