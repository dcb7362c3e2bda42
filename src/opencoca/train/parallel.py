"""How the model is spread over processes: not at all, copied (DDP), or sharded block by block (FSDP2).

Every process computes its part of the loss such that the parts add up to that of the whole batch; so gradients are
added up, too, where these engines would average them.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from opencoca.distributed.world import World, full_tensor, local_part
from opencoca.model.coca import CoCa
from opencoca.system.devices import choose_precision
from opencoca.tasks import make_task
from opencoca.tasks.task import Task
from opencoca.train.deferred_init import fill_initial_values
from opencoca.train.recipe.recipe import DistributedRecipe, Recipe


class TaskNetwork(nn.Module):
    """A network with the forward pass of a task, as one module that engines can wrap."""

    def __init__(self, model: CoCa, task: Task):
        super().__init__()
        self.model = model
        self.forward = partial(task.forward, model)


class ParallelModel:
    """A model as training runs it, and what must be done to its gradients and parameters as a whole.

    network: a module that is called as `Task.forward` is, without its first argument; every process must call it
        equally often.
    """

    def __init__(
        self,
        model: CoCa,
        device: torch.device,
        recipe: Recipe,
        world: World | None = None,
        task: Task | None = None,
    ):
        """Spreads the model, in place, over the processes as the recipe says, and moves it to ``device``.

        One that is to be sharded may be on the meta device; it gets its initial values when that is done.
        world: None = this process alone, even if there are others. task: None = the recipe's, as it is without samples.
        """
        self.model, self.device, self.world = model, device, world or World()
        self.task = task or make_task(recipe.task)
        together = world is not None and dist.is_initialized()
        self.strategy = recipe.distributed.strategy if together else "none"
        self.network: nn.Module = TaskNetwork(model, self.task)
        if self.strategy == "ddp":
            self.network = _copied(self.network.to(device), device)
        elif self.strategy == "fsdp":
            _shard(self.network, model, device, recipe, self.world)
            if model.device.type == "meta":
                fill_initial_values(model, device, recipe.seed)
        else:
            model.to(device)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @contextmanager
    def adding_up(self, last: bool) -> Iterator[None]:
        """Surrounds a forward and backward pass; the processes' gradients are added up in the last of a step alone."""
        if isinstance(self.network, DistributedDataParallel):
            with nullcontext() if last else self.network.no_sync():
                yield
            return
        if isinstance(self.network, FSDPModule):
            self.network.set_requires_gradient_sync(last)
        yield
        # A scalar cannot be sharded, so the engine leaves it to us.
        for scalar in _scalars(self.model) if last and self.strategy == "fsdp" else ():
            if scalar.grad is not None:
                self.world.sum(scalar.grad)

    @torch.no_grad()
    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales the whole gradient to a 2-norm of at most max_norm (0: of any size); returns the norm that it had."""
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        sharded = [grad for grad in grads if isinstance(grad, DTensor)]
        norm = torch.nn.utils.get_total_norm([grad for grad in grads if not isinstance(grad, DTensor)]).to(self.device)
        if sharded:
            of_shards = torch.nn.utils.get_total_norm([grad.to_local() for grad in sharded]).to(self.device).square()
            mesh = sharded[0].device_mesh
            dist.all_reduce(of_shards, group=mesh.get_group(mesh.ndim - 1))
            norm = (of_shards + norm.square()).sqrt()
        if not max_norm:
            return norm
        if not sharded:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)
            return norm
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            local_part(grad).mul_(factor)
        return norm

    @torch.no_grad()
    def gathered(self, everywhere: bool = False) -> CoCa | None:
        """The whole model (of a sharded one, a copy) in the main process, None in the others; all must call.

        everywhere: in the others, too. Buffers, which may differ, are the main process's.
        """
        wanted = everywhere or self.world.is_main
        if self.strategy != "fsdp":
            if everywhere:
                self._share_buffers(self.model)
            return self.model if wanted else None
        copy = None
        if wanted:
            # Drawing its initial values must not change the run's random numbers.
            with torch.random.fork_rng(devices=[]):
                copy = CoCa(self.model.config).to(self.device, next(_scalars(self.model)).dtype).eval()
        targets = {} if copy is None else {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            whole = full_tensor(tensor.detach())
            if copy is not None:
                targets[name].copy_(whole)
        if everywhere and copy is not None:
            self._share_buffers(copy)
        return copy

    def _share_buffers(self, model: CoCa) -> None:
        if self.world.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


def is_built_in_shards(recipe: Recipe) -> bool:
    """Whether no process needs the whole model: it is sharded, and its initial values can be drawn after that."""
    encoder = recipe.encoder
    is_ours = recipe.model.image.name == "vit" and encoder.init == "none" and not encoder.cache_features
    return recipe.distributed.strategy == "fsdp" and dist.is_initialized() and is_ours


def check_processes(recipe: Recipe, world: World) -> None:
    """Raises ValueError for several processes without a strategy, and for sizes that do not fit their number."""
    options = recipe.distributed
    if world.size > 1 and options.strategy == "none":
        raise ValueError(f"there are {world.size} processes, but distributed.strategy is none; set it to ddp or fsdp")
    if options.strategy == "fsdp" and world.size % (options.shard_size or 1):
        raise ValueError(
            f"distributed.shard_size {options.shard_size} must divide the number of processes, which is {world.size}; "
            "a machine's number of accelerators is the usual choice"
        )


def _copied(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    wrapped.register_comm_hook(None, _add_up)
    return wrapped


def _add_up(
    _: object,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def _shard(whole: nn.Module, model: CoCa, device: torch.device, recipe: Recipe, world: World) -> None:
    # Of keys and values, whose projection is a unit of its own; nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    options = recipe.distributed
    mesh = _mesh(device, options, world)
    # Blocks are gathered and computed in the low precision. What is used outside of them (embeddings, the vocabulary
    # head, the temperature) stays in float32 and is cast where autocast would.
    low = torch.bfloat16 if choose_precision(recipe.precision, device) == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low else None)
    for units in model.structure().shard_units():
        fully_shard(
            units,
            mesh=mesh,
            reshard_after_forward=options.reshard_after_forward,
            mp_policy=policy,
        )
    scalars, has_values = set(_scalars(model)), model.device.type != "meta"
    for scalar in scalars if has_values else ():
        scalar.data = scalar.data.to(device)
    fully_shard(whole, mesh=mesh, reshard_after_forward=False, ignored_params=scalars)
    if has_values:
        model.to(device)
    for module in whole.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _mesh(device: torch.device, options: DistributedRecipe, world: World) -> DeviceMesh:
    """All processes in a row, or rows of ``shard_size`` that each hold one copy of the weights."""
    size = options.shard_size or world.size
    if size == world.size:
        return init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world.size // size, size), mesh_dim_names=("replicate", "shard"))


def _scalars(model: nn.Module) -> Iterator[nn.Parameter]:
    """Single numbers, such as the temperature, which cannot be sharded."""
    return (parameter for parameter in model.parameters() if parameter.ndim == 0)
