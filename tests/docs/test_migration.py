"""Every snippet of docs/migration.md is run as it is printed.

Those of here run with small weights under the names that the page uses; with the marker peers, those of the other
projects run too, and what both sides compute is compared.
"""

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from opencoca.cli import main
from opencoca.model.coca import CoCa
from opencoca.store.interop import lucidrains, open_clip
from opencoca.store.interop.open_clip_options import CONFIGS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
OPEN_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 224,
        "layers": 2,
        "width": 64,
        "head_width": 32,
        "patch_size": 32,
        "attentional_pool": True,
        "attn_pooler_heads": 8,
        "output_tokens": True,
    },
    "text_cfg": {
        "context_length": 76,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {
        "context_length": 76,
        "vocab_size": 49408,
        "width": 64,
        "heads": 2,
        "layers": 2,
        "attn_pooler_heads": 8,
    },
    "custom_text": True,
}


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def snippets(title: str, theirs: bool) -> list[tuple[bool, str]]:
    """(whether it is of the other project, code) of a section's Python, in order."""
    blocks = re.findall(r"(<!-- theirs: \w+ -->\n)?```python\n(.*?)```", section(title), re.DOTALL)
    assert blocks
    return [(bool(marker), code) for marker, code in blocks if theirs or not marker]


def run_all(title: str, theirs: bool = False, change: Callable[[str], str] = str) -> dict[str, Any]:
    """Runs a section's snippets one after another; each side has its names, theirs under "theirs".

    change: makes the sizes in the code smaller.
    """
    here: dict[str, Any] = {}
    there: dict[str, Any] = {}
    for is_theirs, code in snippets(title, theirs):
        exec(compile(change(code), f"docs/migration.md: {title}", "exec"), there if is_theirs else here)
        shared = ("text", "texts", "images")
        if theirs and not is_theirs:
            # Where a side draws its own random input, the other is to have the same.
            there |= {name: here[name] for name in shared if name in here and name not in there}
    return here | {"theirs": there}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((300, 260), 60).convert("RGB").save("photo.jpg", quality=95)
    return tmp_path


def helper(name: str) -> ModuleType:
    """A test module that knows how others' weights are laid out."""
    file = ROOT / "tests" / "store" / "interop" / f"{name}.py"
    sys.path.insert(0, str(file.parent))
    try:
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(file.parent))


@pytest.fixture
def small_open_clip(monkeypatch) -> CoCa:
    """A small network under the name that the page uses, its weights in coca_b32.bin."""
    monkeypatch.setitem(CONFIGS, "coca_ViT-B-32", OPEN_CLIP)
    model = CoCa(open_clip.config_from_open_clip(OPEN_CLIP))
    torch.save(open_clip.export_open_clip(model).state_dict, "coca_b32.bin")
    return model


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return float((found - expected).detach().abs().max()) <= tolerance


def test_every_section_has_code():
    titles = re.findall(r"^## (.*)$", PAGE, re.MULTILINE)
    assert titles == ["From open_clip", "From CoCa-pytorch (lucidrains)", "From torchmultimodal"]
    assert PAGE.count("```python") == sum(len(snippets(title, theirs=True)) for title in titles)


def test_open_clip(small_open_clip):
    names = run_all("From open_clip")
    assert names["image_embeds"].shape == (1, 64)
    assert names["similarity"].shape == (1, 2)
    assert isinstance(names["caption"], str)
    assert names["loss"].isfinite()
    assert names["pipeline"].model.lm_head.weight.grad.abs().max() > 0


