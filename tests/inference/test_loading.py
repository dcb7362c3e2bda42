"""Names into models: published ones, repositories of the hub, open_clip's architectures with a checkpoint."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import opencoca
from cli_helpers import save_tiny_model
from hub_fixtures import hub, switch_off  # noqa: F401
from hub_server import COMMIT, Hub
from opencoca.data.transforms import PreprocessConfig
from opencoca.inference import loading
from opencoca.inference.loading import load, load_model
from opencoca.model.coca import CoCa
from opencoca.store import published_models
from opencoca.store.hub import HubError
from opencoca.store.interop.open_clip import config_from_open_clip, export_open_clip
from opencoca.store.model_card import write_repository
from opencoca.store.model_folder import load_model_folder, save_model_folder
from opencoca.store.published_models import PUBLISHED_MODELS, PublishedModel, find_published, published_in

REPO = "someone/coca"
TEXTS = ["a red picture", "everything here is blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def converted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Conversions are recorded, and give the tiny model; the conversion itself is tested in tests/store/interop."""
    calls: list[tuple[str, Path]] = []

    def convert(architecture: str, checkpoint: Path, dtype: torch.dtype | None) -> tuple:
        calls.append((architecture, checkpoint))
        loaded = load_model_folder(folder, dtype=dtype)
        return loaded.model, loaded.tokenizer, loaded.preprocess

    monkeypatch.setattr(loading, "load_open_clip", convert)
    return calls


def embeds(pipeline: opencoca.Pipeline) -> torch.Tensor:
    return pipeline.embed_texts(TEXTS)


def assert_same(first: opencoca.Pipeline, second: opencoca.Pipeline) -> None:
    """The same weights, bit for bit. What they compute may differ by a rounding: weights lie in their files, and how a
    product is summed depends on where its operands begin."""
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert embeds(first).sub(embeds(second)).abs().max() < 1e-6


# Published models


def test_the_table_is_complete_and_its_tags_are_open_clips() -> None:
    assert {(model.name, model.weights) for model in PUBLISHED_MODELS} == {
        (name, weights)
        for name in ("coca_ViT-B-32", "coca_ViT-L-14")
        for weights in ("laion2b_s13b_b90k", "mscoco_finetuned_laion2b_s13b_b90k")
    }
    for model in PUBLISHED_MODELS:
        assert find_published(model.name, model.weights) is published_in(model.repo_id) is model
        assert model.repo_id.startswith("laion/")
        assert model.revision == "main" or len(model.revision) == 40
        assert model.sha256 is None or len(model.sha256) == 64
        assert model.scores
        assert all(0 <= score <= 150 for score in model.scores.values())


@pytest.mark.peers
def test_the_table_is_that_of_open_clip() -> None:
    pretrained = importlib.import_module("open_clip.pretrained")
    for model in PUBLISHED_MODELS:
        assert pretrained._PRETRAINED[model.name][model.weights]["hf_hub"].strip("/") == model.repo_id


@pytest.fixture
def published(hub: Hub, converted: list, monkeypatch: pytest.MonkeyPatch) -> PublishedModel:  # noqa: F811
    """The first of the table, as a file of a few bytes on the hub here."""
    content = b"weights"
    model = replace(PUBLISHED_MODELS[2], size_bytes=len(content), revision=COMMIT, sha256=None)
    hub.add(model.repo_id, **{model.file_name: content})
    monkeypatch.setattr(published_models, "PUBLISHED_MODELS", (model, PUBLISHED_MODELS[3]))
    return model


def test_a_published_model_is_downloaded_once(published: PublishedModel, converted: list, hub: Hub) -> None:  # noqa: F811
    pipeline = load(published.name, weights=published.weights)
    again = load(published.full_name)
    assert_same(pipeline, again)
    assert len([request for request in hub.requests if request.startswith("GET /content")]) == 1
    (architecture, file), _ = converted
    assert architecture == "coca_ViT-L-14"
    assert file.read_bytes() == b"weights"
    assert pipeline.info["source"]["repository"] == published.repo_id
    assert pipeline.info["source"]["revision"] == COMMIT
    assert pipeline.info["source"]["licence"] == "MIT"


def test_a_published_file_with_another_checksum_is_not_loaded(
    published: PublishedModel, converted: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = replace(published, sha256="1" * 64)
    monkeypatch.setattr(published_models, "PUBLISHED_MODELS", (pinned,))
    with pytest.raises(HubError, match=r"instead of 111111111111"):
        load(published.full_name)
    assert not converted


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "coca_ViT-B-32",
            {},
            r"several weights; choose with weights= or .*@WEIGHTS among laion2b_s13b_b90k, ",
        ),
        ("coca_ViT-B-32", {"weights": "openai"}, r"no weights 'openai'; choose with"),
        ("coca_ViT-B-32@openai", {}, r"no weights 'openai'; choose with"),
        ("coca_ViT-B-32@a", {"weights": "b"}, "the name asks for the weights 'a', weights= for 'b'"),
        ("coca_base", {"weights": "b"}, r"goes with the name of a published model \(coca_ViT-B-32, coca_ViT-L-14\)"),
        ("coca_base", {"checkpoint": "x.pt"}, "checkpoint= goes with a name such as 'open_clip:"),
        ("open_clip:coca_base", {}, "needs the file with its weights: give checkpoint=PATH"),
        ("open_clip:coca_base", {"checkpoint": "x.pt", "weights": "y"}, "needs the file with its weights"),
        ("hf-hub:someone/coca", {"weights": "y"}, "weights= goes with the name of a published model"),
    ],
)
def test_what_does_not_fit_together_is_named(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, **options)


