"""Kept memory is given back when asked, also where a block in use lies behind it; kernels do not pile up."""

import os
import subprocess
import sys

import pytest

from opencoca.system.allocator import limit_kernel_caches

PROGRAM = """
import torch
from opencoca.system.allocator import keep_freed_memory, release_freed_memory

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) // 1024

kept = keep_freed_memory()
blocks = [torch.ones(2**20) for _ in range(100)]
last = torch.ones(2**20)
del blocks
before = resident()
release_freed_memory()
print(kept, before - resident())
"""


def test_release_gives_back_what_keeping_kept():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, megabytes = done.stdout.split()
    assert kept == "True"
    assert int(megabytes) > 300


SHAPES = """
import torch
from opencoca.system.allocator import keep_freed_memory, limit_kernel_caches, release_freed_memory
from opencoca.system.cpu import multiplies_bfloat16
from opencoca.system.memory_use import resident_bytes

limit_kernel_caches()
keep_freed_memory()
dtype = torch.bfloat16 if multiplies_bfloat16() else torch.float32  # without instructions it would take a minute
weight = torch.zeros(384, 384, dtype=dtype)

def resident_after(rows):
    for count in rows:
        torch.zeros(count, 384, dtype=dtype) @ weight
    release_freed_memory()
    return resident_bytes() >> 20

first = resident_after(range(1, 300))
print(resident_after(range(300, 700)) - first)
"""


def test_products_of_ever_new_shapes_do_not_fill_the_memory():
    """Where products in bf16 are compiled (AMX, AVX-512), 400 kernels take 290 MB if all are kept."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 100


def test_what_the_environment_says_of_kernels_stays(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    limit_kernel_caches()
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert int(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024
