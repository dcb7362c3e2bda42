"""OpenCoCa: one image-text model that embeds, classifies, retrieves and captions.

>>> import opencoca
>>> pipeline = opencoca.load()
>>> pipeline.caption("dog.jpg", num_beams=4)

`opencoca.load` gives a `Pipeline`; `GenerationOptions` are what its captions may be asked for. `CoCa` is the network
as a plain module, made from a `CoCaConfig`; `Tokenizer` turns text into token ids. `load_recipe` reads a `Recipe`, and
`opencoca.train.train` runs it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opencoca.generation.options import GenerationOptions
    from opencoca.inference.loading import load
    from opencoca.inference.pipeline import Pipeline
    from opencoca.model.coca import CoCa
    from opencoca.model.config import CoCaConfig
    from opencoca.tokenizer import Tokenizer
    from opencoca.train.recipe.load import load_recipe
    from opencoca.train.recipe.recipe import Recipe

    __version__: str

__all__ = [
    "CoCa",
    "CoCaConfig",
    "GenerationOptions",
    "Pipeline",
    "Recipe",
    "Tokenizer",
    "__version__",
    "load",
    "load_recipe",
]

_MODULES = {
    "CoCa": "opencoca.model.coca",
    "CoCaConfig": "opencoca.model.config",
    "GenerationOptions": "opencoca.generation.options",
    "Pipeline": "opencoca.inference.pipeline",
    "Recipe": "opencoca.train.recipe.recipe",
    "Tokenizer": "opencoca.tokenizer",
    "load": "opencoca.inference.loading",
    "load_recipe": "opencoca.train.recipe.load",
}


def __getattr__(name: str) -> Any:
    # On first use: PyTorch takes seconds to import, and `opencoca --help` does not need it.
    if name == "__version__":
        value = _read_version()
    elif name in _MODULES:
        from importlib import import_module

        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _read_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("opencoca")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"
