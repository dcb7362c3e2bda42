"""The published CoCa weights that `opencoca.load` knows: their repositories, training data and scores.

All four are open_clip's, under open_clip's names. Sources of the facts below:

- repository, tag: the table of pretrained weights in open_clip 3.3.0;
- licence, file names, sizes, revisions: the model cards and file lists of the repositories;
- sha256 of ViT-L-14's files: public projects that pin these files by it;
- ImageNet and retrieval scores: docs/openclip_results.csv and docs/openclip_retrieval_results.csv of open_clip;
- captioning scores: LAION's announcement of the models, laion.ai/blog/coca.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

OPEN_CLIP_WEIGHTS = "open_clip_pytorch_model.bin"


@dataclass(frozen=True)
class PublishedModel:
    """Weights that others published and that load here.

    name: open_clip's name of the architecture.
    weights: the tag that tells the weights of one architecture apart.
    revision: the commit that is loaded; "main" where the full id of the commit is not known.
    sha256: checksum of the file; None where it is not known, and then the hub's checksum is used.
    size_bytes: size of the file as the hub states it, mostly rounded to 10 MB.
    scores: fractions in percent; CIDEr times 100.
    """

    name: str
    weights: str
    repo_id: str
    revision: str
    size_bytes: int
    num_parameters: int
    training_data: str
    scores: Mapping[str, float] = field(default_factory=dict)
    sha256: str | None = None
    file_name: str = OPEN_CLIP_WEIGHTS
    licence: str = "MIT"
    note: str = ""

    @property
    def full_name(self) -> str:
        """Name and tag in one word, as `load` and --model take it."""
        return f"{self.name}@{self.weights}"


_B32_PARAMETERS, _L14_PARAMETERS = 253_560_000, 638_450_000
_LAION = "LAION-2B, 13 billion samples, batches of 90,000"
_COCO = f"{_LAION}; then the captions of MS-COCO"

PUBLISHED_MODELS: tuple[PublishedModel, ...] = (
    PublishedModel(
        name="coca_ViT-B-32",
        weights="laion2b_s13b_b90k",
        repo_id="laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
        revision="main",
        size_bytes=1_010_000_000,
        num_parameters=_B32_PARAMETERS,
        training_data=_LAION,
        scores={"imagenet_top1": 63.6, "coco_text_to_image_r1": 36.2, "coco_image_to_text_r1": 54.6},
    ),
    PublishedModel(
        name="coca_ViT-B-32",
        weights="mscoco_finetuned_laion2b_s13b_b90k",
        repo_id="laion/mscoco_finetuned_CoCa-ViT-B-32-laion2B-s13B-b90k",
        revision="ef0732eb039c932624eb8b867c82ab2311001b09",
        size_bytes=1_010_000_000,
        num_parameters=_B32_PARAMETERS,
        training_data=_COCO,
        scores={"imagenet_top1": 0.9, "coco_text_to_image_r1": 0.3, "coco_image_to_text_r1": 0.9},
        note="for captions alone: finetuning on captions destroyed its embeddings",
    ),
    PublishedModel(
        name="coca_ViT-L-14",
        weights="laion2b_s13b_b90k",
        repo_id="laion/CoCa-ViT-L-14-laion2B-s13B-b90k",
        revision="74207cb7fde8eafc9864451ebd332fa8e75b150f",
        sha256="73725652298ad76ed2162caffdae96d8653a05d7a29b6281103e4df81d0ff8ea",
        size_bytes=2_554_109_637,
        num_parameters=_L14_PARAMETERS,
        training_data=_LAION,
        scores={"imagenet_top1": 75.6, "coco_text_to_image_r1": 45.7, "coco_image_to_text_r1": 62.9},
    ),
    PublishedModel(
        name="coca_ViT-L-14",
        weights="mscoco_finetuned_laion2b_s13b_b90k",
        repo_id="laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k",
        revision="f895105fb18cf5ea3ba7a1172966e4cc0ad8d743",
        sha256="f22c34acef2b7a5d1ed28982a21077de651363eaaebcf34a3f10676e17837cb8",
        size_bytes=2_550_000_000,
        num_parameters=_L14_PARAMETERS,
        training_data=_COCO,
        scores={
            "imagenet_top1": 72.1,
            "coco_text_to_image_r1": 53.7,
            "coco_image_to_text_r1": 66.8,
            "coco_bleu_4": 35.6,
            "coco_cider": 125.3,
            "nocaps_cider": 106.5,
        },
    ),
)


def find_published(name: str, weights: str | None) -> PublishedModel | None:
    """Finds the published model of this name and tag; None if no model has the name.

    Raises ValueError, which lists the tags, if the name is known and the tag is missing or unknown.
    """
    tags = {model.weights: model for model in PUBLISHED_MODELS if model.name == name}
    if not tags:
        return None
    if weights not in tags:
        problem = "several weights" if weights is None else f"no weights {weights!r}"
        raise ValueError(f"{name} has {problem}; choose with weights= or {name}@WEIGHTS among {', '.join(tags)}")
    return tags[weights]


def published_in(repo_id: str) -> PublishedModel | None:
    """Finds the published model that a repository holds; None if it holds none of them."""
    return next((model for model in PUBLISHED_MODELS if model.repo_id.lower() == repo_id.lower()), None)
