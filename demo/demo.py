"""Captions, classifies and searches the photographs in demo/photos, and draws a contact sheet of the result."""

import argparse
import sys
from pathlib import Path

import opencoca
from opencoca.data import list_images
from opencoca.pictures.contact_sheet import Finding, Photograph, write_contact_sheet

HERE = Path(__file__).parent
LABELS = [
    "a man",
    "a woman",
    "a child",
    "a group of people",
    "a dog",
    "a cat",
    "a bird",
    "a horse",
    "a car",
    "a bicycle",
    "a boat",
    "a cup of coffee",
    "a drink",
    "a pizza",
    "flowers",
    "a beach",
    "a desert",
    "a mountain",
    "a street",
    "a building",
    "a camera",
    "an astronaut",
    "a rocket",
    "a painting",
]
QUERIES = [
    "a dog with its tongue out",
    "people walking in the sand",
    "a man taking a picture",
    "something to drink",
]
TOP_LABELS = 3


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or folder of a model (default: the one that ships with the package)")
    parser.add_argument("--photos", default=HERE / "photos", type=Path, help="folder (default: demo/photos)")
    parser.add_argument("--out", default=HERE / "output" / "contact_sheet.png", type=Path)
    arguments = parser.parse_args(argv)

    try:
        photos = [arguments.photos / name for name in list_images(arguments.photos)]
        pipeline = opencoca.load(arguments.model)
        captions = [found[0] for found in pipeline.caption_details(photos)]
        labels = pipeline.classify(photos, LABELS)
        similarity = pipeline.similarity(photos, QUERIES)  # (photographs, queries)

        photographs = [
            Photograph(photo, caption.text, scores[:TOP_LABELS], caption.confidence)
            for photo, caption, scores in zip(photos, captions, labels, strict=True)
        ]
        findings = []
        for column, query in enumerate(QUERIES):
            best = int(similarity[:, column].argmax())
            findings.append(Finding(query, photos[best], float(similarity[best, column])))
        sheet = write_contact_sheet(
            arguments.out,
            photographs,
            findings,
            title="OpenCoCa",
            subtitle="One model captions each photograph, says which labels fit it, and finds photographs by text.",
        )
    except (ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2

    show(photographs, findings)
    print(f"\nContact sheet: {sheet}")
    return 0


def show(photographs: list[Photograph], findings: list[Finding]) -> None:
    """Prints what the contact sheet shows."""
    for photograph in photographs:
        best = ", ".join(f"{label} {probability:.0%}" for label, probability in photograph.labels)
        caption = f"{photograph.caption} (unsure)" if photograph.is_unsure else photograph.caption
        print(f"{Path(str(photograph.image)).name}\n  caption: {caption}\n  labels:  {best}")
    print()
    for finding in findings:
        print(f'"{finding.query}" finds {Path(str(finding.image)).name} (similarity {finding.similarity:.3f})')


if __name__ == "__main__":
    sys.exit(main())
