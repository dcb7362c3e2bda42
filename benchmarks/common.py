"""What the benchmarks share: the machine, the clock, the peak of memory, the import of open_clip."""

import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

_TORCHVISION: list[torch.library.Library] = []


def import_open_clip(module: str = "open_clip") -> Any:
    """open_clip or a module of it. It imports torchvision, which PyPI has for CUDA alone; beside a CPU build of PyTorch
    that lacks operators, which need only be declared."""
    declare_torchvision()
    return importlib.import_module(module)


def declare_torchvision() -> None:
    """Declares the operators that torchvision describes at its import, where its own do not load."""
    if torch.version.cuda is None and not _TORCHVISION:
        _TORCHVISION.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            _TORCHVISION[0].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def median_seconds(function: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Median wall-clock seconds of a call."""
    for _ in range(warmup):
        function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def matmul_rate(dtype: torch.dtype, size: int = 4096) -> float:
    """FLOP a second of square matrix products on random data: the best of five tries of PyTorch's faster library."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    products = [torch.matmul]
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        products.append(lambda x, y: torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], ""))
    repeats = max(1, (2048 // size) ** 3)
    best = min(
        median_seconds(lambda: [product(left, right) for _ in range(repeats)], 1, warmup=1)  # noqa: B023
        for product in products
        for _ in range(5)
    )
    return 2 * size**3 * repeats / best


def peak_bytes() -> int:
    """The most memory this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": names[0].split(": ")[1] if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def report(result: dict[str, Any], out: str | None) -> None:
    """Prints the result as JSON, and writes it where asked."""
    text = json.dumps(result | {"machine": machine()}, indent=2)
    print(text)
    if out:
        Path(out).write_text(text + "\n", encoding="utf-8")
