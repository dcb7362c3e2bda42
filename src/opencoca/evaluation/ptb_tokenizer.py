"""Caption tokenization for the scores: Penn Treebank tokens, lower case, without punctuation.

BLEU, ROUGE and CIDEr figures are comparable between papers because all of them cut captions with Stanford's
``PTBTokenizer`` (options ``-lowerCase -preserveLines``) and drop the same list of punctuation tokens, as pycocoevalcap
does. This module gives the same tokens without Java. It was written from observing the original's output; the tests
keep a table of such observations.

How it works: at each position every rule is tried and the longest match wins (the earlier rule on a tie), the
principle of the generated scanner that it stands in for. Characters that no rule accepts (emoji, for example) are
dropped and separate words, as there.
"""

import re
from functools import lru_cache

PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";")
)
"""Tokens that never count. The bracket names are upper case while tokens are lower case, so ``-lrb-`` does count: a
quirk that every published figure contains."""

# Abbreviations that keep their full stop wherever they stand; the second set only when capitalised, the third only
# before a number ("no. 5").
_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty aug ave bhd bldg blvd brig bros calif capt cf cie cmdr co col
    colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri ft ga gen gov govs hon
    inc ind insp intl invt jan jos jr jul jun kan kans ky lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr
    mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pres prof profs pte ptes pty ptys pvt rd rep
    reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel tenn thu thurs treas tue tues univ va vs vt
    wed wis wisc wm wyo"""
_CAPITALISED_ABBREVIATIONS = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
_ABBREVIATIONS_BEFORE_NUMBERS = "art ca fig figs no nos op pp prop"


def _any_of(words: str) -> str:
    """An alternation with longer words first, because Python takes the first that matches."""
    return "(?:" + "|".join(sorted(words.split(), key=len, reverse=True)) + ")"


_MARK = "\u0300-\u036f"  # accents of decomposed letters
_L = rf"(?:[^\W\d_]|[{_MARK}])"  # a letter
_A = rf"(?:[^\W_¼½¾²³¹]|[{_MARK}])"  # a letter or digit
_HYPHEN = "[-_‐‑]"
_Q = "['’]"  # the apostrophe of a contraction
_CLITIC = rf"{_Q}(?:[smd]|ll|re|ve)(?!{_L})"
_O_NAME = rf"[dlno]{_Q}{_L}{{2,}}"  # o'clock, d'angelo
_ELISION = rf"{_L}+[aeiouy]['’`][aeiou]{_L}*"  # ma'am, ne'er
_LISTED = rf"on't|o'o|e'er|ev'ry|li'l|nat'l|c'est|c'mon|cap{_Q}n|r'us|dunkin'|ol{_Q}|[dlj]'|qu'(?={_L})|y{_Q}(?={_L})"
_ACRONYM = r"(?:[a-z]\.)+"
_JOINED = rf"(?:{_L}{_A}*(?:[.!?]{_L}{_A}*)+)"  # u.s, and sentences without a space: "dog.the"
_HYPHENATED = rf"(?:{_O_NAME}|{_A}+)(?:{_HYPHEN}(?:{_O_NAME}|{_A}+))+"
_HYPHENATED_AFTER_STOP = rf"{_A}+(?:[.,]{_A}*)+(?:-(?:(?:[a-z]\.){{2,}}|{_O_NAME}|{_A}+))+"  # u.s.-based, 5.5-foot
_SLASHED = r"PART(?:/PART){1,2}".replace("PART", "[a-z0-9]+(?:-[a-z]+)*")
_NUMBER = r"[-+]?(?:\d*(?:[.,:]\d+)+|\d+)"
_EMOTICON = rf"[:;=]['o-]?(?:[)(\[\]{{|\\@]|[dp0]|(?-i:O))(?!{_A})|>:\(|\^_\^|>_<|-_-"
_URL = r"""https?://[^\s<>"|().]+(?:\.[^\s<>"|()]+)*\.[^\s<>"|()]*[^\s<>"|().,?!;:'-]"""
_TAG = r"""</?[a-z][\w.:-]*(?:\s+[\w-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'))*\s*/?>|<!--.*?-->|<!doctype[^<>]*>"""

