"""Plans against the models and optimizers that they are about, and against one another."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from opencoca.cli import main
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig
from opencoca.plan import Cluster, Plan, make_plan
from opencoca.plan.text import describe
from opencoca.system import devices
from opencoca.train.optim.optimizer import build_optimizer
from opencoca.train.recipe.load import load_recipe
from opencoca.train.recipe.optimizer import OptimizerRecipe
from opencoca.train.recipe.recipe import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
WHOLE = CoCaConfig.named("tiny")
# With few blocks: the time that a plan takes grows with their number.
FEW_BLOCKS = replace(
    WHOLE, image=replace(WHOLE.image, depth=2), text=replace(WHOLE.text, unimodal_depth=1, multimodal_depth=1)
)
TINY = Recipe(size="tiny", model=FEW_BLOCKS, batch_size=64, max_steps=1000)
H200 = Cluster(devices=4, device="h200")


PLANS: dict[str, Plan] = {}


def plan_of(recipe: Recipe = TINY, cluster: Cluster = H200, **options: object) -> Plan:
    """The plan, made once for each recipe and cluster."""
    key = repr((recipe, cluster, options, devices.multiplies_bfloat16()))
    if key not in PLANS:
        PLANS[key] = make_plan(recipe, cluster, **options)  # pyright: ignore[reportArgumentType]
    return PLANS[key]


def with_strategy(recipe: Recipe, strategy: str) -> Recipe:
    return replace(recipe, distributed=replace(recipe.distributed, strategy=strategy))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_weights_gradients_and_optimizer_are_those_of_the_real_ones(name: str) -> None:
    recipe = replace(TINY, optimizer=OptimizerRecipe(name=name, ema_decay=0.99))  # pyright: ignore
    model = CoCa(recipe.model)
    optimizer = build_optimizer(model, recipe)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    chosen = plan_of(recipe, Cluster(device="h200")).chosen
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert chosen.weights == chosen.gradients == chosen.average == weights
    assert chosen.optimizer == pytest.approx(sum(t.numel() * t.element_size() for t in states), rel=1e-3)
    assert sum(plan_of(recipe).parameters.values()) * 4 == weights


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_strategies_are_those_that_the_optimizer_works_with(name: str) -> None:
    plan = plan_of(replace(TINY, optimizer=OptimizerRecipe(name=name)))  # pyright: ignore
    assert {memory.strategy for memory in plan.memory} == {"none", "ddp"} | ({"fsdp"} if name == "adamw" else set())


@pytest.mark.parametrize(("device", "has_instructions"), [("h200", False), ("cpu", True), ("cpu", False)])
def test_the_precision_is_chosen_as_training_chooses_it(
    monkeypatch: pytest.MonkeyPatch, device: str, has_instructions: bool
) -> None:
    monkeypatch.setattr("opencoca.system.devices.multiplies_bfloat16", lambda: has_instructions)
    auto, low, full = (
        plan_of(replace(TINY, precision=precision), Cluster(device=device)).chosen.activations
        for precision in ("auto", "bf16", "fp32")
    )
    assert auto == (low if device == "h200" or has_instructions else full)
    assert low != full


def test_sharding_divides_what_is_held() -> None:
    by_strategy = {(m.strategy, m.recompute): m for m in plan_of().memory}
    ddp, fsdp = by_strategy["ddp", "none"], by_strategy["fsdp", "none"]
    assert (fsdp.weights, fsdp.optimizer) == (ddp.weights // 4, ddp.optimizer // 4)
    assert fsdp.activations == ddp.activations
    for strategy in ("none", "ddp", "fsdp"):
        assert by_strategy[strategy, "all"].peak_bytes < by_strategy[strategy, "none"].peak_bytes


def test_work_grows_with_the_batch_and_is_shared_out() -> None:
    small, large = plan_of(), plan_of(replace(TINY, batch_size=128))
    assert large.flops.image_encoder == 2 * small.flops.image_encoder
    assert large.flops.contrastive_loss == 4 * small.flops.contrastive_loss
    more = plan_of(cluster=replace(H200, devices=8))
    assert more.flops.image_encoder == pytest.approx(small.flops.image_encoder)
    assert more.compute_seconds == pytest.approx(small.compute_seconds / 2, rel=0.02)


def test_sub_batches_cost_work_and_save_memory() -> None:
    whole, parts = plan_of(), plan_of(replace(TINY, grad_cache_steps=4))
    assert parts.recomputed_flops > 0 == whole.recomputed_flops
    assert sum(parts.chosen.activations.values()) < 0.3 * sum(whole.chosen.activations.values())
    assert parts.flops == whole.flops


def test_bytes_between_devices() -> None:
    plan = plan_of()
    gradients = next(message for message in plan.exchanges if message.name == "gradients, all-reduce")
    assert gradients.sent_bytes == 2 * 3 / 4 * 4 * plan.trained_parameters
    assert gradients.seconds == pytest.approx(gradients.sent_bytes / 450e9)
    far = plan_of(cluster=replace(H200, devices=16, network_bytes_per_sec=1e9))
    assert far.exchanges[0].seconds == pytest.approx(far.exchanges[0].sent_bytes / 1e9)
    assert plan_of(cluster=Cluster(device="h200")).exchanges == []
    sharded = plan_of(with_strategy(TINY, "fsdp"))
    assert {m.name for m in sharded.exchanges} == {
        "weights, all-gather",
        "gradients, reduce-scatter",
        "embeddings, all-gather",
    }


def test_how_long_it_takes() -> None:
    plan = plan_of()
    assert plan.steps == 1000
    assert plan.days is not None
    assert plan.days[0] == pytest.approx(1000 * plan.step_seconds[0] / 86_400)
    assert plan_of(replace(TINY, max_steps=None)).days is None
    assert plan_of(replace(TINY, max_steps=None, epochs=3), num_images=6400).steps == 300


def test_what_does_not_fit_names_what_would(make_config: Callable[..., CoCaConfig]) -> None:
    """Few blocks, which takes little time to plan, but of billions of parameters."""
    wide = make_config(
        {"image_size": (224, 224), "width": 768, "depth": 1, "num_heads": 12, "mlp_width": 3072},
        context_length=24,
        width=768,
        unimodal_depth=1,
        multimodal_depth=1,
        num_heads=12,
        mlp_width=1_000_000,
    )
    recipe = replace(TINY, model=wide, batch_size=4096)
    plan = plan_of(recipe, replace(H200, devices=8))
    assert not plan.fits
    assert "a step needs" in plan.problems[0]
    assert plan.remedy is not None
    assert "GiB" in plan.remedy
    changed = replace(recipe, compute=replace(recipe.compute, recompute="image"))
    assert f"compute.recompute: {changed.compute.recompute}" in plan.remedy or "fsdp" in plan.remedy
    hopeless = plan_of(recipe, Cluster(devices=1, device="l4"))
    assert hopeless.remedy is not None
    assert "nothing makes it fit" in hopeless.remedy


@pytest.mark.parametrize(
    ("recipe", "cluster", "message"),
    [
        (TINY, Cluster(devices=3, device="h200"), "must be a multiple of --devices 3"),
        (TINY, Cluster(device="voodoo"), "voodoo is not known; known: cpu"),
        (TINY, Cluster(devices=2, device="cpu"), "one process"),
        (with_strategy(TINY, "none"), H200, "set it to ddp or fsdp"),
    ],
)
def test_mistakes(recipe: Recipe, cluster: Cluster, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(recipe, cluster)


@pytest.mark.parametrize("name", ["paper_base", pytest.param("paper_2b", marks=pytest.mark.slow), "flickr8k"])
def test_the_recipes_that_come_along(name: str) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    count = {"paper_base": 64, "paper_2b": 256, "flickr8k": 1}[name]
    plan = plan_of(recipe, Cluster(devices=count, device="h200"))
    assert plan.fits
    text = describe(plan)
    for word in ("parameters", "work of a step", "memory of a device", "time", "It fits"):
        assert word in text


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("size: tiny\nbatch_size: 64\n", encoding="utf-8")
    arguments = ["plan", str(path), "--devices", "4", "--device", "h200"]
    assert main([*arguments, "--json", "--set", "batch_size=128"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["shape"]["images"] == 32
    assert values["fits"] is True
    assert values["flops"]["total"] > 0
    assert main(["plan", str(path), "--device", "l4", "--set", "batch_size=8192"]) == 1
    assert "remedy: " in capsys.readouterr().out
    assert main([*arguments, "--set", "batch_size"]) == 2
    assert main([*arguments, "--utilisation", "1.5"]) == 2
    assert "more than 1" in capsys.readouterr().err
