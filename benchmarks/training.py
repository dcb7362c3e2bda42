"""A training step against open_clip's and coca_pytorch's: the same weights, photographs, captions and precision.

    python benchmarks/training.py compare --images DIR --captions FILE [--batch-sizes 16 64] [--precisions fp32 bf16]
        [--peers open_clip coca_pytorch] [--rounds 3] [--out FILE]
    python benchmarks/training.py step --library opencoca --images DIR --captions FILE --batch-size 16 --profile

compare: every measurement is a process of its own (peak memory), ours and the peer's in turn, several rounds; seconds
are the median over all steps of all rounds, memory is the largest peak. A step is forward, backward and AdamW; ours
also clips the gradient and checks it, as its recipes do. The learning rate is so small that no weight changes, and so
the losses of all steps are comparable. The floor is our step's matrix FLOPs (real words only) over the matrix product
rate, plus AdamW's memory traffic over the copying rate, both measured beside our steps.
step: one such process. --profile says where our time goes.

Needs open_clip_torch 3.3 (and for that peer coca_pytorch 0.1 with vit_pytorch) in the same environment; --peers alone
measures ours by itself.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from common import declare_torchvision, import_open_clip, machine, matmul_rate, median_seconds, peak_bytes
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from opencoca.data import Batch, open_source
from opencoca.inference.preprocess import Preprocess
from opencoca.model.coca import CoCa
from opencoca.store.interop.lucidrains import load_lucidrains
from opencoca.store.interop.open_clip import (
    config_from_open_clip,
    export_open_clip,
    preprocess_from_open_clip,
    read_config,
)
from opencoca.system.allocator import keep_freed_memory
from opencoca.tasks.task import batch_losses
from opencoca.tokenizer import Tokenizer
from opencoca.train.compute import autocast
from opencoca.train.optim.optimizer import build_optimizer
from opencoca.train.recipe.recipe import OptimizerRecipe, Recipe
from opencoca.train.step import TrainStep

OPTIMIZER = OptimizerRecipe(learning_rate=1e-30, eps=1e-6, weight_decay=0.2, warmup_steps=0, decay="constant")
NUM_BATCHES = 3
# What the profile adds up, by the beginning of the operation's name.
GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn", "aten::convolution"),
    "optimizer": ("aten::_fused_adam", "Optimizer"),
    "casts and copies": ("aten::copy_", "aten::cat", "aten::index_select", "aten::index", "aten::clone"),
    "softmax": ("aten::_softmax", "aten::exp", "aten::amax", "aten::log"),
    "norms": ("aten::native_layer_norm",),
    "activation": ("aten::gelu", "aten::silu"),
    "gradient's norm and clipping": ("aten::linalg_vector_norm", "aten::mul_", "aten::_foreach"),
    "sums": ("aten::sum", "aten::add"),
    "fused attention": ("aten::_scaled_dot",),
}


@dataclass(frozen=True)
class Samples:
    """One batch: pixels (B, 3, H, W), and a caption each."""

    pixels: Tensor
    captions: list[str]


def load_batches(arguments: argparse.Namespace) -> list[Samples]:
    """Photographs with their first captions, normalised as open_clip does."""
    source = open_source(arguments.images, arguments.captions)
    preprocess = Preprocess(preprocess_from_open_clip(read_config(arguments.model)))
    batches = []
    for number in range(NUM_BATCHES):
        indices = [(number * arguments.batch_size + k) % len(source) for k in range(arguments.batch_size)]
        pixels = [preprocess(source.open_bytes(index)) for index in indices]
        batches.append(Samples(torch.cat(pixels), [source.captions(index)[0] for index in indices]))
    return batches


# --- the three libraries: each gives a step, called with a batch, that returns the loss ---


def our_step(model: CoCa, arguments: argparse.Namespace) -> tuple[Callable[[Samples], float], TrainStep]:
    recipe = Recipe(
        model=model.config, batch_size=arguments.batch_size, precision=arguments.precision, optimizer=OPTIMIZER
    )
    step = TrainStep(model.train(), build_optimizer(model, recipe), None, recipe)
    return lambda samples: step(our_batch(samples, model), 0, 1).loss, step


def our_batch(samples: Samples, model: CoCa) -> Batch:
    tokens = Tokenizer.clip()(samples.captions, model.config.text.context_length)
    return Batch(torch.arange(len(samples.pixels)), samples.pixels, tokens.token_ids, tokens.token_mask)


def open_clip_weights(arguments: argparse.Namespace) -> CoCa:
    torch.manual_seed(0)
    return CoCa(config_from_open_clip(read_config(arguments.model).model))


def open_clip_step(arguments: argparse.Namespace) -> Callable[[Samples], float]:
    open_clip = import_open_clip()
    peer = open_clip.create_model(arguments.model)
    peer.load_state_dict(export_open_clip(open_clip_weights(arguments)).state_dict)
    tokenize = open_clip.get_tokenizer(arguments.model)
    loss = open_clip.CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=1.0)

    def forward(samples: Samples) -> Tensor:
        return sum(loss(**peer(samples.pixels, tokenize(samples.captions)), output_dict=False))  # pyright: ignore

    return peer_step(peer.train(), forward, arguments.precision)


def coca_pytorch_model() -> nn.Module:
    """As large as ViT-B-32's: 12 layers of width 768 in each of its three parts, but PaLM's blocks."""
    declare_torchvision()
    torch.manual_seed(0)
    encoder = import_module("vit_pytorch").ViT(
        image_size=224, patch_size=32, num_classes=1, dim=768, depth=12, heads=12, mlp_dim=3072
    )
    extractor = import_module("vit_pytorch.extractor").Extractor(encoder, return_embeddings_only=True, detach=False)
    options = {"dim": 768, "image_dim": 768, "num_tokens": 49_408, "unimodal_depth": 12, "multimodal_depth": 12}
    theirs = import_module("coca_pytorch.coca_pytorch").CoCa
    return theirs(img_encoder=extractor, heads=12, num_img_queries=255, caption_loss_weight=2.0, **options)


def coca_pytorch_step(arguments: argparse.Namespace) -> Callable[[Samples], float]:
    peer, tokenizer = coca_pytorch_model().train(), Tokenizer.clip()

    def forward(samples: Samples) -> Tensor:
        tokens = tokenizer(samples.captions, 76)
        # It takes the last column for labels alone; padding is id 0 to it.
        ids = nn.functional.pad(tokens.token_ids.masked_fill(~tokens.token_mask, 0), (0, 1))
        return peer(ids, samples.pixels, return_loss=True)

    return peer_step(peer, forward, arguments.precision)


def peer_step(peer: nn.Module, forward: Callable[[Samples], Tensor], precision: str) -> Callable[[Samples], float]:
    """Forward, backward and AdamW, as open_clip_train does it; decay as there, of matrices alone."""
    kinds = ([p for p in peer.parameters() if p.ndim < 2], [p for p in peer.parameters() if p.ndim >= 2])
    groups = [{"params": params, "weight_decay": decay} for params, decay in zip(kinds, (0.0, 0.2), strict=True)]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)

    def step(samples: Samples) -> float:
        optimizer.zero_grad()
        with autocast(torch.device("cpu"), precision):
            loss = forward(samples)
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


# --- one process ---


def run_step(arguments: argparse.Namespace) -> dict[str, Any]:
    """Warms up, steps through the batches, and says what it took."""
    batches = load_batches(arguments)
    inner = None
    if arguments.library == "opencoca":
        keep_freed_memory()
        is_palm = arguments.weights == "coca_pytorch"
        model = (
            load_lucidrains(coca_pytorch_model().state_dict()).requires_grad_()
            if is_palm
            else open_clip_weights(arguments)
        )
        step, inner = our_step(model, arguments)
    else:
        step = (open_clip_step if arguments.library == "open_clip" else coca_pytorch_step)(arguments)
    losses = [step(batches[0])]
    seconds, cpu_seconds = [], []
    for number in range(arguments.steps):
        start, cpu_start = time.perf_counter(), time.process_time()
        losses.append(step(batches[number % NUM_BATCHES]))
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    result: dict[str, Any] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "losses": losses[1:]}
    result["peak_bytes"] = peak_bytes()
    if inner is not None:
        result |= floor_of(inner, our_batch(batches[0], inner.model))
        if arguments.profile:
            result["profile_ms"] = profile(lambda: step(batches[0]))
    return result


def floor_of(step: TrainStep, batch: Batch) -> dict[str, float]:
    """FLOPs of a step, its AdamW's memory traffic, and the rates that the machine has for both, now."""
    with FlopCounterMode(display=False) as counter, autocast(torch.device("cpu"), step.recipe.precision):
        batch_losses(step.parallel.task, step.parallel.model, batch).total.backward()
    step.parallel.model.zero_grad()
    parameters = sum(p.numel() for p in step.parallel.parameters)
    block = torch.ones(1 << 26)
    copied = torch.empty_like(block)
    return {
        "million_parameters": parameters / 1e6,
        "words": batch.num_tokens,
        "tflop": counter.get_total_flops() / 1e12,
        "optimizer_bytes": parameters * 4 * 7,  # weight and two moments read and written, gradient read
        "flop_per_sec": matmul_rate(torch.bfloat16 if step.recipe.precision == "bf16" else torch.float32),
        "copied_bytes_per_sec": 2 * block.numel() * 4 / median_seconds(lambda: copied.copy_(block), 3),
    }


