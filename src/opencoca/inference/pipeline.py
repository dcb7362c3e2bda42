"""The Pipeline, which `opencoca.load` returns: captions, embeddings and labels for images and texts.

Letters: I images, B texts, L labels, E embed_dim.
"""

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Unpack, get_args, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from opencoca.generation import GeneratedCaption, GenerationOptions, generate, seed_of_name
from opencoca.generation.attention_maps import word_maps
from opencoca.generation.confidence import CaptionCalibration, with_confidence
from opencoca.generation.decoding.session import DecodingSession
from opencoca.generation.explanation import Explanation, visible_box
from opencoca.generation.options import GenerationKeywords, shows_generation_options, with_keywords
from opencoca.generation.rerank import generate_reranked, rerank_weight
from opencoca.generation.scoring import TextScorer, pointwise_mutual_information, prior_of_texts
from opencoca.inference.labels import DEFAULT_TEMPLATES, Classifier, LabelLogits, LabelScore, Rule, label_texts
from opencoca.inference.preprocess import ImageLike, Images, Preprocess, as_pil, check_batch_size
from opencoca.model.coca import CoCa
from opencoca.store.model_folder import CONFIG_FILE, cast_weight, save_model_folder
from opencoca.system.devices import as_dtype, choose_device
from opencoca.system.names import suggests_options
from opencoca.tokenizer import Tokenizer

_TEXT_BATCH_SIZE = 256


class _Keywords(GenerationKeywords, total=False):
    """What `Pipeline.caption` takes beside images, options and num_captions."""

    language: str | None
    rerank: bool | float
    batch_size: int


