"""What the devices send one another in a step, in bytes and seconds."""

from dataclasses import dataclass

from opencoca.plan.memory import Strategy
from opencoca.plan.planner import Planner


@dataclass(frozen=True)
class Exchange:
    """One kind of message: what it carries, the bytes that a device sends in a step, and the seconds for it."""

    name: str
    sent_bytes: float
    seconds: float


def exchanges(planner: Planner, strategy: Strategy, link_bytes_per_sec: float) -> list[Exchange]:
    """The exchanges of a whole step, done in rings: each of n devices sends (n - 1) / n of what it gathers or scatters.

    link_bytes_per_sec: the rate from a device to the others of its machine.
    """
    recipe, cluster, model, shape = planner.recipe, planner.cluster, planner.model, planner.shape(planner.recipe)
    if cluster.devices == 1 or strategy == "none":
        return []
    passes = recipe.accumulation_steps * recipe.grad_cache_steps
    found: list[Exchange] = []

    def add(name: str, gathered_bytes: float, members: int, stride: int = 1, factor: int = 1) -> None:
        if members == 1:
            return
        within = members * stride <= cluster.devices_per_node
        sent = factor * gathered_bytes * (members - 1) / members
        found.append(Exchange(name, sent, sent / (link_bytes_per_sec if within else cluster.network_bytes_per_sec)))

    if strategy == "ddp":
        add("gradients, all-reduce", model.trained, cluster.devices, factor=2)
    else:
        shard_size = planner.shard_size
        blocks = model.weights - model.shared_weights
        low = 0.5 if recipe.precision == "bf16" else 1.0
        times = 2 if recipe.distributed.reshard_after_forward else 1
        # GradCache's first pass gathers once more.
        first_pass = passes if recipe.grad_cache_steps > 1 and recipe.task.uses.contrastive else 0
        gathers = times * passes + first_pass
        weights = low * blocks * gathers + model.shared_weights * (passes + first_pass)
        add("weights, all-gather", weights, shard_size)
        add("gradients, reduce-scatter", model.trained, shard_size)
        copies = cluster.devices // shard_size
        add("gradients' shards, all-reduce", model.trained / shard_size, copies, stride=shard_size, factor=2)
    if recipe.task.uses.contrastive:
        rows = 4 * (shape.embed_dim + 5) * (shape.all_images + shape.all_texts)
        add("embeddings, all-gather", recipe.accumulation_steps * rows, cluster.devices)
    return found
