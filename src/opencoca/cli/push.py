"""`opencoca push`: uploads a model to the Hugging Face Hub."""

import argparse
from pathlib import Path
from typing import Any

from opencoca.cli.common import add_command, add_overwrite, check_new_folder


def add_commands(commands: Any) -> None:
    parser = add_command(
        commands,
        "push",
        run_push,
        "Write a model as a repository (weights, configuration, tokenizer, model card) and upload it.",
        example="opencoca push runs/flickr8k my-name/my-coca --metrics captioning.json --licence mit",
        more="It needs a token that may write: run `hf auth login`, or set HF_TOKEN. Others then load the model with\n"
        'opencoca.load("hf-hub:my-name/my-coca"). With --out or --dry-run nothing is uploaded.',
    )
    parser.add_argument("model", metavar="MODEL", help="name of a model, or a model's or training run's folder")
    parser.add_argument("repo_id", metavar="REPO_ID", help="the repository, as organisation/name")
    parser.add_argument(
        "--metrics",
        nargs="+",
        default=[],
        metavar="FILE",
        help="scores for the model card: files that `opencoca evaluate ... --out FILE` wrote",
    )
    parser.add_argument(
        "--licence", default="other", metavar="L", help="licence of the model, by the hub's name, such as apache-2.0"
    )
    parser.add_argument("--dtype", metavar="T", help="type of the stored weights (default: as they are)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--message", default="Upload a CoCa", metavar="TEXT", help="message of the commit")
    parser.add_argument("--out", metavar="DIR", help="write the repository into this folder, and upload nothing")
    add_overwrite(parser)
    parser.add_argument("--dry-run", action="store_true", help="show what would be uploaded, and upload nothing")


def run_push(arguments: argparse.Namespace) -> int:
    from opencoca.inference.loading import load_model
    from opencoca.store.model_card import CARD_FILE, Result, write_repository
    from opencoca.system.devices import as_dtype

    _check_repo_id(arguments.repo_id)
    if arguments.out:
        check_new_folder(arguments, arguments.out, CARD_FILE)
    dtype = as_dtype(arguments.dtype) if arguments.dtype else None
    results = [Result.read(file) for file in arguments.metrics]
    loaded = load_model(arguments.model)
    import tempfile

    with tempfile.TemporaryDirectory(prefix="opencoca-push-") as temporary:
        folder = Path(arguments.out or temporary)
        write_repository(folder, loaded, arguments.repo_id, licence=arguments.licence, results=results, dtype=dtype)
        if arguments.out:
            print(f"wrote {folder}, ready for {arguments.repo_id}; nothing was uploaded")
        elif arguments.dry_run:
            _show(folder, arguments.repo_id)
        else:
            from opencoca.store.hub import upload_folder

            address = upload_folder(folder, arguments.repo_id, private=arguments.private, message=arguments.message)
            print(f'{address}\nload it with opencoca.load("hf-hub:{arguments.repo_id}")')
    return 0


def _check_repo_id(repo_id: str) -> None:
    organisation, _, name = repo_id.partition("/")
    if not organisation or not name or "/" in name:
        raise ValueError(f"{repo_id!r} is no repository's name; write it as organisation/name")


def _show(folder: Path, repo_id: str) -> None:
    from opencoca.store.model_card import CARD_FILE

    print(f"{repo_id} would hold:")
    for file in sorted(folder.iterdir()):
        print(f"  {file.name:<20} {file.stat().st_size:>15,} bytes")
    print(f"\n{(folder / CARD_FILE).read_text(encoding='utf-8')}", end="")