# Alternatives inside one pattern start differently, so that the first that matches is the longest. A rule is
# (pattern, replacement); a replacement of None keeps what matched, "" drops it. A group inside a lookahead is text that
# must follow: it counts for the length of the match without being consumed.
_RULE_TABLE: tuple[tuple[str, str | None], ...] = (
    # Words and contractions.
    (rf"can(?=(not)(?!{_A}))|(?:gon|wan)(?=(na)(?!{_A}))|got(?=(ta)(?!{_A}))|(?:lem|gim)(?=(me)(?!{_A}))", None),
    (rf"{_A}+(?=({_CLITIC}))", None),
    (rf"{_A}+", None),
    (rf"{_L}+(?<!n)(?=(n{_Q}t))", None),
    (rf"n{_Q}t|{_CLITIC}", None),
    (r"'t(?=(is|was))", None),
    (rf"{_Q}(?:em|till?|cause|n{_Q}|n(?!{_L}))", None),
    (_O_NAME, None),
    (_ELISION, None),
    (_LISTED, None),
    (_HYPHENATED, None),
    (_HYPHENATED_AFTER_STOP, None),
    (_SLASHED, None),
    # Full stops that belong to their word.
    (_JOINED, None),
    (_ACRONYM, None),
    (rf"(?:ph\.d|ed\.d|{_any_of(_ABBREVIATIONS)})\.", None),
    (rf"(?-i:{_any_of(_CAPITALISED_ABBREVIATIONS)}|{_any_of(_CAPITALISED_ABBREVIATIONS.upper())})\.", None),
    (rf"{_any_of(_ABBREVIATIONS_BEFORE_NUMBERS)}\.(?=(\s?\d))", None),
    (rf"(?:{_A}+(?:-{_A}+)*|{_JOINED})\.(?=([,:;]))", None),
    # Numbers, dates, decades, money.
    (_NUMBER, None),
    (r"\d{1,2}[/-]\d{1,2}[/-]\d{2,4}|\d+[- \xa0]\d+/\d+", None),
    (rf"{_Q}(?:[1-9]0s|\d\d(?![\w./'’\"-]))", None),
    (r"(?-i:[A-Z]+\$|[A-Z]+(?:&[A-Z]+)+)", None),
    (r"£", "#"),
    (r"[€¤]", "$"),
    (r"¢", "cents"),
    (r"¼", "1/4"),
    (r"½", "1/2"),
    (r"¾", "3/4"),
    # What people write on the web.
    (rf"#{_L}+|@[a-z_]\w*|c\+\+|[cf]#", None),
    (r'[a-z0-9][^\s"<>|(){}]*@(?:[^\s"<>|(){}.]+\.)*[^\s"<>|(){}.]+', None),
    (_EMOTICON, None),
    (_URL, None),
    (_TAG, None),
    (r"&amp;", "&"),
    (r"&lt;", "<"),
    (r"&gt;", ">"),
    (r"&(?:quot|apos|nbsp|[mn]dash);", ""),
    (r"&#\d+;", None),
    # Punctuation and symbols: quotes, single dashes, commas and the like match nothing and so are dropped.
    (r"''|``|\.{3,5}|-{2,4}", ""),
    (r"-{5,}|_+|\*+|#+|[!?]+|<<|>>|@@+|\\\*", None),
    (r"\(", "-lrb-"),
    (r"\)", "-rrb-"),
    (r"\[", "-lsb-"),
    (r"\]", "-rsb-"),
    (r"\{", "-lcb-"),
    (r"\}", "-rcb-"),
    (r"-[lr][rsc]b-", None),
    (r"[$%&+=<>~|\\^/@¡¥¦§¨©¬®¯°±²³´¶·¸¹¿×÷‖‗‚„†‡•‣₤₦′″™−]", None),
)
_RULES = tuple((re.compile(pattern, re.IGNORECASE), replacement) for pattern, replacement in _RULE_TABLE)

# Most of a caption are plain words before a space: no rule but "cannot" and its like can take more or less of those.
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?=\s|$)")
_TWO_TOKENS = frozenset(("cannot", "gonna", "gotta", "wanna", "lemme", "gimme"))


def _longest_match(caption: str, start: int) -> tuple[int, str]:
    """The end of the next token at ``start`` and its text, empty where nothing is to be kept."""
    reach, end, text = start, start + 1, ""
    for pattern, replacement in _RULES:
        match = pattern.match(caption, start)
        if match is None:
            continue
        candidate = match.end(match.lastindex) if match.lastindex else match.end()
        if candidate > reach:
            reach, end, text = candidate, match.end(), match.group() if replacement is None else replacement
    return end, text


def _normalised(token: str) -> str:
    token = token.lower().replace(" ", "\xa0")
    if re.fullmatch(rf"{_CLITIC}|n{_Q}t", token):
        return token.replace("’", "'")
    if token[0] in ":;=>":  # an emoticon
        return token.replace("(", "-lrb-").replace(")", "-rrb-")
    return token


@lru_cache(maxsize=1 << 16)  # the references of a set are tokenized at every evaluation during a run
def _tokens(caption: str) -> tuple[str, ...]:
    position, tokens = 0, []
    while position < len(caption):
        plain = _PLAIN_WORD.match(caption, position)
        if plain and plain.group().lower() not in _TWO_TOKENS:
            position = plain.end()
            tokens.append(plain.group().lower())
        elif caption[position].isspace():
            position += 1
        else:
            position, text = _longest_match(caption, position)
            if text:
                tokens.append(_normalised(text))
    return tuple(token for token in tokens if token not in PUNCTUATION)


def ptb_tokenize(caption: str) -> list[str]:
    """The tokens of one caption that count for BLEU, ROUGE-L and CIDEr-D: lower case, without punctuation.

    ``"A man's dog can't jump."`` gives ``["a", "man", "'s", "dog", "ca", "n't", "jump"]``. A line break is a space. A
    mixed fraction ("1 1/2") is one token with a no-break space (U+00A0) inside, as in the original.

    Equal to the Java tokenizer for text as people write captions. Known differences are rarities: telephone numbers in
    brackets or with spaces, web addresses without ``http``, markup, scripts whose vowels are
    combining marks (Hindi), and characters above U+2000 that the Java version maps by accident of its tables.
    """
    return list(_tokens(caption))
