"""Naming: what the image encoder's own classifier knows becomes reachable by words.

An encoder that was trained on labels comes with a classifier. Captions of a few thousand images mention few of the
kinds of things that it tells apart, and a network that learns from those alone forgets the rest. Here the similarities
of an image with names of classes ("a photo of a tabby cat") learn to say what the classifier says of the image: a label
is a text, too (the paper, section 3.1), and this one comes with a teacher's probability.

Few images show most classes. So half as many images again are imagined, as features: two images mixed, their channels
scaled at random, and most pushed towards what the classifier looks for in a class that is drawn. What the classifier
says of them is known as exactly as for real ones.

Where the encoder's last stages are trained, the classifier reads the features of an untrained copy of them, and those
of the trained ones must go on telling it the same (a second divergence), or it would know nothing of imagined ones. An
encoder of which all is frozen is asked itself, though its last stages were trained earlier.

A network with `pooler.add_mean` begins with the map of the mean that keeps most of what tells the classes apart: the
classifier is a linear map of the mean as well, and so what it says of images unlike any that are trained on carries
over. For that, names must lie where the shortcut takes the classifier's weights of their classes, which needs no image:
they learn these directions, too (one minus the cosine).

Letters: I images, N features of an image, C their width, K classes, E embed_dim.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from opencoca.data.captions import collate_captions
from opencoca.evaluation.prompts import load_imagenet_class_names
from opencoca.model.coca import CoCa
from opencoca.model.encoders.efficientnet_lite import EfficientNetLite
from opencoca.model.layers.poolers import MeanShortcut
from opencoca.store.interop.efficientnet_weights import load_imagenet_classifier, load_imagenet_weights
from opencoca.tokenizer import Tokenizer

_TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}",
    "a picture of a {}",
    "a close up of a {}",
    "there is a {}",
    "a {}",
    "the {}",
    "{}",
)
# Of imagined features: the parameter of the beta distribution of mixtures, the deviation of the channels' logarithms,
# the share that is pushed towards a class, and how far at most, in means of the features.
_MIXTURE, _CHANNELS, _PUSHED, _PUSH = 0.5, 0.5, 0.7, 2.5
# The weight of the names' own directions beside the divergence.
_CLASSES = 10.0
# How much a shortcut stretches its directions in the beginning, to count as much as a pooled vector of norm sqrt(D).
_BEGINNING = 2.0
# What each class has beside the square root of its probability when classes are drawn.
_ANY_CLASS = 0.02


def imagined_images(images: int) -> int:
    """How many are imagined beside so many images."""
    return images // 2


class Namer:
    """The classifier of an image encoder, and its classes' names as texts.

    num_classes: how many classes are drawn for a batch.
    """

    def __init__(self, network: CoCa, tokenizer: Tokenizer, num_classes: int):
        """Raises ValueError for an image encoder without classifier, or without the weights that it goes with."""
        encoder = network.structure().image_encoder
        if not isinstance(encoder, EfficientNetLite):
            raise ValueError("task.naming_weight needs an image encoder with a classifier: efficientnet_lite0 to 2")
        teacher = EfficientNetLite(encoder.variant)
        load_imagenet_weights(teacher)
        if not _begins_as(encoder, teacher):
            raise ValueError(
                "task.naming_weight needs an image encoder with the ImageNet weights, of which at least the first "
                "stage is as it was: set encoder.init to imagenet"
            )
        self._teacher = teacher.requires_grad_(False).eval() if _trains(encoder) else None
        self.weight, self.bias = load_imagenet_classifier(encoder)
        self._directions = self.weight / self.weight.std(dim=1, keepdim=True)
        if network.mean_shortcut is not None:
            _begin(network.mean_shortcut, self.weight)
        names = load_imagenet_class_names()
        self.num_classes = min(num_classes, len(names))
        if "en" in tokenizer.languages:  # as the names are
            tokenizer = tokenizer.in_language("en")
        self._pad_id, length = tokenizer.pad_id, network.config.text.context_length
        self._texts = [tokenizer.encode_batch([t.format(name) for t in _TEMPLATES], length) for name in names]

    @torch.no_grad()
    def say(self, images: Tensor, from_stage: int, features: Tensor) -> Tensor:
        """What the classifier says (I, 1000) of images that have yet to pass the encoder from this stage on.

        features (I, N, C): what the network's own encoder makes of them.
        """
        if self._teacher is not None:
            self._teacher.to(images.device)
            features = self._teacher.run_stages(images, from_stage, self._teacher.num_stages)
        return self.logits(features)

    def loss(self, network: CoCa, features: Tensor, image_embed: Tensor, said: Tensor) -> Tensor:
        """The sum of the KL divergences from the classifier's probabilities of the drawn classes to the similarities'.

        features (I, N, C) of the image encoder; image_embed (I, E) and said (I, 1000), see `say`, of the same images.
        """
        if not len(features):
            return image_embed.sum()
        imagined = self.imagine(features, imagined_images(len(features)))
        _, vectors = network.pool_features(imagined, captioning=False)
        assert vectors is not None
        embeds = torch.cat((image_embed, network.project_vector(vectors)))
        logits = torch.cat((said, self.logits(imagined).detach()))
        classes = self._draw(logits)
        templates = torch.randint(len(_TEMPLATES), (len(classes),)).tolist()
        texts = [np.asarray(self._texts[k][t]) for k, t in zip(classes.tolist(), templates, strict=True)]
        token_ids, token_mask = (part.to(features.device) for part in collate_captions(texts, self._pad_id))
        names = network.encode_text(token_ids, token_mask).embed
        loss = _divergence(network.logit_scale * embeds @ names.T, logits[:, classes])
        if network.mean_shortcut is not None:
            cosines = (names * self._class_embeds(network, classes)).sum(dim=1)
            loss = loss + _CLASSES * len(embeds) * (1 - cosines).mean()
        return loss if self._teacher is None else loss + _divergence(self.logits(features), said)

    @torch.no_grad()
    def _class_embeds(self, network: CoCa, classes: Tensor) -> Tensor:
        """What the shortcut makes of the classifier's weights: embeddings (K, E) of what it looks for in classes."""
        assert network.mean_shortcut is not None
        centred = (self.weight - self.weight.mean(dim=0))[classes]
        return network.project_vector(network.mean_shortcut.proj(centred.to(network.mean_shortcut.proj.weight)))

    def logits(self, features: Tensor) -> Tensor:
        """features (I, N, C) -> what the classifier makes of them (I, 1000), in float32."""
        return features.mean(dim=1).float() @ self.weight.to(features.device).T + self.bias.to(features.device)

    @torch.no_grad()
    def imagine(self, features: Tensor, count: int) -> Tensor:
        """features (I, N, C) of images -> features (count, N, C) of images that do not exist."""
        device, width = features.device, features.shape[-1]
        first, second = (features[torch.randint(len(features), (count,)).to(device)] for _ in range(2))
        share = torch.distributions.Beta(_MIXTURE, _MIXTURE).sample((count, 1, 1)).to(features)
        mixed = (share * first + (1 - share) * second) * (_CHANNELS * torch.randn(count, 1, width)).exp().to(features)
        directions = self._directions[torch.randint(len(self.weight), (count, 1))].to(features)
        far = _PUSH * torch.rand(count, 1, 1) * (torch.rand(count, 1, 1) < _PUSHED)
        return (mixed + far.to(features) * mixed.mean(dim=(1, 2), keepdim=True) * directions).clamp(0, 6)

    def _draw(self, logits: Tensor) -> Tensor:
        """Different classes, those that are probable in the batch more often."""
        wanted = logits.softmax(dim=1).sum(dim=0).sqrt().cpu() + _ANY_CLASS
        return torch.multinomial(wanted, self.num_classes)


