"""`opencoca explain`: draws where in a photograph each word of its caption looks, and stores it as arrays."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opencoca.cli.common import (
    CommandError,
    add_command,
    add_images,
    add_load_options,
    add_overwrite,
    check_new,
    load_pipeline,
    open_images,
)
from opencoca.cli.streams import complain_of_left_out
from opencoca.system.messages import escaped

if TYPE_CHECKING:
    from opencoca.generation.explanation import Explanation

_ARRAYS = (
    "The percentages in the picture are the probabilities of the words. Attention shows which parts of the image\n"
    "a word was computed from, which need not be the reason why it was chosen.\n\n"
    "FILE.npz holds caption, words (W), log_probs (W) in nats, weights (L, H, W, N), grid and box. The weights are\n"
    "those of L multimodal layers, H heads, W words and N image features, and sum to 1 over the features; grid is\n"
    "the number of rows and columns of the features; box is the part of the photograph that the model saw (left,\n"
    "top, right, bottom, in pixels)."
)


def add_commands(commands: Any) -> None:
    explain = add_command(
        commands,
        "explain",
        run_explain,
        "Draw where in a photograph each word of its caption looks.",
        example="opencoca explain photo.jpg --caption 'a dog on a beach' --out dog.png --npz dog.npz",
        more=_ARRAYS,
    )
    add_images(explain)
    explain.add_argument("--caption", metavar="TEXT", help="the caption to explain (default: the model writes one)")
    explain.add_argument(
        "--out",
        metavar="FILE.png",
        help="picture to write (default: the first image's name with .explained.png, in the current folder)",
    )
    add_overwrite(explain)
    explain.add_argument("--npz", metavar="FILE.npz", help="also store the attention weights; for a single image")
    explain.add_argument(
        "--layers",
        type=_layers,
        metavar="L,L",
        help="multimodal layers to average over, from 0; -1 is the last (default: all)",
    )
    add_load_options(explain)


def run_explain(arguments: argparse.Namespace) -> int:
    source = open_images(arguments)
    out = Path(arguments.out or f"{Path(source.key(0)).stem}.explained.png")
    if out.suffix.lower() != ".png":
        raise CommandError(f"the picture is a PNG, but --out is {str(out)!r}; choose a name that ends in .png")
    if arguments.npz and len(source) > 1:
        raise CommandError(f"--npz stores one image's arrays, but {len(source)} are given; give one image")
    if arguments.npz and Path(arguments.npz).suffix != ".npz":
        raise CommandError(f"--npz is {arguments.npz!r}; choose a name that ends in .npz")
    check_new(arguments, out, arguments.npz)
    pipeline = load_pipeline(arguments)

    from opencoca.data import ImageError, decode_image
    from opencoca.pictures.explain import write_explanations

    explanations: dict[str, Explanation] = {}
    for index in range(len(source)):
        try:
            photograph = decode_image(source.open_bytes(index), name=source.key(index))
        except (ImageError, OSError) as error:
            complain_of_left_out(str(error))
        else:
            explanations[source.key(index)] = pipeline.explain(photograph, arguments.caption)
    if not explanations:
        raise CommandError("none of the images can be read, so nothing was written")
    write_explanations(out, list(explanations.values()), layers=arguments.layers)
    if arguments.npz:
        _write_arrays(Path(arguments.npz), *explanations.values())
    for name, explanation in explanations.items():
        print(f"{escaped(name)}\t{explanation.caption}")
    print(out if not arguments.npz else f"{out}\t{arguments.npz}")
    return 0


def _write_arrays(path: Path, explanation: "Explanation") -> None:
    import numpy as np

    from opencoca.system.files import atomic_write

    maps = explanation.maps
    with atomic_write(path) as partial, open(partial, "wb") as file:
        np.savez_compressed(
            file,
            caption=np.array(explanation.caption),
            words=np.array(maps.words, dtype=str),
            log_probs=maps.log_probs.float().numpy(),
            weights=maps.weights.float().numpy(),
            grid=np.array(maps.grid),
            box=np.array(explanation.box),
        )


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers; write 0,2 or -1") from None
