"""The scores and tokens of pycocoevalcap 1.2, which need a Java runtime."""

import contextlib
import io
from collections.abc import Mapping, Sequence


def peer_tokens(captions: Sequence[str]) -> list[list[str]]:
    """Tokens of each caption; a mixed fraction keeps the no-break space inside its token."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The caption at the end of the file is cut differently where it ends in a contraction; a sentence shields it.
    by_number = {number: [{"caption": caption}] for number, caption in enumerate([*captions, "the end"])}
    tokenized = PTBTokenizer().tokenize(by_number)
    return [[token for token in tokenized[number][0].split(" ") if token] for number in range(len(captions))]


def peer_scores(candidates: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> dict:
    """The scores by the names of ``CaptionScores``."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    human = PTBTokenizer().tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
    generated = PTBTokenizer().tokenize({key: [{"caption": text}] for key, text in candidates.items()})
    with contextlib.redirect_stdout(io.StringIO()):
        bleu = Bleu(4).compute_score(human, generated)[0]
        rouge = Rouge().compute_score(human, generated)[0]
        cider, cider_of_image = Cider().compute_score(human, generated)
    names = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")
    scores = {name: float(score) for name, score in zip(names, (*bleu, rouge, cider), strict=True)}
    scores["cider_d_of_image"] = {key: float(score) for key, score in zip(human, cider_of_image, strict=True)}
    return scores
