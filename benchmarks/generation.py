"""Captioning against open_clip's generate(): the same weights, machine, precision, settings; ids compared.

    python benchmarks/generation.py compare [--images 8] [--tokens 30] [--dtypes float32 bfloat16] [--out FILE]
    python benchmarks/generation.py memory --images 64 --beams 6
    python benchmarks/generation.py throughput --model coca_ViT-L-14 --device cuda --dtypes bfloat16

compare: seconds, floor and speed-up for greedy and beam search. open_clip's beam search sums raw logits instead of
log-probabilities; to compare ids, ours does so too in a run that is not timed. Its top_k with k = 1 is greedy and makes
the last token the end token. The floor is the larger of: the FLOPs of our run over the measured matrix product rate;
the text weights, read once a step, over the measured reading rate.
memory: the peak of each in a process of its own. throughput: captions per second of ours by beams and batch size, and
seconds for one image.

Weights are random (no published ones are needed) with start and padding token made improbable, because open_clip ends
a text at padding. Needs open_clip_torch 3.3 and transformers 4.49 but for throughput and --without-peer.
"""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from common import import_open_clip, machine, matmul_rate, report
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from opencoca.generation import GeneratedCaption, GenerationOptions, generate
from opencoca.generation.decoding.session import DecodingSession
from opencoca.model.coca import CoCa
from opencoca.model.kernels import linear
from opencoca.store.interop.open_clip import config_from_open_clip, export_open_clip, read_config
from opencoca.tokenizer import Tokenizer

_IMPROBABLE = 20.0


@lru_cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.clip()


def make_model(name: str, dtype: torch.dtype, device: str) -> CoCa:
    torch.manual_seed(0)
    model = CoCa(config_from_open_clip(read_config(name).model)).eval()
    with torch.no_grad():
        bias = model.multimodal_decoder.norm.bias
        bias.normal_()
        head = model.lm_head.weight
        head.normal_(std=head.shape[1] ** -0.5)
        tokenizer = _tokenizer()
        head[[tokenizer.bos_id, tokenizer.pad_id]] = -_IMPROBABLE * bias / bias.norm() ** 2
    return model.requires_grad_(False).to(device, dtype)


def make_peer(name: str, model: CoCa) -> nn.Module:
    """open_clip's model with the same weights."""
    peer = import_open_clip().create_model(name)
    peer.load_state_dict(export_open_clip(model).state_dict)
    parameter = next(model.parameters())
    return peer.to(parameter.device, parameter.dtype).eval()


def make_images(model: CoCa, count: int) -> torch.Tensor:
    torch.manual_seed(1)
    parameter = next(model.parameters())
    return torch.randn(count, 3, *model.config.image.image_size).to(parameter.device, parameter.dtype)


def options_for(beams: int, tokens: int, groups: int = 1) -> GenerationOptions:
    # The last token may be the end token, as in open_clip; none before it.
    return GenerationOptions(num_beams=beams, num_groups=groups, max_new_tokens=tokens, min_new_tokens=tokens - 1)


def make_session(arguments: argparse.Namespace, dtype: str) -> DecodingSession:
    model = make_model(arguments.model, getattr(torch, dtype), arguments.device)
    return DecodingSession(model, records_steps=not arguments.without_graphs)


def caption(
    session: DecodingSession, images: torch.Tensor, options: GenerationOptions
) -> list[tuple[GeneratedCaption, ...]]:
    with torch.inference_mode():
        tokens = session.model.encode_image(images).tokens
        return generate(session.model, tokens, _tokenizer(), options, session=session)


def peer_caption(peer: nn.Module, images: torch.Tensor, beams: int, tokens: int, groups: int = 1) -> torch.Tensor:
    kind = {"generation_type": "top_k", "top_k": 1}
    if beams > 1:
        kind = {"generation_type": "beam_search", "num_beams": beams, "num_beam_groups": groups}
    return peer.generate(images, seq_len=tokens + 1, min_seq_len=tokens, **kind)  # pyright: ignore


