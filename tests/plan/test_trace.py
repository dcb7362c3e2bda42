"""What the trace says is kept, against what a real forward pass keeps."""

import pytest
import torch

from opencoca.data import Batch
from opencoca.model.coca import CoCa
from opencoca.model.config import CoCaConfig, ImageEncoderConfig, PoolerConfig, TextConfig
from opencoca.model.init import without_values
from opencoca.model.structure import PARTS
from opencoca.plan.planner import batch_of, likely_lengths
from opencoca.plan.trace import Trace, trace_forward
from opencoca.tasks.pretraining import Pretraining, PretrainingOptions
from opencoca.train.compute import autocast


def config(**text: object) -> CoCaConfig:
    return CoCaConfig(
        embed_dim=48,
        image=ImageEncoderConfig(image_size=(64, 64), patch_size=8, width=64, depth=2, num_heads=2, mlp_width=128),
        pooler=PoolerConfig(num_queries=8, num_heads=2),
        text=TextConfig(
            vocab_size=300,
            context_length=30,
            width=64,
            unimodal_depth=2,
            multimodal_depth=2,
            num_heads=2,
            mlp_width=128,
            **text,  # pyright: ignore[reportArgumentType]
        ),
    )


def traced(model: CoCaConfig, lengths: torch.Tensor, precision: str, device_type: str = "cpu", **wants: bool) -> Trace:
    with without_values():
        network = CoCa(model).train()
    ids, mask = batch_of(lengths)
    task, batch = Pretraining(options(**wants)), Batch(torch.arange(len(lengths)), None, ids, mask)
    return trace_forward(network, task, batch, device_type=device_type, precision=precision)


def options(contrastive: bool = True, captioning: bool = True) -> PretrainingOptions:
    return PretrainingOptions(contrastive_weight=float(contrastive), caption_weight=float(captioning))


def kept_bytes(trace: Trace, part: str | None = None) -> int:
    """What all units keep, or those of one part."""
    return sum(unit.kept_bytes for unit in trace.units.values() if part in (None, unit.part))


def really_kept(model: CoCaConfig, lengths: torch.Tensor, precision: str, **wants: bool) -> int:
    network = CoCa(model).train()
    ids, mask = batch_of(lengths)
    images = torch.randn(len(lengths), 3, *model.image.image_size)
    known = {t.untyped_storage().data_ptr() for t in (*network.parameters(), images)}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast(torch.device("cpu"), precision):
        output = network(images, ids, mask, **wants)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("text", [{}, {"dropout": 0.1}, {"block": "parallel", "num_kv_heads": 1}])
def test_in_float32_it_is_exact(text: dict[str, object]) -> None:
    lengths = likely_lengths(6, 12, 30)
    assert kept_bytes(traced(config(**text), lengths, "fp32")) == really_kept(config(**text), lengths, "fp32")


def test_in_low_precision_it_is_close() -> None:
    lengths = likely_lengths(16, 12, 30)
    for model in (config(), config(positions="rotary")):
        trace = traced(model, lengths, "bf16")
        real = really_kept(model, lengths, "bf16")
        assert kept_bytes(trace) + trace.weight_copy_bytes == pytest.approx(real, rel=0.05)
        assert trace.hidden_dtype == torch.bfloat16


@pytest.mark.parametrize("wants", [{"contrastive": False}, {"captioning": False}])
def test_a_half_that_is_not_wanted_is_not_kept(wants: dict[str, bool]) -> None:
    lengths = likely_lengths(6, 12, 30)
    trace = traced(config(), lengths, "fp32", **wants)
    assert kept_bytes(trace) == really_kept(config(), lengths, "fp32", **wants)
    assert kept_bytes(trace) < kept_bytes(traced(config(), lengths, "fp32"))


def test_units_are_the_parts_and_blocks_of_the_model() -> None:
    trace = traced(config(), likely_lengths(6, 12, 30), "fp32")
    assert {unit.part for unit in trace.units.values()} == set(PARTS) - {"linear_branch", "task_head"}
    blocks = [name for name, unit in trace.units.items() if unit.recomputable]
    assert blocks == [
        "image_encoder.stages.1",
        "image_encoder.stages.2",
        "unimodal_decoder.blocks.0",
        "unimodal_decoder.blocks.1",
        *(f"multimodal_decoder.layers.{i}.{kind}_block" for i in range(2) for kind in ("self", "cross")),
    ]
    assert trace.units["image_encoder.stages.1"].input_bytes == 4 * 6 * 64 * 64
    inputs = sum(trace.units[name].input_bytes for name in blocks[:2])
    assert inputs < kept_bytes(trace, "image_encoder") / 3


def test_an_accelerator_does_not_keep_attention_weights() -> None:
    """Of two image sizes, with four times the tokens, it keeps about four times as much, not sixteen."""
    lengths = likely_lengths(2, 12, 30)
    small, large = config(), config()
    object.__setattr__(large.image, "image_size", (128, 128))
    kept = [kept_bytes(traced(c, lengths, "bf16", "cuda"), "image_encoder") for c in (small, large)]
    assert 3.9 < kept[1] / kept[0] < 4.1


def test_nothing_is_left_behind() -> None:
    before = torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")
    traced(config(), likely_lengths(2, 12, 30), "bf16", "cuda")
    assert (torch.is_autocast_enabled("cuda"), torch.is_autocast_enabled("cpu")) == before
    assert torch.empty(2).device.type == "cpu"


def test_likely_lengths() -> None:
    lengths = likely_lengths(1000, 16, 64)
    assert lengths.double().mean() == pytest.approx(16, abs=0.1)
    assert int(lengths.max()) > 25
    with pytest.raises(ValueError, match="context_length, 12"):
        likely_lengths(4, 16, 12)