# Repositories of the hub


@pytest.mark.parametrize("name", [f"hf-hub:{REPO}", f"hf-hub:{REPO}@main", f"hf-hub:{REPO}@{COMMIT}"])
def test_a_repository_of_ours_loads_and_loads_again_offline(
    hub: Hub,  # noqa: F811
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    hub.add(REPO, folder)
    assert_same(load(name), load(folder))
    switch_off(monkeypatch)
    hub.requests.clear()
    assert_same(load(name), load(folder))
    assert hub.requests == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_repository_without_one_of_its_files_is_named(hub: Hub, folder: Path, name: str) -> None:  # noqa: F811
    del hub.add(REPO, folder).files[name]
    with pytest.raises(HubError, match=f"{REPO} at .* has no file {name}"):
        load(f"hf-hub:{REPO}")


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_repository_of_open_clips_loads(hub: Hub, converted: list, weights: str) -> None:  # noqa: F811
    hub.add(REPO, **{"open_clip_config.json": b'{"model_cfg": {}}', weights: b"w", "config.json": b'{"model_type": 1}'})
    pipeline = load(f"hf-hub:{REPO}", dtype="bfloat16")
    ((architecture, file),) = converted
    assert Path(architecture).name == "open_clip_config.json"
    assert file.name == weights
    assert pipeline.info == {"source": {"format": "open_clip", "repository": REPO, "revision": COMMIT}}
    assert pipeline.dtype == torch.bfloat16
    assert pipeline.model.log_logit_scale.dtype == torch.float32


def test_safetensors_come_before_pickles(hub: Hub, converted: list) -> None:  # noqa: F811
    names = ("open_clip_config.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    hub.add(REPO, **dict.fromkeys(names, b"{}"))
    load(f"hf-hub:{REPO}")
    assert converted[0][1].name == "open_clip_model.safetensors"


def test_published_repositories_need_no_configuration(published: PublishedModel, converted: list) -> None:
    load(f"hf-hub:{published.repo_id}")
    assert converted[0][0] == published.name


def test_a_repository_of_something_else_is_named(hub: Hub) -> None:  # noqa: F811
    hub.add(REPO, **{"config.json": b'{"model_type": "bert"}', "model.safetensors": b"w"})
    with pytest.raises(HubError, match=r"someone/coca holds no CoCa that can be read: .* nor an open_clip_config"):
        load(f"hf-hub:{REPO}")
    hub.add(REPO, **{"open_clip_config.json": b"{}"})
    with pytest.raises(HubError, match="holds no weights: neither open_clip_model"):
        load(f"hf-hub:{REPO}")


# open_clip's architectures with a checkpoint


def test_an_architecture_and_a_checkpoint(converted: list, tmp_path: Path) -> None:
    loaded = load_model("open_clip:coca_ViT-B-32", checkpoint=tmp_path / "x.pt")
    assert converted == [("coca_ViT-B-32", tmp_path / "x.pt")]
    assert loaded.info["source"]["architecture"] == "coca_ViT-B-32"


TINY_OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16,
        "layers": 1,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "attentional_pool": True,
        "attn_pooler_heads": 2,
        "output_tokens": True,
    },
    "text_cfg": {"context_length": 76, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1, "embed_cls": True},
    "multimodal_cfg": {"context_length": 76, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    "custom_text": True,
}
TINY_OPEN_CLIP["text_cfg"]["output_tokens"] = True
TINY_OPEN_CLIP["multimodal_cfg"]["attn_pooler_heads"] = 2


def test_open_clips_own_files_give_one_model_by_every_way(hub: Hub, tmp_path: Path) -> None:  # noqa: F811
    """With the real conversion: configuration and checkpoint from this disk, from a repository, and as a folder."""
    torch.manual_seed(0)
    exported = export_open_clip(CoCa(config_from_open_clip(TINY_OPEN_CLIP)))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_OPEN_CLIP))
    torch.save({"epoch": 3, "state_dict": exported.state_dict}, tmp_path / "tiny.pt")
    here = load(f"open_clip:{tmp_path / 'tiny.json'}", checkpoint=tmp_path / "tiny.pt", device="cpu")
    save_file(exported.state_dict, tmp_path / "open_clip_model.safetensors")
    settings = {"model_cfg": TINY_OPEN_CLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    hub.add(
        REPO,
        **{
            "open_clip_config.json": json.dumps(settings).encode(),
            "open_clip_model.safetensors": (tmp_path / "open_clip_model.safetensors").read_bytes(),
        },
    )
    there = load(f"hf-hub:{REPO}", device="cpu")
    write_repository(tmp_path / "ours", load_model(f"hf-hub:{REPO}"), REPO, licence="mit")
    kept = load(tmp_path / "ours", device="cpu")
    assert_same(here, there)
    assert_same(here, kept)
    assert there.preprocess.config == kept.preprocess.config
    assert kept.preprocess.config.std == (0.25, 0.25, 0.25)
    image = torch.rand(3, 20, 30)
    assert there.caption(image, max_new_tokens=5) == kept.caption(image, max_new_tokens=5)


def test_a_folder_can_have_any_name(folder: Path, tmp_path: Path) -> None:
    odd = tmp_path / "run@home"
    loaded = load_model_folder(folder)
    save_model_folder(odd, loaded.model, loaded.tokenizer, PreprocessConfig((16, 16)))
    assert_same(load(odd), load(folder))
