"""Captions whole folders and data sets, into files, with a journal that survives kills.

`open_inputs` opens the images, `caption_to_files` does a whole run, `caption_source` only yields captions.
"""

from opencoca.recaption.captioner import CaptionedImage, Captioner, caption_source
from opencoca.recaption.flags import FlagThresholds, caption_flags
from opencoca.recaption.inputs import open_inputs
from opencoca.recaption.journal import journal_threads
from opencoca.recaption.memory import choose_batch_size, parse_bytes
from opencoca.recaption.outputs import Destination
from opencoca.recaption.run import RunReport, caption_to_files

__all__ = [
    "CaptionedImage",
    "Captioner",
    "Destination",
    "FlagThresholds",
    "RunReport",
    "caption_flags",
    "caption_source",
    "caption_to_files",
    "choose_batch_size",
    "journal_threads",
    "open_inputs",
    "parse_bytes",
]
