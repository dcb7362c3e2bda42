"""Kept memory is given back when asked, also where a block that is in use lies behind it."""

import subprocess
import sys

PROGRAM = """
import torch
from opencoca.train.memory import keep_freed_memory, release_freed_memory

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
