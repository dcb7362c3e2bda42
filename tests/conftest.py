"""What many tests share: a fixed seed, hypothesis without deadlines, and tiny configurations."""

import os
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, ImageEncoderConfig, PoolerConfig, TextConfig

# Tiny tensors: several threads only wait for each other, seconds where another process keeps a core busy.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands and processes that tests start

# Deadlines fail on a busy machine, and the default run is to give the same answer twice.
settings.register_profile("opencoca", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("opencoca")

if find_spec("torchvision") is not None and torch.version.cuda is None:
    # Other projects' packages need torchvision, and PyPI has it built for CUDA alone: beside a CPU build of PyTorch its
    # operators do not load, and it fails to import where it describes two of them. Declaring these is enough.
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

ConfigMaker = Callable[..., CoCaConfig]
ModelMaker = Callable[..., CoCa]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def tiny_config(image: dict | None = None, pooler: dict | None = None, **text: object) -> CoCaConfig:
    """A CoCa of some ten thousand parameters; changes to the text's fields go by name, to the others' as dicts.

    Fields of `Compat` may be given without the name of their part, as stored models of before have them.
    """
    base_text = TextConfig(
        vocab_size=37,
        context_length=12,
        width=16,
        unimodal_depth=2,
        multimodal_depth=2,
        num_heads=4,
        mlp_width=24,
    )
    base_image = ImageEncoderConfig(
        image_size=(12, 12), patch_size=4, width=24, depth=2, num_heads=2, mlp_width=32, dropout=0.0
    )
    return CoCaConfig.from_dict(
        {
            "embed_dim": 8,
            "image": asdict(base_image) | (image or {}),
            "pooler": asdict(PoolerConfig(num_queries=5, num_heads=2)) | (pooler or {}),
            "text": asdict(base_text) | text,
        }
    )


@pytest.fixture(scope="session")
def make_config() -> ConfigMaker:
    return tiny_config


@pytest.fixture(scope="session")
def make_model() -> ModelMaker:
    """Builds a tiny CoCa in eval mode whose every parameter differs from its neutral start, so that each one shows."""

    def make(image: dict | None = None, pooler: dict | None = None, **text: object) -> CoCa:
        torch.manual_seed(1)
        model = CoCa(tiny_config(image, pooler, **text)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name != "log_logit_scale":
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make
