"""What one asks of caption generation and what one gets: frozen options in, frozen captions out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationOptions:
    """How captions are generated.

    max_new_tokens: the most tokens a caption has after the prefix, its end token included.
    min_new_tokens: how many tokens come at least before the end token.
    prefix: text that every caption begins with ("a photo of"); spaces at its end are dropped.

    Raises ValueError for counts that no caption can have.
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 0
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; a caption needs at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}; choose 0 to max_new_tokens, which is {self.max_new_tokens}"
            )


@dataclass(frozen=True)
class GeneratedCaption:
    """One caption.

    text: the caption, prefix included.
    token_ids: all of it: start token, prefix, generated tokens, and the end token unless the caption was cut.
    log_probability: natural logarithm of the probability that the model gives to the generated tokens after image
        and prefix; nothing that was forbidden meanwhile is left out of it.
    length: number of generated tokens, the end token included; log_probability / length is their mean.
    """

    text: str
    token_ids: tuple[int, ...]
    log_probability: float
    length: int
