"""The tokenizers: CLIP's ids, lossless decoding, special ids that no text can forge, files that round-trip."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import opencoca.tokenizer
from opencoca.tokenizer import Tokenizer, train_tokenizer

CAPTIONS = [
    "A black dog is running after a white dog in the snow .",
    "Black dog chasing brown dog through snow",
    "Two girls play on a skateboard in a courtyard.",
    "The boy's ball, a red one, isn't here!",
    "Two dogs play in the snow .",
    "Eine Straße mit Bäumen <end>",
    "<start> a <pad> sign <end> says <end>",
] * 3

# Ids that CLIP's own tokenizer gives (facts of the published vocabulary).
CLIP_IDS = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "Two dogs, running!! It's the boy's ball; they're 25 m away.": [
        *(1237, 3255, 267, 2761, 748, 585, 568, 518, 1876, 568, 1069, 282, 889, 982, 273, 276, 332, 1520, 269)
    ],
    "caf\u00e9 cafe\u0301 \u72ac na\u00efve": [15304, 15304, 163, 232, 361, 1097, 35689, 563],
    "the boy\u2019s \u201cred\u201d shirt": [518, 1876, 568, 257, 736, 257, 2523],
    "fish &amp; chips &amp;amp; &#39;n&#39; &lt;b&gt;": [2759, 261, 8855, 261, 262, 333, 262, 283, 321, 285],
    " a\tb\n c   d\u00a0e ": [320, 321, 322, 323, 324],
    "\U0001f600 ?!? !?! \u2014 ...": [7334, 11395, 29767, 2005, 678],
    "ALL CAPS \u00c9T\u00c9 \u0130stanbul": [615, 23185, 3459, 39694, 328, 16384, 11231],
    "x\x00\x07y\ufeffz 12345 don't I'LL we'd": [20023, 345, 272, 273, 274, 275, 276, 847, 713, 328, 1342, 649, 1896],
    "": [],
}
# SHA-256 of CLIP's 49,408 tokens in the order of their ids, joined by line feeds.
CLIP_VOCABULARY_SHA256 = "2e6dac1ffa773a206f069084495615909303f921e22845ed422125216976babc"

any_text = st.text(st.characters(), max_size=60)  # surrogates included
word_text = st.text(st.sampled_from("aAbdgo .'!?,<>/1\n\u00a0\u00e9e\u0301\u72ac\U0001f600"), max_size=40)


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer.clip()


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 400)


@pytest.fixture(scope="module")
def verbatim() -> Tokenizer:
    return train_tokenizer(CAPTIONS, 400, lowercase=False, strip_final_period=False)


@pytest.fixture(scope="module", params=["clip", "trained", "verbatim"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


def specials(tokenizer: Tokenizer) -> tuple[int, int, int]:
    return tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id


# The CLIP vocabulary


def test_clip_vocabulary_is_the_published_one(clip: Tokenizer):
    assert (clip.vocab_size, *specials(clip)) == (49_408, 0, 49_406, 49_407)
    vocab = json.loads(clip.to_json())["model"]["vocab"]
    in_order = sorted(vocab, key=vocab.__getitem__)
    assert hashlib.sha256("\n".join(in_order).encode()).hexdigest() == CLIP_VOCABULARY_SHA256


@pytest.mark.parametrize("text", CLIP_IDS)
def test_clip_ids_are_the_published_ones(clip: Tokenizer, text: str):
    assert clip.encode(text) == [49_406, *CLIP_IDS[text], 49_407]


@given(word_text)
@example("!?\u00e9!")  # "!" inside of punctuation is id 0, which is also padding
def test_clip_decoding_keeps_the_words(clip: Tokenizer, text: str):
    decoded = clip.decode(clip.encode(text))
    assert clip.encode(decoded) == clip.encode(text)
    assert decoded.replace(" ", "") == clip.normalize(text).replace(" ", "")


def test_clip_keeps_the_id_that_words_and_padding_share(clip: Tokenizer):
    ids = clip.encode("!?\u2014 a")
    assert clip.pad_id in ids
    assert clip.decode(clip("!?\u2014 a", 77).token_ids[0]) == clip.decode(ids) == "!?\u2014 a"
    assert clip.decode([*ids[:-1], 0, 0, 0]) == "!?\u2014 a"  # cut before eos, then padded
    assert clip(["!?\u2014 a", "a dog in the snow on a hill"], 77).token_mask[0].sum() == len(ids)


@pytest.mark.peers
def test_clip_ids_equal_open_clip(clip: Tokenizer):
    peer = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer()
    for text in [*CAPTIONS, *CLIP_IDS, "नमस्ते दुनिया", "кошка сидит", "@user #tag http://x.y/z_1 </w>"]:
        assert clip.encode(text) == [peer.sot_token_id, *peer.encode(text), peer.eot_token_id]


# Special ids


def test_special_ids_are_three_ids_of_the_vocabulary(tokenizer: Tokenizer):
    assert len(set(specials(tokenizer))) == 3
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in specials(tokenizer))
    assert tokenizer.encode("") == [tokenizer.bos_id, tokenizer.eos_id]


def test_trained_special_ids_come_first(trained: Tokenizer):
    assert specials(trained) == (0, 1, 2)


FORGERIES = ["<pad>", "<start>", "<end>", "<start_of_text>", "<end_of_text>", "<|endoftext|>", "<|startoftext|>"]


@pytest.mark.parametrize("forgery", [*FORGERIES, "&lt;end_of_text&gt;", "<end_of_text></w>", "<END>"])
@pytest.mark.parametrize("frame", ["{}", "a {} dog", "a{}dog", " {} ."])
def test_no_text_forges_a_special_id(tokenizer: Tokenizer, forgery: str, frame: str):
    text = frame.format(forgery)
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id
    assert ids[-1] == tokenizer.eos_id
    assert not set(ids[1:-1]) & set(specials(tokenizer))
    assert tokenizer.decode(ids).replace(" ", "") == tokenizer.normalize(text).replace(" ", "")


@given(any_text)
def test_text_never_holds_a_frame_id(tokenizer: Tokenizer, text: str):
    assert not set(tokenizer.encode(text)[1:-1]) & {tokenizer.bos_id, tokenizer.eos_id}


@given(any_text)
def test_trained_text_never_holds_padding(verbatim: Tokenizer, text: str):
    assert verbatim.pad_id not in verbatim.encode(text)


def test_special_tokens_are_spelled_out_in_one_package_only():
    package = Path(opencoca.__file__).parent
    spelled = re.compile(r"49_?40[67]|[\"']<(?:pad|start|end|start_of_text|end_of_text)>[\"']")
    owners = {file.parent for file in package.rglob("*.py") if spelled.search(file.read_text(encoding="utf-8"))}
    assert owners == {package / "tokenizer"}


# Lossless decoding and normalisation


@given(any_text)
@example("  two  spaces ")
@example(" ")
@example("\ud83d lone surrogate, and a pair \ud83d\ude00")
@example("e\u0301 \u2126 \x00 \ufeff <end>")
def test_decoding_is_lossless(verbatim: Tokenizer, text: str):
    assert verbatim.decode(verbatim.encode(text)) == verbatim.normalize(text)


@given(st.text(max_size=60))
def test_without_options_normalising_is_nfc(verbatim: Tokenizer, text: str):
    # NFC of text in NFC changes nothing, whatever the Unicode version of either side.
    text = unicodedata.normalize("NFC", text)
    assert verbatim.normalize(text) == verbatim.normalize(verbatim.normalize(text))
    assert unicodedata.normalize("NFC", verbatim.normalize(text)) == text


@given(st.one_of(any_text, word_text, st.text(st.sampled_from("a .\n\u0085\u2003\x1c"), max_size=12)))
@example("a . . .")
@example(" . ")
@example("a .\u0085 .")
@example("J\u030c")  # composes in lower case alone
def test_trained_decoding_gives_the_normalised_text(trained: Tokenizer, text: str):
    normalized = trained.normalize(text)
    assert trained.decode(trained.encode(text)) == normalized
    assert trained.normalize(normalized) == normalized
    assert trained.encode(normalized) == trained.encode(text)
    assert not normalized.endswith((".", " ", "\n", "\u0085", "\u2003"))
    assert not normalized.startswith((" ", "\n", "\u0085", "\u2003"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog .", "a dog"),
        ("  A dog.\n", "a dog"),
        ("a dog", "a dog"),
        ("Wait ...", "wait"),
        ("No . 5 is mine .", "no . 5 is mine"),
        ("Is it 1.5?", "is it 1.5?"),
        ("line\n. line", "line\n. line"),
        (".", ""),
        ("", ""),
    ],
)
def test_caption_normalisation(trained: Tokenizer, text: str, expected: str):
    assert trained.normalize(text) == expected
    assert trained.encode(text) == trained.encode(expected)


def test_each_option_does_its_part_alone():
    lower = train_tokenizer(CAPTIONS, 300, strip_final_period=False)
    assert lower.normalize(" A Dog . ") == " a dog . "
    strip = train_tokenizer(CAPTIONS, 300, lowercase=False)
    assert strip.normalize(" A Dog . ") == "A Dog"


def test_the_first_word_is_the_same_token_as_inside(trained: Tokenizer):
    assert trained.encode("dog") == [1, trained.encode("a dog")[-2], 2]


@given(st.lists(st.integers(min_value=0, max_value=299), max_size=20))
def test_any_ids_decode(trained: Tokenizer, ids: list[int]):
    text = trained.decode(ids)
    words = ids[: ids.index(trained.eos_id)] if trained.eos_id in ids else ids
    assert text == trained.decode([token_id for token_id in words if token_id not in specials(trained)])
    assert text == trained.decode(torch.tensor(ids, dtype=torch.int64))


def test_decoding_stops_at_the_first_eos(tokenizer: Tokenizer):
    ids = tokenizer.encode("a dog")
    assert tokenizer.decode([*ids, *ids, tokenizer.pad_id]) == "a dog"
    assert tokenizer.decode(ids[1:-1]) == "a dog"
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.eos_id]) == ""


def test_decode_batch_is_decode_of_each(tokenizer: Tokenizer):
    batch = tokenizer(["a dog", "two white dogs in the snow", ""], 16)
    expected = ["a dog", "two white dogs in the snow", ""]
    assert tokenizer.decode_batch(batch.token_ids) == expected
    assert tokenizer.decode_batch([tokenizer.encode(text) for text in expected]) == expected
    assert [tokenizer.decode(row) for row in batch.token_ids] == expected


@pytest.mark.parametrize("bad_id", [-1, -100, 60_000])
def test_ids_outside_of_the_vocabulary_are_refused(tokenizer: Tokenizer, bad_id: int):
    with pytest.raises(ValueError, match=str(bad_id)):
        tokenizer.decode([bad_id])


# Batches


@given(st.lists(any_text, min_size=1, max_size=5), st.integers(min_value=2, max_value=30))
def test_batch_holds_the_texts_padded_and_cut(tokenizer: Tokenizer, texts: list[str], context_length: int):
    batch = tokenizer(texts, context_length)
    full = [tokenizer.encode(text) for text in texts]
    assert batch.token_ids.dtype == torch.int64
    assert batch.token_mask.dtype == torch.bool
    assert batch.token_ids.shape == batch.token_mask.shape
    assert batch.token_ids.shape == (len(texts), min(context_length, max(map(len, full))))
    for ids, mask, whole in zip(batch.token_ids, batch.token_mask, full, strict=True):
        kept = ids[mask].tolist()
        assert len(kept) == min(len(whole), context_length)
        assert kept[:-1] == whole[: len(kept) - 1]
        assert kept[-1] == tokenizer.eos_id
        assert mask[: len(kept)].all()
        assert (ids[~mask] == tokenizer.pad_id).all()
    assert [row[mask].tolist() for row, mask in zip(*batch, strict=True)] == tokenizer.encode_batch(
        texts, context_length
    )


def test_one_text_is_a_batch_of_one(tokenizer: Tokenizer):
    assert torch.equal(tokenizer("a dog", 8).token_ids, tokenizer(["a dog"], 8).token_ids)
    assert tokenizer([], 8).token_ids.shape == (0, 0)


def test_texts_are_cut_at_the_tokenizers_own_length_if_it_has_one(tokenizer: Tokenizer):
    text = "a dog runs " * 50
    assert tokenizer.context_length is None
    assert tokenizer(text).token_ids[0].tolist() == tokenizer.encode(text)
    short = tokenizer.with_context_length(6)
    assert torch.equal(short(text).token_ids, tokenizer(text, 6).token_ids)
    assert torch.equal(short(text, 9).token_ids, tokenizer(text, 9).token_ids)
    assert tokenizer.context_length is None
    assert short.to_json() == tokenizer.to_json()


def test_wrong_texts_and_lengths_are_refused(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match=r"text number 1 is None"):
        tokenizer(["a dog", None], 8)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="nan"):
        tokenizer.encode(float("nan"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="put it in a list"):
        tokenizer.encode_batch("a dog", 8)
    with pytest.raises(ValueError, match="context_length is 1"):
        tokenizer("a dog", 1)


# Training


def test_vocabulary_size_is_as_asked_while_pairs_last():
    assert train_tokenizer(CAPTIONS, 259).vocab_size == 259
    assert train_tokenizer(CAPTIONS, 300).vocab_size == 300
    assert 300 < train_tokenizer(CAPTIONS, 65_536).vocab_size < 1000
    assert train_tokenizer(CAPTIONS, 65_536, min_frequency=1000).vocab_size == 259


def test_training_reaches_65536_ids():
    characters = [chr(code) for code in range(0x4E00, 0x4E00 + 18_000)]
    words = [characters[i] + characters[i - step] for i in range(18_000) for step in (1, 7, 29)]
    assert train_tokenizer(words, 65_536, min_frequency=1).vocab_size == 65_536


def test_same_captions_give_the_same_file(tmp_path: Path):
    script = (
        "import json, sys; from opencoca.tokenizer import train_tokenizer;"
        "train_tokenizer((c for c in json.load(sys.stdin)), 400).save(sys.argv[1])"
    )
    for seed in "12":
        path = str(Path(opencoca.__file__).parents[1])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path}
        command = [sys.executable, "-c", script, tmp_path / f"{seed}.json"]
        subprocess.run(command, env=environment, input=json.dumps(CAPTIONS), text=True, check=True)
    files = [(tmp_path / f"{seed}.json").read_bytes() for seed in "12"]
    assert files[0] == files[1] == train_tokenizer(CAPTIONS, 400).to_json().encode()


def test_wrong_training_arguments_are_refused():
    for size in (0, 258, 65_537):
        with pytest.raises(ValueError, match=f"vocab_size is {size}"):
            train_tokenizer(CAPTIONS, size)
    with pytest.raises(ValueError, match="min_frequency"):
        train_tokenizer(CAPTIONS, 300, min_frequency=0)
    with pytest.raises(ValueError, match="no caption"):
        train_tokenizer(iter([]), 300)
    with pytest.raises(ValueError, match="text number 1 is None"):
        train_tokenizer(["a", None], 300)  # type: ignore[list-item]


# Files


def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path):
    text = "&lt;end> It's \u201cA Dog\u201d !?\u2014 \u72ac ."
    in_folder = tokenizer.save(tmp_path / "new" / "model")
    as_file = tokenizer.save(tmp_path / "other.json")
    assert (in_folder, as_file) == (tmp_path / "new" / "model" / "tokenizer.json", tmp_path / "other.json")
    pickled = pickle.loads(pickle.dumps(tokenizer))
    for other in (Tokenizer.load(in_folder), Tokenizer.load(in_folder.parent), Tokenizer.load(as_file), pickled):
        assert other.to_json() == tokenizer.to_json()
        assert (other.vocab_size, *specials(other)) == (tokenizer.vocab_size, *specials(tokenizer))
        assert other.encode(text) == tokenizer.encode(text)
        assert other.decode(other.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_the_file_alone_gives_the_same_ids(tokenizer: Tokenizer, tmp_path: Path):
    plain = tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path)))
    texts = ["A Dog .", " two  dogs, in snow. "]
    batch = tokenizer(texts, 77)
    encodings = plain.encode_batch(texts)
    assert [encoding.ids for encoding in encodings] == batch.token_ids.tolist()
    assert [encoding.attention_mask for encoding in encodings] == batch.token_mask.int().tolist()


def test_a_failed_save_leaves_the_old_file(trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "tokenizer.json"
    file.write_text("old")

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        trained.save(tmp_path)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def damaged_files() -> dict[str, bytes]:
    whole = train_tokenizer(CAPTIONS, 300).to_json()
    parts = json.loads(whole)

    def edited(**changes: object) -> bytes:
        return json.dumps({**parts, **changes}).encode()

    special = {"id": 300, "content": "x", "single_word": False, "lstrip": False, "rstrip": False}
    truncation = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    holes = {**parts["model"], "vocab": {**parts["model"]["vocab"], "extra": 999}}
    return {
        "empty": b"",
        "truncated": whole.encode()[: len(whole) // 2],
        "not text": b"\xff\xfe\x00\x01" * 10,
        "other json": b'{"model_type": "coca"}',
        "a list": b"[1, 2]",
        "no model": json.dumps({key: part for key, part in parts.items() if key != "model"}).encode(),
        "no padding": edited(padding=None),
        "no frame": edited(post_processor=None),
        "no normalizer": edited(normalizer=None),
        "pad outside": edited(padding={**parts["padding"], "pad_id": 5000}),
        "pad is eos": edited(padding={**parts["padding"], "pad_id": 2}),
        "added tokens": edited(added_tokens=[{**special, "normalized": False, "special": True}]),
        "truncation": edited(truncation=truncation),
        "holes": edited(model=holes),
    }


@pytest.mark.parametrize("damage", damaged_files())
def test_a_damaged_file_is_named(tmp_path: Path, damage: str):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(damaged_files()[damage])
    with pytest.raises(ValueError, match=re.escape(str(file))):
        Tokenizer.load(file)


def test_a_missing_file_is_named(tmp_path: Path):
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / "tokenizer.json"))):
            Tokenizer.load(path)
