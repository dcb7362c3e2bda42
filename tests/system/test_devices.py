"""One function chooses the device for all commands; it refuses what is not there by name."""

import pytest
import torch

from opencoca.system.devices import DEVICES, choose_device, choose_precision, find_device


@pytest.fixture
def cuda_devices(monkeypatch: pytest.MonkeyPatch):
    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


def test_auto_is_cuda_where_there_is_one(cuda_devices) -> None:
    cuda_devices(0)
    assert choose_device("auto") == torch.device("cpu")
    cuda_devices(2)
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("auto", local_rank=1) == torch.device("cuda:1")


def test_each_process_of_a_run_has_its_own_device(cuda_devices) -> None:
    cuda_devices(2)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert [choose_device("cuda", local_rank=rank).index for rank in (0, 1)] == [0, 1]
    assert choose_device("cpu", local_rank=5) == torch.device("cpu")
    with pytest.raises(ValueError, match="more processes than the 2 CUDA devices"):
        choose_device("cuda", local_rank=2)


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("gpu", 0, "'gpu' is no device; choose auto, cpu, cuda, cuda:N or mps"),
        ("cuda", 0, "cuda is not there: PyTorch sees no CUDA device"),
        ("cuda:2", 2, "cuda:2 is not there: PyTorch sees 2 CUDA devices, cuda:0 to cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_named(cuda_devices, name: str, count: int, message: str) -> None:
    cuda_devices(count)
    with pytest.raises(ValueError, match=message):
        choose_device(name)


def test_mps_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="mps is not there"):
        choose_device("mps")


def test_the_drivers_names_are_known() -> None:
    assert find_device("NVIDIA H100 PCIe") == find_device("h100-pcie")
    assert find_device("NVIDIA GeForce GTX 970") is None


@pytest.mark.parametrize("has_instructions", [False, True])
def test_auto_is_the_precision_that_the_device_is_made_for(
    monkeypatch: pytest.MonkeyPatch, has_instructions: bool
) -> None:
    monkeypatch.setattr("opencoca.system.devices.multiplies_bfloat16", lambda: has_instructions)
    cpu = torch.device("cpu")
    assert choose_precision("auto", cpu) == ("bf16" if has_instructions else "fp32")
    assert choose_precision("auto", torch.device("mps")) == "fp32"
    assert choose_precision("auto", DEVICES["h200"]) == "bf16"
    for named in ("fp32", "bf16"):
        assert choose_precision(named, cpu) == choose_precision(named, DEVICES["h200"]) == named


@pytest.mark.gpu
def test_auto_asks_the_gpu() -> None:
    has_instructions = torch.cuda.get_device_capability() >= (8, 0)
    assert choose_precision("auto", torch.device("cuda")) == ("bf16" if has_instructions else "fp32")
