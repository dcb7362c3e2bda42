"""`opencoca export`: writes a model in the forms that other programs read."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opencoca.cli.common import (
    CommandError,
    add_command,
    add_group,
    add_model_and_folder,
    add_overwrite,
    check_new_folder,
    choose_threads,
    format_table,
)

if TYPE_CHECKING:
    from opencoca.export.onnx_check import CheckReport

_FAILED = 1


def add_commands(commands: Any) -> None:
    group = add_group(commands, "export", "Write a model in a form that other programs read.")
    _add_onnx(group)
    _add_open_clip(group)


def _add_onnx(group: Any) -> None:
    parser = add_command(
        group,
        "onnx",
        run_onnx,
        "Write a model as ONNX graphs: image encoder, text encoder, and one cached step of the decoder.",
        example="opencoca export onnx coca-flickr8k coca-onnx\n  python coca-onnx/caption.py photo.jpg",
        more="The folder needs neither OpenCoCa nor PyTorch; its README.md says how it is used. After writing,\n"
        "the graphs are compared with the model in ONNX Runtime, and the largest differences are printed; the exit\n"
        "code is 1 if one is too large. Needs the extra onnx: pip install 'opencoca[onnx]'.",
    )
    add_model_and_folder(parser)
    add_overwrite(parser)
    parser.add_argument("--no-check", action="store_true", help="do not compare the graphs with the model")
    parser.add_argument(
        "--photos",
        nargs="+",
        default=[],
        metavar="PATH",
        help="photographs, or folders of them, to compare on (default: two that come with the package)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest absolute difference of an embedding, an image token or a logit",
    )


def run_onnx(arguments: argparse.Namespace) -> int:
    from opencoca.export.onnx import CONFIG_FILE, export_onnx, require_onnx
    from opencoca.inference.loading import load

    require_onnx()
    check_new_folder(arguments, arguments.out_dir, CONFIG_FILE)
    photos = _expanded(arguments.photos)
    choose_threads()
    pipeline = load(arguments.model, "cpu")
    files = export_onnx(pipeline, arguments.out_dir)
    print(format_table([(str(file), f"{file.stat().st_size / 1e6:,.1f} MB") for file in files]))
    if arguments.no_check:
        return 0
    from opencoca.export.onnx_check import check_onnx

    report = check_onnx(pipeline, arguments.out_dir, photos)
    _show(report)
    if not report.passed(arguments.tolerance):
        raise CommandError(
            f"the graphs in {arguments.out_dir} differ from the model by more than {arguments.tolerance:g}: do not use "
            "them where that matters, and please report it",
            _FAILED,
        )
    return 0


def _expanded(photos: Iterable[str]) -> list[str]:
    """Replaces each folder by the images below it. Raises ValueError for a folder without any."""
    from opencoca.data import list_images

    paths: list[str] = []
    for photo in photos:
        folder = Path(photo)
        paths += [str(folder / key) for key in list_images(folder)] if folder.is_dir() else [photo]
    return paths


def _show(report: "CheckReport") -> None:
    print("\nlargest absolute difference between ONNX Runtime and PyTorch, in float32:")
    rows = [(f"{found.output}, {found.input}", f"{found.value:.1e}") for found in report.differences]
    equal = report.num_captions - len(report.captions_differ)
    print(format_table([*rows, ("equal greedy captions of photographs", f"{equal} of {report.num_captions}")]))


def _add_open_clip(group: Any) -> None:
    parser = add_command(
        group,
        "open-clip",
        run_open_clip,
        "Write a model as open_clip's configuration and weights.",
        example="opencoca export open-clip my-finetuned-coca open-clip-coca\n"
        "  python -c 'import open_clip; open_clip.create_model_and_transforms(\"local-dir:open-clip-coca\")'",
        more="For models that were converted from open_clip, finetuned or not: open_clip has no other CoCa. Tensors\n"
        "that were not trained have the bytes that they came in with.",
    )
    add_model_and_folder(parser)
    add_overwrite(parser)
    group.choices["open_clip"] = parser  # the name of before


def run_open_clip(arguments: argparse.Namespace) -> int:
    from opencoca.inference.loading import load_model
    from opencoca.store.interop.open_clip import CONFIG_FILE, save_open_clip_folder

    check_new_folder(arguments, arguments.out_dir, CONFIG_FILE)
    loaded = load_model(arguments.model)
    files = save_open_clip_folder(arguments.out_dir, loaded.model, loaded.preprocess)
    print(format_table([(str(file), f"{file.stat().st_size / 1e6:,.1f} MB") for file in files]))
    return 0