def _beams_and_groups(beams: str) -> tuple[int, int]:
    count, _, groups = beams.partition("/")
    return int(count), int(groups or 1)


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The least of some runs, after one to warm up where there are several."""
    found = []
    for _ in range(repeats + (repeats > 1)):
        synchronise()
        start = time.perf_counter()
        function()
        synchronise()
        found.append(time.perf_counter() - start)
    return min(found)


def cpu_seconds(function: Callable[[], Any]) -> float:
    """Of all cores together: on a busy machine the better measure."""
    start = time.process_time()
    function()
    return time.process_time() - start


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def read_rate(device: str) -> float:
    """Bytes a second of reading memory that is in no cache."""
    x = torch.ones(1 << 27, device=device)
    return x.numel() * 4 / seconds(lambda: x.sum(), 5)


def floor_of(session: DecodingSession, images: torch.Tensor, options: GenerationOptions) -> dict[str, float]:
    model = session.model
    parameter = next(model.parameters())
    # The counter does not know the products with rearranged weights: count without.
    most_rows, linear._MOST_ROWS = linear._MOST_ROWS, 0
    try:
        with FlopCounterMode(display=False) as counter:
            caption(session, images, options)
    finally:
        linear._MOST_ROWS = most_rows
    device = parameter.device.type
    flop_rate = matmul_rate(parameter.dtype) if device == "cpu" else _device_matmul_rate(parameter)
    modules = (model.unimodal_decoder.blocks, model.multimodal_decoder, model.lm_head)
    weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
    by_flops = counter.get_total_flops() / flop_rate
    by_reading = weights * options.max_new_tokens / read_rate(device)
    return {
        "tflop": counter.get_total_flops() / 1e12,
        "gflop_per_sec": flop_rate / 1e9,
        "floor_by_flops_s": by_flops,
        "floor_by_reading_s": by_reading,
        "floor_s": max(by_flops, by_reading),
    }


def _device_matmul_rate(like: torch.Tensor, size: int = 8192) -> float:
    left, right = torch.randn(2, size, size, device=like.device).to(like.dtype)
    return 2 * size**3 / seconds(lambda: left @ right, 5)


def equal_ids(session: DecodingSession, images: torch.Tensor, options: GenerationOptions, theirs: torch.Tensor) -> int:
    """How many captions have open_clip's ids, the last token apart; ours ranks by raw logits here, as it does."""
    log_softmax = torch.log_softmax
    if options.num_beams > 1:
        torch.log_softmax = lambda logits, *_, **__: logits.float()
    try:
        ours = caption(session, images, options)
    finally:
        torch.log_softmax = log_softmax
    last = options.max_new_tokens
    pairs = zip(ours, theirs.tolist(), strict=True)
    return sum(list(best.token_ids[:last]) == ids[:last] for (best, *_), ids in pairs)


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in arguments.dtypes:
        session = make_session(arguments, name)
        peer = None if arguments.without_peer else make_peer(arguments.model, session.model)
        images = make_images(session.model, arguments.images)
        for beams, groups in map(_beams_and_groups, arguments.beams):
            options = options_for(beams, arguments.tokens, groups)
            row: dict[str, Any] = {"dtype": name, "beams": beams, "groups": groups}
            row["seconds"] = seconds(lambda: caption(session, images, options), arguments.repeats)  # noqa: B023
            row["cpu_seconds"] = cpu_seconds(lambda: caption(session, images, options))  # noqa: B023
            row |= floor_of(session, images, options)
            row["over_floor"] = row["seconds"] / row["floor_s"]
            if peer is not None:
                start, cpu_start = time.perf_counter(), time.process_time()
                theirs = peer_caption(peer, images, beams, arguments.tokens, groups)
                synchronise()
                row["open_clip_seconds"] = time.perf_counter() - start
                row["open_clip_cpu_seconds"] = time.process_time() - cpu_start
                row["times_as_fast"] = row["open_clip_seconds"] / row["seconds"]
                row["equal_ids"] = equal_ids(session, images, options, theirs)
            rows.append(row)
            print(table(rows), flush=True)
    return {"model": arguments.model, "images": arguments.images, "tokens": arguments.tokens, "rows": rows}


