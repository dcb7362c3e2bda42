"""Chooses a device by name, and knows how fast devices can be: as their makers state it, or as measured here.

Rates are dense: the figures "with sparsity" in data sheets are twice as high, and training cannot use them.
"""

import time
from dataclasses import dataclass
from functools import cache

import torch

from opencoca.system.cpu import multiplies_bfloat16


def choose_device(name: str | torch.device, local_rank: int | None = None) -> torch.device:
    """Returns the device that a user names: auto, cpu, cuda, cuda:N, mps, or another of PyTorch's.

    "auto" is CUDA if there is a CUDA device, else the CPU; it never chooses mps, which is not tested here.

    Args:
        local_rank: the number of this process among those of one training run on this machine. It then takes the CUDA
            device of that number, whichever one was named. None: the process works alone.

    Raises:
        ValueError: the device is unknown or not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name!r} is no device; choose auto, cpu, cuda, cuda:N or mps") from error
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("the device mps is not there: this PyTorch or this machine has none; choose cpu")
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if count == 0:
        raise ValueError(f"the device {device} is not there: PyTorch sees no CUDA device; choose cpu or auto")
    if local_rank is not None:
        if local_rank >= count:
            raise ValueError(
                f"there are more processes than the {count} CUDA devices of this machine; lower torchrun's "
                "--nproc-per-node"
            )
        return torch.device("cuda", local_rank)
    if (device.index or 0) >= count:
        raise ValueError(
            f"the device {device} is not there: PyTorch sees {count} CUDA devices, cuda:0 to cuda:{count - 1}"
        )
    return device


@dataclass(frozen=True)
class DeviceSpec:
    """What an accelerator can do at best.

    bf16_flops, fp32_flops: FLOP/s, a multiply-add counted as two; fp32 as PyTorch multiplies by default, without TF32.
    memory_bytes: memory that a program can use.
    link_bytes_per_sec: rate to the other devices of its machine, in one direction; None: they are connected by the
        host's bus alone, counted as PCIe 4.0 x16.
    source: the maker's data sheet.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    memory_bytes: int
    link_bytes_per_sec: float | None
    source: str

    def peak(self, precision: str) -> float:
        """Returns the highest FLOP/s in ``bf16`` (autocast) or ``fp32``."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


def choose_precision(name: str, device: torch.device | DeviceSpec) -> str:
    """Returns the precision that a user names, fp32 or bf16 (autocast); for auto, the one that the device is made for.

    That is bf16 on a CUDA device or a processor with instructions for bfloat16, and on every device of `DEVICES`; on
    all others it is fp32.
    """
    if name != "auto":
        return name
    if isinstance(device, DeviceSpec):
        return "bf16"
    if device.type == "cuda":
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if device.type == "cpu" and multiplies_bfloat16() else "fp32"


_GIB = 1 << 30


def _device(name: str, bf16: float, fp32: float, gib: float, link_gb: float | None, source: str) -> DeviceSpec:
    return DeviceSpec(name, bf16 * 1e12, fp32 * 1e12, int(gib * _GIB), link_gb and link_gb * 1e9, source)


# Name, bf16 and fp32 in teraflops, memory in GiB, links in GB/s in one direction, source. A key matches a driver's name
# that has all its words; the first match counts, so special forms stand before the common one.
DEVICES: dict[str, DeviceSpec] = {
    key: _device(*values)
    for key, values in {
        "b200": ("NVIDIA B200", 2250, 75, 179, 900, "NVIDIA Blackwell Architecture Technical Brief"),
        "h200": ("NVIDIA H200 SXM", 989, 67, 139.8, 450, "NVIDIA H200 Tensor Core GPU data sheet"),
        "h100-nvl": ("NVIDIA H100 NVL", 835, 60, 93.1, 300, "NVIDIA H100 Tensor Core GPU data sheet"),
        "h100-pcie": ("NVIDIA H100 PCIe", 756, 51, 79.6, 300, "NVIDIA H100 Tensor Core GPU data sheet"),
        "h100": ("NVIDIA H100 SXM", 989, 67, 79.1, 450, "NVIDIA H100 Tensor Core GPU data sheet"),
        "a100-40gb": ("NVIDIA A100 40GB", 312, 19.5, 39.4, 300, "NVIDIA A100 Tensor Core GPU data sheet"),
        "a100": ("NVIDIA A100 80GB", 312, 19.5, 79.2, 300, "NVIDIA A100 Tensor Core GPU data sheet"),
        "l40s": ("NVIDIA L40S", 362, 91.6, 44.4, None, "NVIDIA L40S data sheet"),
        "l4": ("NVIDIA L4", 121, 30.3, 22.2, None, "NVIDIA L4 data sheet"),
        "a10g": ("NVIDIA A10G", 70, 31.2, 22.1, None, "AWS EC2 G5 instances"),
        "rtx-4090": ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 23.6, None, "NVIDIA Ada GPU Architecture white paper"),
        "rtx-3090": ("NVIDIA GeForce RTX 3090", 71, 35.6, 23.7, None, "NVIDIA Ampere GA102 white paper"),
        "mi300x": ("AMD Instinct MI300X", 1307.4, 163.4, 191.5, 448, "AMD Instinct MI300X data sheet"),
    }.items()
}
HOST_BUS_BYTES_PER_SEC = 32e9


def find_device(name: str) -> DeviceSpec | None:
    """Finds a device by its key (``h200``) or by its driver's name for it (``NVIDIA H200``); None if it is unknown."""
    words = name.lower().replace("_", "-").replace(" ", "-")
    if words in DEVICES:
        return DEVICES[words]
    for key, spec in DEVICES.items():
        if set(key.split("-")) <= set(words.split("-")):
            return spec
    return None


def peak_flops(device: torch.device, precision: str) -> float:
    """Returns the highest FLOP/s of this device: as stated for a known accelerator, else as measured now."""
    if device.type == "cuda":
        spec = find_device(torch.cuda.get_device_name(device))
        if spec is not None:
            return spec.peak(precision)
    return measured_flops(device, precision)


@cache
def measured_flops(device: torch.device, precision: str) -> float:
    """Measures the FLOP/s of the fastest of a few products of square matrices, on all threads of the process."""
    side = 768 if device.type == "cpu" else 4096
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    with torch.no_grad():
        for _ in range(6):
            began = time.perf_counter()
            torch.mm(left, right)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds[1:])


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The floating-point type that a user names; None is float32. Raises ValueError for others."""
    if dtype is None:
        return torch.float32
    found = _DTYPES.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ValueError(f"the dtype {dtype!r} is none of {', '.join(_DTYPES)}")
    return found
