"""Captions, classifies and searches the photographs in demo/photos, and draws a contact sheet of the result."""

import argparse
import sys
from pathlib import Path

import opencoca
from opencoca.data import list_images
from opencoca.pictures.contact_sheet import Finding, Photograph, write_contact_sheet

HERE = Path(__file__).parent
LABELS = [
    "a woman",
    "a man with a camera",
    "a cat",
    "a raccoon",
    "a dog",
    "a cup of coffee",
    "a rocket",
    "stairs",
    "a beach",
]
QUERIES = [
    "a woman in an orange suit",
    "a man taking a picture",
    "an animal among green leaves",
    "a close-up of an animal's face",
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
        captions = pipeline.caption(photos)
        labels = pipeline.classify(photos, LABELS)
        similarity = pipeline.similarity(photos, QUERIES)  # (photographs, queries)

        photographs = [
            Photograph(photo, caption, scores[:TOP_LABELS])
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
        print(f"{Path(str(photograph.image)).name}\n  caption: {photograph.caption}\n  labels:  {best}")
    print()
    for finding in findings:
        print(f'"{finding.query}" finds {Path(str(finding.image)).name} (similarity {finding.similarity:.3f})')


if __name__ == "__main__":
    sys.exit(main())
