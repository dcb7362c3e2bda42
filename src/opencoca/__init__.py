"""OpenCoCa: one image-text model that embeds, classifies, retrieves and captions.

>>> import opencoca
>>> pipeline = opencoca.load()
>>> pipeline.caption("dog.jpg")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opencoca.inference.loading import load
    from opencoca.inference.pipeline import Pipeline
    from opencoca.model.coca import CoCa
    from opencoca.model.config import CoCaConfig
    from opencoca.tokenizer import Tokenizer

    __version__: str

__all__ = ["CoCa", "CoCaConfig", "Pipeline", "Tokenizer", "__version__", "load"]

_MODULES = {
    "CoCa": "opencoca.model.coca",
    "CoCaConfig": "opencoca.model.config",
    "Pipeline": "opencoca.inference.pipeline",
    "Tokenizer": "opencoca.tokenizer",
    "load": "opencoca.inference.loading",
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