@torch.no_grad()
def _begin(shortcut: MeanShortcut, classifier: Tensor) -> None:
    """Sets an untrained shortcut to the directions in which the classifier's classes (1000, C) differ most.

    Where it has fewer outputs than there are classes, it keeps most of what tells them apart: of EfficientNet-Lite2's
    1,280 channels the 384 best directions alone name 93% of photographs as the classifier does, by cosine.
    """
    if shortcut.proj.weight.any():
        return
    _, _, directions = torch.linalg.svd(classifier - classifier.mean(dim=0), full_matrices=False)
    kept = _BEGINNING * directions[: shortcut.proj.out_features]
    shortcut.proj.weight[: len(kept)] = kept.to(shortcut.proj.weight)


def _divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """The sum of KL divergences from the probabilities of logits wanted (R, K) to those of found (R, K)."""
    return F.kl_div(found.log_softmax(dim=1), wanted.log_softmax(dim=1), reduction="sum", log_target=True)


def _trains(encoder: EfficientNetLite) -> bool:
    return any(parameter.requires_grad for parameter in encoder.parameters())


def _begins_as(encoder: EfficientNetLite, teacher: EfficientNetLite) -> bool:
    """Whether the encoder's first stage has the teacher's weights, but for rounding to half precision."""
    pairs = zip(encoder.stages[0].parameters(), teacher.stages[0].parameters(), strict=True)
    return all(torch.allclose(ours.cpu(), theirs, 1e-2, 1e-3) for ours, theirs in pairs)
