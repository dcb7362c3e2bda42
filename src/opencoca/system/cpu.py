"""What kind of processor this is."""

import os
from pathlib import Path

import torch

_IS_WINDOWS = os.name == "nt"
_CPU_INFO = Path("/proc/cpuinfo")


def cpu_vendor() -> str:
    """The processor's maker, as the processor calls it; empty if that is not known."""
    if _IS_WINDOWS:
        return os.environ.get("PROCESSOR_IDENTIFIER", "").rpartition(", ")[2]
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def has_avx512() -> bool:
    """Whether the processor works on 512 bits at a time."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; products of such numbers are many times slower without."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
