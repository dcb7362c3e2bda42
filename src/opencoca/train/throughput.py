"""How well a run uses its device: needed operations over what it could do, and memory."""

import torch

from opencoca.data import Batch
from opencoca.model.config import CoCaConfig
from opencoca.system.devices import peak_flops
from opencoca.system.memory_use import peak_bytes
from opencoca.tasks.task import Task
from opencoca.train.flops import ModelFlops
from opencoca.train.recipe.recipe import Recipe


class Throughput:
    """Measures how well this process's device is used, for its part of every batch."""

    def __init__(self, config: CoCaConfig, recipe: Recipe, task: Task, device: torch.device, num_processes: int = 1):
        """config: the architecture with its vocabulary. The rate of an unknown device is measured, which is brief."""
        self.device, self.peak = device, peak_flops(device, recipe.precision)
        self._count = ModelFlops(config, recipe, task)
        self._rows = num_processes / recipe.accumulation_steps

    def flops(self, batch: Batch) -> float:
        """Operations that a step on this process's batch needs (see `ModelFlops`)."""
        all_texts = round(len(batch.token_ids) * self._rows)
        return self._count(batch.num_samples, batch.token_mask.sum(dim=1), all_texts).total

    def figures(self, flops_per_sec: float) -> dict[str, float]:
        """For a line of the log: utilisation (1 = the device's peak rate), and the most memory so far."""
        return {
            "model_flops_per_sec": flops_per_sec,
            "model_flops_utilisation": flops_per_sec / self.peak,
            "memory_bytes": float(peak_bytes(self.device)),
        }
