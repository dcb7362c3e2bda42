"""`opencoca classify` and `opencoca embed`: labels and embeddings for photographs."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opencoca.cli.common import (
    CommandError,
    add_by,
    add_command,
    add_images,
    add_model_options,
    add_overwrite,
    add_templates,
    check_new,
    check_printable,
    load_pipeline,
    open_images,
    positive_int,
    shows_progress,
)
from opencoca.cli.streams import complain_of_left_out
from opencoca.system.messages import escaped
from opencoca.system.reading import read_lines

if TYPE_CHECKING:
    from torch import Tensor

    from opencoca.data import SampleSource
    from opencoca.inference.pipeline import Pipeline

_BROKEN = "An image that cannot be read is reported; the others are used, and the exit code is 2."
_EMBED_SUFFIXES = (".npz", ".npy", ".safetensors")


def add_commands(commands: Any) -> None:
    classify = add_command(
        commands,
        "classify",
        run_classify,
        "Say which of your labels fits each image, with probabilities.",
        example="opencoca classify photo.jpg --labels cat,dog,'a red car'",
        more=_BROKEN,
    )
    add_images(classify)
    classify.add_argument(
        "--labels",
        metavar="A,B,C",
        help="what to choose from, separated by commas (default: the classes that the model was finetuned on)",
    )
    add_templates(classify, None, "three general ones")
    add_by(classify)
    classify.add_argument(
        "--top", type=positive_int, default=5, metavar="K", help="number of labels to print for each image"
    )
    classify.add_argument(
        "--json", action="store_true", help="print a JSON object on each line: image, labels [{label, probability}]"
    )
    add_model_options(classify)

    embed = add_command(
        commands,
        "embed",
        run_embed,
        "Store the embeddings of images and texts: float32 vectors of length 1, whose dot product is their similarity.",
        example="opencoca embed holiday/ --texts 'a sunset' 'a dog' --out holiday.npz",
        more="An .npz file holds image_names, image_embed (a row for each image), texts and text_embed (a row for\n"
        "each text). A .safetensors file holds the two arrays, and the names as JSON lists in its metadata. An .npy\n"
        "file holds one array; its names are in FILE.names.json.\n\n" + _BROKEN,
    )
    add_images(embed, "*")
    embed.add_argument("--texts", nargs="+", default=[], metavar="TEXT", help="texts to embed")
    embed.add_argument(
        "--texts-file", metavar="FILE", help="UTF-8 text file with a text on each line; empty lines are skipped"
    )
    embed.add_argument(
        "--out", required=True, metavar="FILE", help="file to write; its name ends in .npz, .npy or .safetensors"
    )
    add_overwrite(embed)
    add_model_options(embed)


def run_classify(arguments: argparse.Namespace) -> int:
    from opencoca.evaluation.encoding import encode_images
    from opencoca.evaluation.prompts import load_templates
    from opencoca.inference.labels import DEFAULT_TEMPLATES

    check_printable()
    source = open_images(arguments)
    labels = None
    if arguments.labels is not None:
        labels = [label.strip() for label in arguments.labels.split(",") if label.strip()]
    templates = load_templates(arguments.templates) if arguments.templates else DEFAULT_TEMPLATES
    pipeline = load_pipeline(arguments)
    classifier = pipeline.classifier(labels, templates, arguments.by)
    for batch in encode_images(pipeline, source, arguments.batch_size, progress=shows_progress()):
        for broken in batch.broken:
            complain_of_left_out(broken.reason)
        for index, ranked in zip(batch.indices, classifier.rank(batch.features), strict=True):
            best = ranked[: arguments.top]
            if arguments.json:
                scores = [{"label": label, "probability": value} for label, value in best]
                print(json.dumps({"image": source.key(index), "labels": scores}, ensure_ascii=False))
            else:
                shown = [f"{label} {value:.1%}" for label, value in best]
                print("\t".join([escaped(source.key(index)), *shown]))
    return 0


def run_embed(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    if out.suffix not in _EMBED_SUFFIXES:
        raise CommandError(f"cannot tell the format of {str(out)!r}: --out must end in {', '.join(_EMBED_SUFFIXES)}")
    texts = [*arguments.texts, *(read_lines(arguments.texts_file, "texts") if arguments.texts_file else ())]
    if not arguments.images and not texts:
        raise CommandError("there is nothing to embed; give images, --texts or --texts-file")
    if out.suffix == ".npy" and arguments.images and texts:
        raise CommandError("a .npy file holds one array; give images or texts, or store both as .npz or .safetensors")
    check_new(arguments, out, *([_names_file(out)] if out.suffix == ".npy" else []))
    source = open_images(arguments) if arguments.images else []
    pipeline = load_pipeline(arguments)
    names, image_embed = _embed_images(pipeline, source, arguments.batch_size)
    if source and not names:
        raise CommandError(f"none of the {len(source)} images can be read, so nothing was written")
    text_embed = pipeline.embed_texts(texts)
    _write_embeddings(out, names, image_embed, texts, text_embed)
    print(f"{out}: {len(names)} images and {len(texts)} texts, {image_embed.shape[1]} numbers each")
    return 0


def _names_file(out: Path) -> Path:
    return out.with_name(out.name + ".names.json")


def _embed_images(
    pipeline: "Pipeline", source: "SampleSource | list[str]", batch_size: int
) -> tuple[list[str], "Tensor"]:
    import torch

    from opencoca.evaluation.encoding import encode_images

    names: list[str] = []
    embeds = [torch.empty(0, pipeline.model.config.embed_size)]
    for batch in encode_images(pipeline, source, batch_size, progress=bool(source), description="embedding images"):
        for broken in batch.broken:
            complain_of_left_out(broken.reason)
        names += [source[index] if isinstance(source, list) else source.key(index) for index in batch.indices]
        embeds.append(batch.embed)
    return names, torch.cat(embeds)


def _write_embeddings(
    out: Path, names: list[str], image_embed: "Tensor", texts: list[str], text_embed: "Tensor"
) -> None:
    import numpy as np
    from safetensors.torch import save

    from opencoca.system.files import atomic_write, write_json

    if out.suffix == ".npy":
        write_json(_names_file(out), names or texts)
    with atomic_write(out) as partial:
        if out.suffix == ".safetensors":
            metadata = {"image_names": json.dumps(names), "texts": json.dumps(texts)}
            partial.write_bytes(save({"image_embed": image_embed, "text_embed": text_embed}, metadata))
            return
        with open(partial, "wb") as file:
            if out.suffix == ".npy":
                np.save(file, (image_embed if names else text_embed).numpy())
            else:
                np.savez(
                    file,
                    image_names=np.array(names, dtype=str),
                    image_embed=image_embed.numpy(),
                    texts=np.array(texts, dtype=str),
                    text_embed=text_embed.numpy(),
                )