def throughput(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in arguments.dtypes:
        session = make_session(arguments, name)
        for beams, groups in map(_beams_and_groups, arguments.beams):
            options = options_for(beams, arguments.tokens, groups)
            for count in arguments.batches:
                images = make_images(session.model, count)
                if arguments.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                taken = seconds(lambda: caption(session, images, options), arguments.repeats)  # noqa: B023
                row = {"dtype": name, "beams": beams, "groups": groups, "images": count, "seconds": taken}
                row["captions_per_sec"] = count / taken
                if arguments.device == "cuda":
                    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
                rows.append(row)
                print(table(rows[-1:]), flush=True)
    return {"model": arguments.model, "tokens": arguments.tokens, "rows": rows}


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name in arguments.dtypes:
        for beams in arguments.beams:
            row: dict[str, Any] = {"dtype": name, "beams": beams, "images": arguments.images}
            for whose in ("ours", "open_clip"):
                command = [sys.executable, __file__, "peak", "--whose", whose, "--dtypes", name, "--beams", beams]
                for option in ("images", "tokens", "model", "device"):
                    command += [f"--{option}", str(getattr(arguments, option))]
                command += ["--without-graphs"] * arguments.without_graphs
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                before, peak = map(int, done.stdout.split()[-2:])
                row |= {f"{whose}_model_gib": before / 2**30, f"{whose}_peak_gib": peak / 2**30}
            row["peak_ratio"] = row["ours_peak_gib"] / row["open_clip_peak_gib"]
            above = [row[f"{whose}_peak_gib"] - row[f"{whose}_model_gib"] for whose in ("ours", "open_clip")]
            row["ratio_above_model"] = above[0] / above[1]
            rows.append(row)
            print(table(rows), flush=True)
    return {"model": arguments.model, "tokens": arguments.tokens, "rows": rows}


def peak(arguments: argparse.Namespace) -> None:
    """Prints the bytes in use with the model built, and the most while captioning."""
    captioner: Any = make_session(arguments, arguments.dtypes[0])
    images = make_images(captioner.model, arguments.images)
    (beams, groups), tokens = _beams_and_groups(arguments.beams[0]), arguments.tokens
    if arguments.whose == "open_clip":
        captioner = make_peer(arguments.model, captioner.model)
    on_cuda = arguments.device == "cuda"
    gc.collect()
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux forgets the peak so far
    before = torch.cuda.memory_allocated() if on_cuda else _resident("VmRSS")
    if arguments.whose == "open_clip":
        peer_caption(captioner, images, beams, tokens, groups)
    else:
        caption(captioner, images, options_for(beams, tokens, groups))
    print(before, torch.cuda.max_memory_allocated() if on_cuda else _resident("VmHWM"))


def _resident(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(rows[0])
    cells = [[f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compare", "memory", "throughput", "peak"))
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=30, help="new tokens of every caption, all forced")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], help="float32, bfloat16, float16")
    parser.add_argument(
        "--beams",
        nargs="+",
        default=["1", "6", "6/3"],
        help="number of beams; 6/3 is 6 beams in 3 groups, what open_clip's generate() does unless told otherwise",
    )
    parser.add_argument("--model", default="coca_ViT-B-32", help="a CoCa of open_clip's, by its name")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64, 512], help="images, for throughput")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours, of which the fastest counts")
    parser.add_argument("--without-peer", action="store_true", help="compare: time ours alone")
    parser.add_argument("--without-graphs", action="store_true", help="decode without CUDA graphs")
    parser.add_argument("--whose", choices=("ours", "open_clip"), default="ours", help="peak: of which")
    parser.add_argument("--out", help="JSON file")
    arguments = parser.parse_args()
    if arguments.what == "peak":
        peak(arguments)
        return
    result = {"compare": compare, "memory": memory, "throughput": throughput}[arguments.what](arguments)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else machine()["cpu"]
    report({"command": sys.argv[1:], "device": device} | result, arguments.out)


if __name__ == "__main__":
    main()