def profile(function: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one call by kind of operation, the largest first; operations themselves below them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        function()
    found = profiler.key_averages()
    print(found.table(sort_by="self_cpu_time_total", row_limit=40, max_name_column_width=55), file=sys.stderr)
    sums: dict[str, float] = defaultdict(float)
    for event in found:
        kind = next((name for name, starts in GROUPS.items() if event.key.startswith(starts)), "other")
        sums[kind] += event.self_cpu_time_total / 1e3
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


# --- many processes ---


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for precision in arguments.precisions:
        for batch_size in arguments.batch_sizes:
            for peer in arguments.peers or [None]:
                rows.append(compare_once(arguments, precision, batch_size, peer))
                print(json.dumps(rows[-1], indent=1), file=sys.stderr, flush=True)
                # What is measured is kept, should a later process find no memory.
                write_results(arguments.out, rows)
    return {"model": arguments.model, "rows": rows, "machine": machine()}


def compare_once(arguments: argparse.Namespace, precision: str, batch_size: int, peer: str | None) -> dict[str, Any]:
    shared = ["--precision", precision, "--batch-size", str(batch_size)]
    shared += ["--weights", peer] if peer else []
    runs: dict[str, list[dict[str, Any]]] = {"opencoca": []} | ({peer: []} if peer else {})
    for number in range(arguments.rounds):
        for library, results in runs.items():
            profiles = ["--profile"] if library == "opencoca" and number == arguments.rounds - 1 else []
            results.append(measure(arguments, [*shared, "--library", library, *profiles]))
    row: dict[str, Any] = {"precision": precision, "batch_size": batch_size, "peer": peer}
    for library, results in runs.items():
        steps = [second for result in results for second in result["seconds"]]
        row[library] = {
            "step_seconds": statistics.median(steps),
            "least_seconds": min(steps),
            "cpu_seconds": statistics.median(second for result in results for second in result["cpu_seconds"]),
            "images_per_sec": batch_size / statistics.median(steps),
            "peak_gb": max(result["peak_bytes"] for result in results) / 1e9,
            "losses": results[0]["losses"][:NUM_BATCHES],
        }
    ours = runs["opencoca"]
    flops, traffic = ours[0]["tflop"] * 1e12, ours[0]["optimizer_bytes"]
    row["floor_seconds"] = statistics.median(
        flops / result["flop_per_sec"] + traffic / result["copied_bytes_per_sec"] for result in ours
    )
    row |= {key: ours[0][key] for key in ("million_parameters", "words", "tflop")}
    row["gflop_per_sec"] = statistics.median(result["flop_per_sec"] for result in ours) / 1e9
    row["step_over_floor"] = row["opencoca"]["step_seconds"] / row["floor_seconds"]
    row["profile_ms"] = ours[-1]["profile_ms"]
    if peer:
        row["times_as_fast"] = row[peer]["step_seconds"] / row["opencoca"]["step_seconds"]
        row["part_of_memory"] = row["opencoca"]["peak_gb"] / row[peer]["peak_gb"]
        pairs = zip(row["opencoca"]["losses"], row[peer]["losses"], strict=True)
        row["largest_loss_difference"] = max(abs(own - theirs) for own, theirs in pairs)
    return row


def measure(arguments: argparse.Namespace, options: list[str]) -> dict[str, Any]:
    """The result of one process."""
    common = ["--images", arguments.images, "--captions", arguments.captions, "--model", arguments.model]
    command = [sys.executable, __file__, "step", *common, "--steps", str(arguments.steps), *options]
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
        if done.returncode:
            errors.seek(0)
            tail = errors.read()[-2000:]
            raise SystemExit(f"{' '.join(options)} ended with {done.returncode} (-9: not enough memory?)\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])


def write_results(out: str | None, rows: list[dict[str, Any]]) -> None:
    if out:
        Path(out).write_text(json.dumps({"rows": rows, "machine": machine()}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    both, one = commands.add_parser("compare"), commands.add_parser("step")
    for command in (both, one):
        command.add_argument("--images", required=True, help="folder of photographs")
        command.add_argument("--captions", required=True, help="CSV, JSONL or Parquet of image and caption")
        command.add_argument("--model", default="coca_ViT-B-32", help="open_clip's name of it")
        command.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    both.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64])
    both.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    both.add_argument("--peers", nargs="*", default=["open_clip"], choices=("open_clip", "coca_pytorch"))
    both.add_argument("--rounds", type=int, default=3, help="processes of each library")
    both.add_argument("--out")
    one.add_argument("--library", default="opencoca", choices=("opencoca", "open_clip", "coca_pytorch"))
    one.add_argument("--weights", default="open_clip", choices=("open_clip", "coca_pytorch"), help="for ours")
    one.add_argument("--batch-size", type=int, default=16)
    one.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    one.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    result = run_step(arguments) if arguments.command == "step" else compare(arguments)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
