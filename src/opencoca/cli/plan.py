"""`opencoca plan`: says what a training run will need before it is started."""

import argparse
import json
from typing import Any

from opencoca.cli.common import CommandError, add_command, positive_int

_DOES_NOT_FIT = 1


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "plan",
        run_plan,
        "Say what a recipe will need before it runs: parameters, work, memory, communication and time.",
        example="opencoca plan paper_2b --devices 256 --device h200\n"
        "  opencoca plan paper_base --devices 8 --device a100 --set batch_size=1024",
        more="The network runs on tensors that have shapes and no values: a plan for hundreds of devices takes\n"
        "seconds on a laptop. The exit code is 1 if a step does not fit the device; the last line then names the\n"
        "least change that makes it fit.",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file or name of a recipe, as for `opencoca train`")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="keys of the recipe to change, such as batch_size=1024 compute.recompute=all",
    )
    parser.add_argument("--devices", type=positive_int, default=1, metavar="N", help="number of devices")
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="D",
        help="h200, h100, h100-pcie, h100-nvl, b200, a100, a100-40gb, l40s, l4, a10g, rtx-4090, rtx-3090, mi300x, or "
        "cpu, which is measured here",
    )
    parser.add_argument(
        "--devices-per-node", type=positive_int, default=8, metavar="N", help="number of devices in a machine"
    )
    parser.add_argument(
        "--interconnect",
        type=_positive,
        default=50.0,
        metavar="GB",
        help="gigabytes a second that a device sends to other machines (default: 50, a 400 Gb/s adapter each)",
    )
    parser.add_argument(
        "--link",
        type=_positive,
        metavar="GB",
        help="gigabytes a second that a device sends to others of its machine (default: as its maker states)",
    )
    parser.add_argument(
        "--utilisation", type=_share, default=0.45, metavar="X", help="share of the device's peak rate that steps reach"
    )
    parser.add_argument(
        "--words",
        type=_positive,
        default=16.0,
        metavar="N",
        help="mean length of a text in tokens, special ids included (default: 16, as in Flickr8k)",
    )
    parser.add_argument(
        "--images",
        type=positive_int,
        metavar="N",
        help="number of images in an epoch; the plan then says how long the run takes",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run_plan(arguments: argparse.Namespace) -> int:
    from opencoca.plan import Cluster, make_plan
    from opencoca.plan.text import describe
    from opencoca.train import load_recipe

    for change in arguments.set:
        if "=" not in change:
            raise CommandError(f"--set {change} must be KEY=VALUE, such as batch_size=1024")
    recipe = load_recipe(arguments.recipe, [f"--{change}" for change in arguments.set])
    cluster = Cluster(
        devices=arguments.devices,
        device=arguments.device,
        devices_per_node=arguments.devices_per_node,
        utilisation=arguments.utilisation,
        network_bytes_per_sec=arguments.interconnect * 1e9,
        link_bytes_per_sec=None if arguments.link is None else arguments.link * 1e9,
    )
    plan = make_plan(recipe, cluster, mean_words=arguments.words, num_images=arguments.images)
    print(json.dumps(plan.to_dict(), indent=2) if arguments.json else describe(plan))
    return 0 if plan.fits else _DOES_NOT_FIT


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def _share(text: str) -> float:
    value = _positive(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is more than 1")
    return value
