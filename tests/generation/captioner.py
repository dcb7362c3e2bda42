"""A small random captioner, and what it says without a cache: what the tests of generation share."""

import torch

from opencoca.generation import GeneratedCaption
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.tokenizer import Tokenizer, train_tokenizer

CAPTIONS = [
    "a brown dog runs over the grass",
    "two children play in the water",
    "a man in a red shirt climbs a rock",
    "the black dog jumps over the grass",
]
NUM_IMAGES = 12
CONTEXT_LENGTH = 14


def make_tokenizer() -> Tokenizer:
    return train_tokenizer(CAPTIONS * 3, 290)


def make_model(
    tokenizer: Tokenizer, text: dict | None = None, pooler: dict | None = None, linear: dict | None = None
) -> CoCa:
    """A random float64 model whose captions differ from image to image and end at different lengths."""
    torch.manual_seed(0)
    text_config = {
        "vocab_size": tokenizer.vocab_size + 7,
        "context_length": CONTEXT_LENGTH,
        "width": 32,
        "unimodal_depth": 1,
        "multimodal_depth": 2,
        "num_heads": 4,
        "mlp_width": 48,
        **(text or {}),
    }
    config = CoCaConfig.from_dict(
        {
            "embed_dim": 24,
            "image": {"image_size": 16, "patch_size": 8, "width": 24, "depth": 1, "num_heads": 2, "mlp_width": 32},
            "pooler": {"num_heads": 4, **(pooler or {"num_queries": 5})},
            "text": text_config,
            "linear": linear or {},
        }
    )
    model = CoCa(config).double().eval()
    with torch.no_grad():
        for layer in model.multimodal_decoder.layers:
            # Images and words must matter, and the end token must win now and then.
            layer.cross_block.attn.out_proj.weight.mul_(4)  # pyright: ignore
            layer.self_block.attn.out_proj.weight.mul_(4)  # pyright: ignore
        for parameter in (model.unimodal_decoder.token_embed.weight, model.lm_head.weight):
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
        model.lm_head.weight[tokenizer.eos_id] *= 4
    return model


def make_tokens(model: CoCa, num_images: int = NUM_IMAGES) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.inference_mode():
        return model.encode_image(torch.randn(num_images, 3, 16, 16, dtype=torch.float64)).tokens


def best_of(captions: list[tuple[GeneratedCaption, ...]]) -> list[GeneratedCaption]:
    return [of_image[0] for of_image in captions]


def next_log_probs(model: CoCa, ids: list[int], image_tokens: torch.Tensor) -> torch.Tensor:
    """(V,) of the next token of one text about one image (Q, D): the whole text through the whole model."""
    with torch.inference_mode():
        words = model.unimodal_decoder(torch.tensor([ids]), with_cls=False).words
        return model.lm_head(model.decode(words, image_tokens[None]))[0, -1].log_softmax(dim=-1)


def forbidden_ids(model: CoCa, tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.bos_id, tokenizer.pad_id, *range(tokenizer.vocab_size, model.config.text.vocab_size)}


def teacher_forced(model: CoCa, tokens: torch.Tensor, caption: GeneratedCaption) -> float:
    ids = torch.tensor([caption.token_ids])
    with torch.inference_mode():
        words = model.unimodal_decoder(ids[:, :-1], with_cls=False).words
        log_probs = model.lm_head(model.decode(words, tokens[None])).log_softmax(dim=-1)
    gained = log_probs[0].gather(1, ids[0, 1:, None]).squeeze(1)
    return float(gained[-caption.length :].sum())
