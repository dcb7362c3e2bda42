"""What a network consists of: parts, the order of their layers, and what is gathered, recomputed or counted together.

Each network describes itself once, by the names of its modules. Freezing, learning rates, sharding, recomputation,
plans and counts of operations ask the description and need to know no module of a network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from opencoca.model.layers.attention import Attention
from opencoca.model.layers.blocks import Mlp, TransformerBlock
from opencoca.model.layers.poolers import FeatureProjection

PARTS = (
    "image_encoder",
    "image_pooling",
    "unimodal_decoder",
    "multimodal_decoder",
    "heads",
    "linear_branch",
    "task_head",
)
"""The parts of a CoCa, as recipes call them."""

Tower = Literal["image", "text"]

# Tables of vectors that are looked up or learned as they are, not matrices that multiply; they do not decay.
_TABLES = ("pos_embed", "query", "token_embed.weight", "word_embed.weight")
_CONTEXT_UNIT = "image_keys_values"


@dataclass(frozen=True)
class Part:
    """One part of a network. All names are paths of modules or parameters in the network.

    members: the network's own modules and parameters that belong to the part. tower: whose layers the part's are; those
    of all parts of a tower follow each other, part by part. stem: what comes before the first layer. layers: in order.
    What is neither in the stem nor in a layer comes after them.
    """

    name: str
    members: tuple[str, ...]
    tower: Tower | None = None
    stem: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


class Unit(NamedTuple):
    """What a step keeps or recomputes as a whole: a block, a stage of the image encoder, or something smaller.

    block: whether it is a block, whose inside can be computed again for the gradient.
    """

    name: str
    part: Part
    block: bool


class ProductSizes(NamedTuple):
    """How large the products of a text decoder's half are.

    weights: matrix elements that a word meets; context_weights: those that an image token meets.
    pair_width, cross_pair_width: what a pair of positions costs in all layers, a multiply-add as one.
    """

    weights: int
    context_weights: int
    pair_width: int
    cross_pair_width: int


class Structure:
    """The description of one network. image_encoder: a module that is an `ImageEncoder`."""

    def __init__(self, network: nn.Module, image_encoder: Any, parts: Sequence[Part]):
        self.network, self.image_encoder, self.parts = network, image_encoder, tuple(parts)

    def part_of(self, name: str) -> str:
        """The name of the part that a parameter of this name belongs to."""
        return self._part_of(name).name

    def _part_of(self, name: str) -> Part:
        return next(part for part in self.parts if _longest(part.members, name))

    def layers_behind(self, name: str) -> int:
        """How many layers of its tower come after that of the parameter of this name; 0 for what is in no layer."""
        part = self._part_of(name)
        tower = [other for other in self.parts if other.tower == part.tower]
        following = tower[tower.index(part) + 1 :] if part.tower else []
        behind = sum(len(other.layers) for other in following)
        layer = _longest(part.layers, name)
        if layer is not None:
            return behind + len(part.layers) - 1 - part.layers.index(layer)
        return behind + len(part.layers) if _longest(part.stem, name) else 0

    def decays(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay acts on a parameter: matrices decay; norms, biases, positions and embeddings do not."""
        return parameter.ndim >= 2 and not name.endswith(_TABLES)

    def parameters(self, *parts: str) -> list[nn.Parameter]:
        """The parameters of these parts; one that two parts share belongs to the first of them."""
        return [parameter for name, parameter in self.network.named_parameters() if self.part_of(name) in parts]

    def trains(self, *parts: str) -> bool:
        """Whether any parameter of these parts is trained."""
        return any(parameter.requires_grad for parameter in self.parameters(*parts))

    def blocks(self, tower: Tower | Literal["all"] = "all") -> list[TransformerBlock]:
        """The transformer blocks of a tower, which can be recomputed or compiled, in order."""
        return [
            module
            for part in self.parts
            if part.tower is not None and tower in (part.tower, "all")
            for module in self._modules(part)
            if isinstance(module, TransformerBlock)
        ]

    def shard_units(self) -> Iterator[list[nn.Module]]:
        """Modules whose weights are gathered together, innermost first; what is in none is gathered once for a step.

        What prepares a context is a unit of its own: that of an image is prepared before the layers run.
        """
        for part in self.parts:
            for layer in map(self.network.get_submodule, part.layers):
                blocks = [module for module in layer.modules() if isinstance(module, TransformerBlock)]
                yield from (block.context_modules() for block in blocks if block.has_context)
                if blocks:
                    yield [layer]

    def unit_of(self, name: str) -> Unit:
        """The unit that the module or parameter of this name belongs to."""
        part = self._part_of(name)
        path, module = "", self.network
        for step in name.split("."):
            path, module = f"{path}.{step}".lstrip("."), getattr(module, step)
            if isinstance(module, TransformerBlock):
                inside = name.removeprefix(path + ".").split(".")
                if module.has_context and any(step in ("kv_proj", "norm_context") for step in inside):
                    return Unit(_CONTEXT_UNIT, part, False)
                return Unit(path, part, True)
        if part.tower == "text":
            return Unit(name, part, False)
        return Unit(_longest((*part.layers, *part.members), name) or name, part, False)

    def product_sizes(self, part: str) -> ProductSizes:
        """The sizes of the products of a text decoder's half."""
        weights = context = pair = cross_pair = 0
        for module in self._modules(next(other for other in self.parts if other.name == part)):
            if isinstance(module, nn.Linear):
                weights += module.weight.numel()
            elif isinstance(module, TransformerBlock):
                width = 2 * module.attn.num_heads * module.attn.head_dim
                if module.has_context:
                    context += module.attn.kv_proj.weight.numel()
                    cross_pair += width
                else:
                    pair += width
        return ProductSizes(weights - context, context, pair, cross_pair)

    def hidden_matrices(self) -> dict[Tensor, int]:
        """Matrices between one hidden layer and another, and how many maps each holds: of attention, MLPs and poolers.

        Embeddings (of words, patches and positions), queries and heads are none: their rows are not used together.
        """
        found: dict[Tensor, int] = {}
        for module in self.network.modules():
            if isinstance(module, Attention | Mlp | FeatureProjection):
                maps = module.hidden_maps().items()
                found |= {linear.weight: count for linear, count in maps if isinstance(linear, nn.Linear)}
        return found

    def _modules(self, part: Part) -> Iterator[nn.Module]:
        for member in part.members:
            module = getattr(self.network, member)
            if isinstance(module, nn.Module):
                yield from module.modules()


def numbered(path: str, count: int) -> tuple[str, ...]:
    """The paths of the modules of a list."""
    return tuple(f"{path}.{index}" for index in range(count))


def _longest(paths: Sequence[str], name: str) -> str | None:
    """The longest of the paths that a name begins with."""
    found = [path for path in paths if name == path or name.startswith(path + ".")]
    return max(found, key=len, default=None)