class Pipeline:
    """A model together with its tokenizer and its preprocessing, ready for images and texts.

    Attributes: `model` (CoCa, in eval mode), `tokenizer`, `preprocess` (images of any kind -> (I, 3, height, width)),
    `task` (what its folder keeps of the task that it was finetuned on, or None), `classes` (the names of what its own
    head tells apart, or None), `calibration` (what gives captions their confidence, or None), `name` (what it was
    loaded by), `info` (where the model comes from), `session` (what decoding keeps from one call to the next),
    `device`, `dtype`, `languages` (those that captions are written and texts are read in, () for a model of one).

    language, where a method takes it: one of `languages`, which captions are written in and texts are in; None for the
    first, or for none where there are none. Any other is a ValueError. `in_language` chooses one for all calls.

    Images are one or several of: a path, the bytes of a file, an open file, a PIL image, an array (H, W, 3) or (H, W),
    a tensor (3, H, W); arrays and tensors hold uint8, or floating point in 0..1. One that cannot be used raises
    ImageError, a ValueError that names it. Texts are one string or several; a longer text than the model's
    context_length is cut there.
    """

    def __init__(
        self,
        model: CoCa,
        tokenizer: Tokenizer,
        preprocess: Preprocess,
        info: dict[str, Any] | None = None,
        task: dict[str, Any] | None = None,
        *,
        name: str = "",
    ) -> None:
        """task: what a model folder keeps of the task that the model was finetuned on; see `LoadedModel`."""
        self.model = model.eval()
        self.session = DecodingSession(self.model)
        self.tokenizer = tokenizer.with_context_length(model.config.text.context_length)
        if tokenizer.languages and tokenizer.language is None:
            self.tokenizer = self.tokenizer.in_language(tokenizer.languages[0])
        self.preprocess = preprocess
        self.name = name
        self.info = info or {}
        self.task = task
        self.calibration = CaptionCalibration.from_info(self.info)
        self.classes: tuple[str, ...] | None = tuple(task["classes"]) if task and "classes" in task else None

    def __repr__(self) -> str:
        count = sum(tensor.numel() for tensor in self.model.stored_weights().values())
        dtype = str(self.dtype).removeprefix("torch.")
        return f"Pipeline({self.name or 'unnamed'}, {count / 1e6:,.1f}M parameters, {self.device}, {dtype})"

    @property
    def languages(self) -> tuple[str, ...]:
        return self.tokenizer.languages

    def in_language(self, language: str | None) -> "Pipeline":
        """This pipeline, the same model, with another language for captions and texts; None: as it is.

        Raises ValueError for one that the model does not know.
        """
        if language is None or language == self.tokenizer.language:
            return self
        pipeline = copy.copy(self)
        pipeline.tokenizer = self.tokenizer.in_language(language)
        return pipeline

    @suggests_options
    def to(self, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> "Pipeline":
        """Moves the model to a device, changes the type of its weights, or both; returns this pipeline.

        device, dtype: as in `opencoca.load`; None leaves it as it is. Single numbers, such as the temperature, keep
        their type. Raises ValueError for what is unknown or not there, and then nothing has changed.
        """
        target = self.device if device is None else choose_device(device)
        if dtype is not None:
            wanted = as_dtype(dtype)
            self.model._apply(lambda tensor: cast_weight(tensor, wanted))
        self.model.to(target).tie_head()
        self.session = DecodingSession(self.model, records_steps=self.session.records_steps)
        return self

    @suggests_options
    def save(
        self, folder: str | os.PathLike[str], *, dtype: str | torch.dtype | None = None, overwrite: bool = False
    ) -> Path:
        """Writes the model as a folder that `opencoca.load` reads, and returns the folder.

        dtype: floating-point type of the stored weights; None keeps the model's. overwrite: whether a model that lies
        there already is replaced, which is a FileExistsError else. Raises also as `save_model_folder`.
        """
        folder = Path(folder)
        if (folder / CONFIG_FILE).exists() and not overwrite:
            raise FileExistsError(f"{folder} holds a model already; choose another folder, or overwrite=True")
        stored_as, looks = None if dtype is None else as_dtype(dtype), self.preprocess.config
        save_model_folder(folder, self.model, self.tokenizer, looks, dtype=stored_as, info=self.info, task=self.task)
        return folder

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @overload
    def caption(
        self, images: Images, options: None = None, *, num_captions: Literal[1] = 1, **keywords: Unpack[_Keywords]
    ) -> list[str]: ...
    @overload
    def caption(
        self, images: Images, options: None = None, *, num_captions: int, **keywords: Unpack[_Keywords]
    ) -> list[list[str]]: ...
    @overload
    def caption(
        self,
        images: Images,
        options: GenerationOptions,
        *,
        num_captions: int | None = None,
        **keywords: Unpack[_Keywords],
    ) -> list[str] | list[list[str]]: ...
    @shows_generation_options
    def caption(
        self,
        images: Images,
        options: GenerationOptions | None = None,
        *,
        num_captions: int | None = None,
        language: str | None = None,
        rerank: bool | float = False,
        batch_size: int = 32,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[str] | list[list[str]]:
        """Captions for images: a text for each, or a list of num_captions texts, best first; always a list of these.

        Args:
            options: how captions are generated; None for the defaults. Keywords replace single fields of it:
                `caption(photos, num_beams=4)`, or `caption(photos, options, seed=2)`. `GenerationOptions` explains
                each. What is drawn at random depends on the seed and on the image's place among the images.
            num_captions: how many for each image, 1 unless the options say otherwise; for 2 or more, num_beams must be
                as many, or the options sample.
            language: which captions are written in; see `Pipeline`.
            rerank: whether all candidates (beams or samples) are ordered by the similarity of image and text too, and
                the weight of similarity, 0 to 1; True for the default. See `opencoca.generation.rerank`.
            batch_size: images at a time. No caption depends on it, or on the other images.

        Raises:
            ValueError: options that cannot be met; ImageError for an image that cannot be used.
            TypeError: an option that does not exist.
        """
        chosen = with_keywords(options, num_captions, keywords)
        details = self.caption_details(images, chosen, language=language, rerank=rerank, batch_size=batch_size)
        if chosen.num_captions == 1:
            return [captions[0].text for captions in details]
        return [[caption.text for caption in captions] for captions in details]

    @shows_generation_options
    def caption_details(
        self,
        images: Images,
        options: GenerationOptions | None = None,
        *,
        num_captions: int | None = None,
        language: str | None = None,
        rerank: bool | float = False,
        batch_size: int = 32,
        **keywords: Unpack[GenerationKeywords],
    ) -> list[tuple[GeneratedCaption, ...]]:
        """Captions with token ids, log-probabilities and more; a tuple for each image, best first. See `caption`.

        `GeneratedCaption` lists what a caption has; its `confidence` says how far it is to be believed.
        """
        chosen, spoken = with_keywords(options, num_captions, keywords), self.in_language(language)
        captions: list[tuple[GeneratedCaption, ...]] = []
        for pixels in self._batches(images, batch_size):
            names = [str(len(captions) + index) for index in range(len(pixels))]
            captions += spoken.caption_pixels(pixels, chosen, names=names, rerank=rerank)
        return captions

    def caption_pixels(
        self, pixels: Tensor, options: GenerationOptions, *, names: Sequence[str], rerank: bool | float = False
    ) -> list[tuple[GeneratedCaption, ...]]:
        """Captions of preprocessed images (I, 3, H, W), best first.

        names: one for each image; what is drawn at random depends on the options' seed and on this name alone.
        """
        # A file's name may hold bytes that no encoding knows.
        seeds = [seed_of_name(name.encode("utf-8", "backslashreplace").decode()) for name in names]
        weight, model, tokenizer, session = rerank_weight(rerank), self.model, self.tokenizer, self.session
        with torch.inference_mode():
            images = model.encode_image(pixels)
        if weight is not None:
            found = generate_reranked(model, images, tokenizer, options, weight, image_seeds=seeds, session=session)
        else:
            needs_embeds = self.calibration is not None
            found = generate(
                model,
                images.tokens,
                tokenizer,
                options,
                image_seeds=seeds,
                with_text_embed=needs_embeds,
                session=session,
            )
        if self.calibration is None:
            return found
        return [with_confidence(own, embed, self.calibration) for own, embed in zip(found, images.embed, strict=True)]

    @suggests_options
    def embed_images(self, images: Images, *, batch_size: int = 32) -> Tensor:
        """Embeddings (I, E) of images: float32, on the CPU, of length 1."""
        embeds = [torch.empty(0, self.model.config.embed_size)]
        for pixels in self._batches(images, batch_size):
            with torch.inference_mode():
                embeds.append(self.model.encode_image(pixels).embed.float().cpu())
        return torch.cat(embeds)

    @suggests_options
    def embed_texts(
        self,
        texts: str | Iterable[str],
        *,
        language: str | None = None,
        batch_size: int = _TEXT_BATCH_SIZE,
        progress: bool = False,
    ) -> Tensor:
        """Embeddings (B, E) of texts: float32, on the CPU, of length 1."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        check_batch_size(batch_size)
        tokenizer = self.in_language(language).tokenizer
        embeds = [torch.empty(0, self.model.config.embed_size)]
        starts = range(0, len(texts), batch_size)
        for start in tqdm(starts, desc="embedding texts", unit="batch", disable=not progress):
            batch = tokenizer(texts[start : start + batch_size])
            with torch.inference_mode():
                output = self.model.encode_text(batch.token_ids.to(self.device), batch.token_mask.to(self.device))
            embeds.append(output.embed.float().cpu())
        return torch.cat(embeds)

    def similarity(self, images: Images, texts: str | Iterable[str], *, language: str | None = None) -> Tensor:
        """Cosine (I, B) of every image with every text, -1 to 1."""
        return self.embed_images(images) @ self.embed_texts(texts, language=language).T

    @suggests_options
    def score_captions(
        self,
        images: Images,
        texts: str | Iterable[str],
        *,
        language: str | None = None,
        prior_weight: float = 0.0,
        batch_size: int = 32,
    ) -> Tensor:
        """Scores texts with the captioner: log p(text | image) (I, B) in nats, end token included; float32 on the CPU.

        prior_weight: the share of a text's log-probability for a blank image that is subtracted. 1 gives the pointwise
            mutual information of image and text, which does not favour common texts.
        """
        scorer = self.in_language(language).text_scorer(texts)
        prior = self.text_prior(scorer) if prior_weight else None
        scores = [torch.empty(0, scorer.num_texts)]
        for pixels in self._batches(images, batch_size):
            with torch.inference_mode():
                found = scorer.score_all(self.model.encode_image(pixels).tokens)
            scores.append(found if prior is None else pointwise_mutual_information(found, prior, prior_weight))
        return torch.cat([part.float().cpu() for part in scores])

    def text_scorer(self, texts: str | Iterable[str]) -> TextScorer:
        """Prepares texts to be scored for images; see `TextScorer`."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        batch = self.tokenizer(texts)
        ids, mask = batch.token_ids.to(self.device), batch.token_mask.to(self.device)
        return TextScorer(self.model, ids, mask, given_ids=self.tokenizer.language_ids)

    def text_prior(self, scorer: TextScorer) -> Tensor:
        """The log-probability (B,) of each text for a blank image, which has the mean colour everywhere."""
        blank = torch.zeros(1, 3, *self.preprocess.config.image_size, device=self.device, dtype=self.dtype)
        with torch.inference_mode():
            return prior_of_texts(scorer, self.model.encode_image(blank).tokens)

    @suggests_options
    def explain(self, image: ImageLike, caption: str | None = None, *, language: str | None = None) -> Explanation:
        """Shows where in one image each word of a caption looks; without a caption the model writes one.

        `Explanation.maps` holds the attention weights, `Explanation.overlays` lays them over the photograph, and
        `opencoca.pictures.explain.write_explanations` draws them.

        Raises:
            ValueError: the caption has no words, or the image encoder keeps no grid; ImageError for the image.
        """
        photograph = as_pil(image)
        pixels = self.preprocess(photograph).to(self.device, self.dtype)
        if caption is None:
            caption = self.caption(photograph, language=language)[0]
        maps = word_maps(self.model, self.in_language(language).tokenizer, pixels[0], caption)
        return Explanation(photograph, caption, maps, visible_box(photograph.size, self.preprocess.config))

    @suggests_options
    def classify(
        self,
        images: Images,
        labels: Sequence[str] | None = None,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        *,
        by: Rule = "similarity",
        language: str | None = None,
        batch_size: int = 32,
    ) -> list[list[LabelScore]]:
        """Ranks labels for each image, with probabilities that sum to 1, the most probable first.

        Without labels, a model that was finetuned on classes (`classes`) ranks these by its own head.
        By similarity, a label's embedding is the mean over its texts, one for each template, {} standing for the label
        (CLIP, arXiv 2103.00020, section 3.1.4); the softmax has the model's own temperature. By likelihood, a label's
        logit is the mean over its texts of log p(text | image) - log p(text), by the captioner. The default templates
        are for English (and models of one language); in others a label stands by itself.

        Raises:
            ValueError: no labels, the same one twice, a template that does not contain {} once, or no such rule.
        """
        classifier = self.in_language(language).classifier(labels, templates, by)
        ranked = []
        for pixels in self._batches(images, batch_size):
            with torch.inference_mode():
                ranked += classifier.rank(self.model.image_features(pixels))
        return ranked

    def classifier(
        self,
        labels: Sequence[str] | None = None,
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        by: Rule = "similarity",
    ) -> Classifier:
        """What `classify` ranks labels with, for images that are encoded already; raises ValueError as it does."""
        if labels is None:
            if self.classes is None:
                raise ValueError("this model was not trained on classes of its own; give the labels to choose from")
            return Classifier(self.classes, lambda features: self.model.head_logits(features).float().cpu())
        logits_of = self.label_logits(labels, templates, by)
        return Classifier(tuple(labels), lambda features: logits_of(*self.model.pool_image(features)))

    def label_logits(
        self, labels: Sequence[str], templates: str | Sequence[str], by: Rule, *, progress: bool = False
    ) -> LabelLogits:
        """Prepares labels to be compared with encoded images; they pass the text decoder once, here.

        Raises ValueError as `classify` does.
        """
        if by not in get_args(Rule):
            raise ValueError(f"cannot classify by {by!r}; choose {', '.join(get_args(Rule))}")
        scorer = None if by == "similarity" else self.text_scorer(self._label_texts(labels, templates))
        return LabelLogits(
            num_labels=len(labels),
            scale=self.model.logit_scale.detach().float().cpu(),
            embeds=None if by == "likelihood" else self.embed_labels(labels, templates, progress=progress),
            scorer=scorer,
            prior=None if scorer is None else self.text_prior(scorer),
        )

    def embed_labels(
        self, labels: Sequence[str], templates: str | Sequence[str] = DEFAULT_TEMPLATES, *, progress: bool = False
    ) -> Tensor:
        """Embeddings (L, E) of labels, as `classify` compares images with; raises ValueError as it does."""
        embeds = self.model.label_embeds(self.embed_texts(self._label_texts(labels, templates), progress=progress))
        return F.normalize(embeds.unflatten(0, (len(labels), -1)).mean(dim=1), dim=-1)

    def _label_texts(self, labels: Sequence[str], templates: str | Sequence[str]) -> list[str]:
        """The default templates are English; in another language a label stands by itself."""
        is_english = self.tokenizer.language in (None, "en")
        return label_texts(labels, templates if is_english or templates != DEFAULT_TEMPLATES else "{}")

    def _batches(self, images: Images, batch_size: int) -> Iterator[Tensor]:
        for pixels in self.preprocess.batches(images, batch_size):
            yield pixels.to(self.device, self.dtype)
