"""Writing captions: options, logit filters, search, and the loop that runs them."""

from typing import TYPE_CHECKING, Any

from opencoca.generation.options import GeneratedCaption, GenerationOptions

if TYPE_CHECKING:
    from opencoca.generation.loop import generate
    from opencoca.generation.sampling import seed_of_name, seeds_of_images

__all__ = ["GeneratedCaption", "GenerationOptions", "generate", "seed_of_name", "seeds_of_images"]

_MODULES = {
    "generate": "opencoca.generation.loop",
    "seed_of_name": "opencoca.generation.sampling",
    "seeds_of_images": "opencoca.generation.sampling",
}


def __getattr__(name: str) -> Any:
    # On first use: PyTorch takes seconds to import, and the command line's help needs the options alone.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