def test_open_clip_commands(small_open_clip, folder):
    commands = re.findall(r"```\n(opencoca.*?)```", section("From open_clip"), re.DOTALL)
    lines = [line for block in commands for line in block.splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert main(shlex.split(line)[1:]) == 0, line
    assert (folder / "coca-b32-open_clip" / "open_clip_config.json").is_file()


def run_lucidrains(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str] = str) -> dict[str, Any]:
    weights = helper("test_lucidrains")
    monkeypatch.setattr(weights, "PATCH", 32)
    sizes = weights.Sizes(dim=32, num_tokens=20_000, dim_latents=32, image_dim=64, vit_dim_head=64, simple=True)
    state_dict = {name: tensor.float() for name, tensor in weights.make_state_dict(sizes).items()}
    torch.save(state_dict, "coca_pytorch.pt")
    names = run_all("From CoCa-pytorch (lucidrains)", change=change)
    assert names["image_embeds"].shape == (4, 32)
    assert names["loss"].isfinite()
    # The network that is written out on the page is of the kind that weights convert to.
    converted = lucidrains.load_lucidrains(state_dict, image_size=256).config
    for part in ("image", "pooler", "text"):
        ours, theirs = (vars(getattr(c, part)) for c in (names["config"], converted))
        sizes_of_it = {"width", "depth", "unimodal_depth", "multimodal_depth", "num_heads", "head_dim", "mlp_width"}
        differing = {name for name in ours if ours[name] != theirs[name]}
        assert differing <= sizes_of_it | {"num_queries"}, part
    return names


def test_lucidrains_in_small(monkeypatch):
    def change(code: str) -> str:
        return code.replace("depth=6", "depth=1").replace("(4, 512)", "(4, 12)").replace("width=1024", "width=64")

    names = run_lucidrains(monkeypatch, change)
    assert names["logits"].shape == (4, 12, 20_000)


@pytest.mark.slow
def test_lucidrains_as_printed(monkeypatch):
    assert run_lucidrains(monkeypatch)["logits"].shape == (4, 512, 20_000)


def test_torchmultimodal():
    weights = helper("test_torchmultimodal")
    for name, value in {"WIDTH": 128, "IMAGE_WIDTH": 64, "VOCAB": 1000, "COLUMNS": 32, "PATCH": 32, "GRID": 7}.items():
        setattr(weights, name, value)
    state_dict = {name: tensor.float() for name, tensor in weights.make_state_dict().items()}
    torch.save(state_dict, "torchmultimodal.pt")
    names = run_all("From torchmultimodal")
    assert names["logits"].shape == (2, 32, 1000)
    assert names["loss"].isfinite()


# --- both sides ---


@pytest.mark.peers
def test_open_clip_gives_the_same(small_open_clip, folder):
    peer = importlib.import_module("open_clip")
    (folder / "configs").mkdir()
    (folder / "configs" / "coca_ViT-B-32.json").write_text(json.dumps(OPEN_CLIP))
    peer.add_model_config(folder / "configs")
    names = run_all("From open_clip", theirs=True)
    there = names["theirs"]
    assert close(names["image_embeds"], there["image_features"])
    assert close(names["text_embeds"], there["text_features"])
    assert close(names["similarity"], there["probabilities"])
    assert close(names["clip_loss"], there["clip_loss"])
    assert close(2 * names["caption_loss"], there["caption_loss"])


@pytest.mark.peers
@pytest.mark.slow
def test_lucidrains_gives_the_same():
    names = run_all("From CoCa-pytorch (lucidrains)", theirs=True)
    there = names["theirs"]
    coca = there["coca"].eval()
    text, images = names["text"], names["images"]
    with torch.no_grad():
        text_embeds, image_embeds = coca(text=text, images=images, return_embeddings=True)
        assert close(names["logits"], coca(text=text, images=images))
        assert close(names["text_embeds"], text_embeds)
        assert close(names["image_embeds"], image_embeds)
        assert close(names["loss"], coca(text=text, images=images, return_loss=True))
    # The network that is written out on the page is theirs.
    stored = lucidrains.load_lucidrains(coca.state_dict(), image_size=256).config
    assert stored.initial_temperature == pytest.approx(names["config"].initial_temperature)
    assert replace(stored, initial_temperature=names["config"].initial_temperature) == names["config"]


@pytest.mark.peers
def test_torchmultimodal_gives_the_same():
    names = run_all("From torchmultimodal", theirs=True)
    coca = names["theirs"]["coca"]
    texts, images = names["texts"], names["images"]
    with torch.no_grad():
        outputs = coca.model(images, texts)
        assert close(names["image"].embed, outputs.image_pooled_output)
        assert close(names["text"].embed, outputs.text_pooled_output)
        assert close(names["logits"], outputs.multimodal_embeddings, 1e-3)
        assert close(names["loss"], sum(coca(images, texts).values()), 1e-3)
