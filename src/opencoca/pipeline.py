"""What most users need of a model: captions, embeddings, labels. `load` gives a Pipeline.

Letters: I images, B texts, L labels, E embed_dim.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opencoca.generation import GeneratedCaption, GenerationOptions, generate
from opencoca.model.coca import CoCa
from opencoca.model_folder import load_model_folder
from opencoca.preprocess import ImageLike, Preprocess
from opencoca.tokenizer import Tokenizer

DEFAULT_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "{}")
_TEXT_BATCH_SIZE = 256


class LabelScore(NamedTuple):
    """A label and its probability among the labels that were given."""

    label: str
    probability: float


@dataclass(frozen=True)
class ShippedModel:
    """A model that comes with the package."""

    name: str
    folder: Path
    description: str
    licence: str


_MODELS_FOLDER = Path(__file__).parent / "assets" / "models"
DEFAULT_MODEL = "coca-flickr8k"
SHIPPED_MODELS: dict[str, ShippedModel] = {
    model.name: model
    for model in (
        ShippedModel(
            name="coca-flickr8k",
            folder=_MODELS_FOLDER / "coca-flickr8k",
            description="EfficientNet-Lite2 and a small text decoder, trained on the 6,000 photographs of Flickr8k",
            licence="Apache-2.0; the training photographs and captions are for research use (see its model card)",
        ),
    )
}


def available_models() -> tuple[ShippedModel, ...]:
    """The models that `load` knows by name."""
    return tuple(SHIPPED_MODELS.values())


def load(
    name_or_path: str | os.PathLike[str] | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype | None = None,
) -> "Pipeline":
    """Loads a model, ready for use.

    Args:
        name_or_path: the name of a shipped model (`available_models`; None for the default one), or a folder with
            config.json, model.safetensors and tokenizer.json, such as that of a training run. A name comes before a
            folder of the same name: write `./name` for the folder.
        device: "auto" (CUDA if there is one, else the CPU), or any device of PyTorch's.
        dtype: floating-point type of the computation, such as "bfloat16" or torch.bfloat16; None for float32.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: its files are damaged; or the device or dtype is unknown or not there.
    """
    device, dtype = _as_device(device), _as_dtype(dtype)
    name = DEFAULT_MODEL if name_or_path is None else os.fspath(name_or_path)
    shipped = SHIPPED_MODELS.get(name)
    folder = shipped.folder if shipped else Path(name)
    if not folder.exists():
        known = ", ".join(SHIPPED_MODELS)
        raise FileNotFoundError(
            f"the model {name!r} is missing from this installation ({folder}); install opencoca again"
            if shipped
            else f"there is no model {name!r}: it is neither a folder nor the name of a shipped model ({known})"
        )
    loaded = load_model_folder(folder, device, dtype)
    return Pipeline(loaded.model, loaded.tokenizer, Preprocess(loaded.preprocess), loaded.info)


class Pipeline:
    """A model with all that is needed to use it.

    Attributes: `model` (CoCa, in eval mode), `tokenizer`, `preprocess` (images of any kind -> (I, 3, height, width)),
    `info` (where the model comes from), `device`, `dtype`.

    Images are one or several of: a path, the bytes of a file, a PIL image, an array (H, W, 3) or (H, W), a tensor
    (3, H, W); arrays and tensors hold uint8, or floating point in 0..1. One that cannot be used raises ImageError,
    a ValueError that names it. Texts are one string or several; a longer text than the model's context_length is
    cut there.
    """

    def __init__(
        self, model: CoCa, tokenizer: Tokenizer, preprocess: Preprocess, info: dict[str, Any] | None = None
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.info = info or {}

    @property
    def device(self) -> torch.device:
        return self.model.unimodal_decoder.token_embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.unimodal_decoder.token_embed.weight.dtype

    def caption(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        prefix: str = "",
        batch_size: int = 32,
    ) -> list[str]:
        """One caption for each image, always as a list; see `GenerationOptions` for the options."""
        details = self.caption_details(
            images,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            prefix=prefix,
            batch_size=batch_size,
        )
        return [caption.text for caption in details]

    def caption_details(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        prefix: str = "",
        batch_size: int = 32,
    ) -> list[GeneratedCaption]:
        """As `caption`, with token ids and log-probabilities."""
        options = GenerationOptions(max_new_tokens, min_new_tokens, prefix)
        captions: list[GeneratedCaption] = []
        for pixels in self._batches(images, batch_size):
            with torch.inference_mode():
                tokens = self.model.encode_image(pixels).tokens
            captions += generate(self.model, tokens, self.tokenizer, options)
        return captions

    def embed_images(self, images: ImageLike | Iterable[ImageLike], *, batch_size: int = 32) -> Tensor:
        """Embeddings (I, E) of images: float32, on the CPU, of length 1."""
        embeds = [torch.empty(0, self.model.config.embed_dim)]
        for pixels in self._batches(images, batch_size):
            with torch.inference_mode():
                embeds.append(self.model.encode_image(pixels).embed.float().cpu())
        return torch.cat(embeds)

    def embed_texts(self, texts: str | Iterable[str], *, batch_size: int = _TEXT_BATCH_SIZE) -> Tensor:
        """Embeddings (B, E) of texts: float32, on the CPU, of length 1."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        _check_batch_size(batch_size)
        embeds = [torch.empty(0, self.model.config.embed_dim)]
        for start in range(0, len(texts), batch_size):
            batch = self.tokenizer(texts[start : start + batch_size], self.model.config.text.context_length)
            with torch.inference_mode():
                output = self.model.encode_text(batch.token_ids.to(self.device), batch.token_mask.to(self.device))
            embeds.append(output.embed.float().cpu())
        return torch.cat(embeds)

    def similarity(self, images: ImageLike | Iterable[ImageLike], texts: str | Iterable[str]) -> Tensor:
        """Cosine (I, B) of every image with every text, -1 to 1."""
        return self.embed_images(images) @ self.embed_texts(texts).T

    def classify(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Sequence[str],
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        *,
        batch_size: int = 32,
    ) -> list[list[LabelScore]]:
        """For each image all labels with their probabilities (they sum to 1), the most probable first.

        A label's embedding is the mean over its texts, one for each template, {} standing for the label
        (CLIP, arXiv 2103.00020, section 3.1.4); the softmax has the model's own temperature.

        Raises:
            ValueError: no labels, the same one twice, or a template without {}.
        """
        label_embeds = self.embed_labels(labels, templates)
        cosines = self.embed_images(images, batch_size=batch_size) @ label_embeds.T
        probabilities = (cosines * self.model.logit_scale.detach().float().cpu()).softmax(dim=-1)
        return [
            [LabelScore(labels[index], row[index]) for index in sorted(range(len(row)), key=lambda i: -row[i])]
            for row in probabilities.tolist()
        ]

    def embed_labels(self, labels: Sequence[str], templates: str | Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
        """Embeddings (L, E) of labels, as `classify` compares images with; raises ValueError as it does."""
        templates = [templates] if isinstance(templates, str) else list(templates)
        _check_labels(labels, templates)
        # Not str.format: a label or template may hold other braces.
        texts = [template.replace("{}", label) for label in labels for template in templates]
        embeds = self.embed_texts(texts).view(len(labels), len(templates), -1)
        return F.normalize(embeds.mean(dim=1), dim=-1)

    def _batches(self, images: ImageLike | Iterable[ImageLike], batch_size: int) -> Iterator[Tensor]:
        for pixels in self.preprocess.batches(images, batch_size):
            yield pixels.to(self.device, self.dtype)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")


def _check_labels(labels: Sequence[str], templates: Sequence[str]) -> None:
    if isinstance(labels, str):
        raise ValueError(f"labels is the single text {labels[:40]!r}; give a list of labels")
    if not labels:
        raise ValueError("there are no labels to choose from; give at least one")
    for position, label in enumerate(labels):
        if not isinstance(label, str):
            raise ValueError(f"label number {position} is {label!r}, not a string")
    if twice := [label for position, label in enumerate(labels) if label in labels[:position]]:
        raise ValueError(f"the label {twice[0]!r} is given more than once; give each label once")
    if not templates:
        raise ValueError("there are no templates; give at least one, such as 'a photo of a {}.'")
    if without := [template for template in templates if "{}" not in template]:
        raise ValueError(f"the template {without[0]!r} has no {{}} for the label; write it as in 'a photo of a {{}}.'")


def _as_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{device!r} is no device; choose auto, cpu, cuda or cuda:N") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"the device {device} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return found


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def _as_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"the dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    return found
