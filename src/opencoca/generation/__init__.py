"""Writing captions: options, logit filters, search, and the loop that runs them."""

from opencoca.generation.loop import generate
from opencoca.generation.options import GeneratedCaption, GenerationOptions

__all__ = ["GeneratedCaption", "GenerationOptions", "generate"]
