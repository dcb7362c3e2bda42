"""What each way to compute something faster on a processor gains against plain PyTorch, forward and backward.

Both ways of a pair run in turn in one process, many times, and the fastest run of each counts: what else the machine
does makes runs slower, never faster. Shapes are those of training: open_clip's coca_ViT-B-32 with 16 images, and the
shipped model with 96 images and 5 captions each.

    OMP_NUM_THREADS=1 python benchmarks/attention_forms.py --out results/attention_forms.json
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import machine, report
from torch import Tensor, nn

from opencoca.model.kernels.choice import projects_words
from opencoca.model.kernels.dense_attention import DenseAttention
from opencoca.model.kernels.dropout import Dropout
from opencoca.model.kernels.image_attention import SharedImages, attend_to_images
from opencoca.model.kernels.linear import Linear, activate_and_project, pack_weights
from opencoca.model.kernels.packed_attention import PackedSelfAttention, packed_cross_attention
from opencoca.model.layers.layout import TextLayout
from opencoca.plan.planner import likely_lengths

Run = Callable[[], object]


@dataclass(frozen=True)
class Shapes:
    """The sizes of one model's training step."""

    images: int
    texts: int
    context_length: int
    width: int
    num_heads: int
    head_dim: int
    image_tokens: int
    context_width: int
    pooler: tuple[int, int, int]  # heads, queries, features; of queries 1 that of the contrastive pooler
    image_encoder: tuple[int, int] | None  # heads, features


SHAPES = {
    "B-32, batch 16": Shapes(16, 16, 76, 512, 8, 64, 255, 512, (8, 256, 50), (12, 50)),
    "shipped, batch 96": Shapes(96, 480, 40, 384, 6, 64, 81, 384, (6, 1, 81), None),
}


@dataclass(frozen=True)
class Pair:
    """One thing computed in two ways; plain: what PyTorch offers."""

    name: str
    plain: Run
    form: Run


def step(function: Callable[[], Tensor], leaves: list[Tensor]) -> Run:
    """Forward and backward through leaves."""

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        out = function()
        out.backward(torch.ones_like(out))

    return run


def fused(queries: Tensor, keys: Tensor, values: Tensor, causal: bool = False) -> Tensor:
    return F.scaled_dot_product_attention(queries, keys, values, is_causal=causal)


def dense_pairs(shapes: Shapes, dtype: torch.dtype) -> Iterator[Pair]:
    def pair(name: str, heads: int, num_queries: int, num_keys: int) -> Pair:
        leaves = [
            torch.randn(shapes.images, heads, length, shapes.head_dim).to(dtype).requires_grad_()
            for length in (num_queries, num_keys, num_keys)
        ]
        return Pair(name, step(lambda: fused(*leaves), leaves), step(lambda: DenseAttention.apply(*leaves), leaves))

    if shapes.image_encoder is not None:
        heads, features = shapes.image_encoder
        yield pair("attention written out: image encoder", heads, features, features)
    yield pair("attention written out: pooler", *shapes.pooler)


def text_pairs(shapes: Shapes, dtype: torch.dtype) -> Iterator[Pair]:
    lengths = likely_lengths(shapes.texts, 14, shapes.context_length)
    layout = TextLayout.of(lengths)
    words, heads, head_dim = int(lengths.sum()), shapes.num_heads, shapes.head_dim
    queries = torch.randn(words, heads, head_dim).to(dtype).requires_grad_()
    own = torch.randn(words, 2, heads, head_dim).to(dtype).requires_grad_()

    def plain_self() -> Tensor:
        (padded,) = layout.pad_heads(queries.flatten(1), 1, head_dim)
        keys, values = layout.pad_heads(own.flatten(1), 2, head_dim)
        return layout.pack_heads(fused(padded, keys, values, causal=True))

    def packed_self() -> Tensor:
        return PackedSelfAttention.apply(queries, own, layout.buckets, None).flatten(1)

    yield Pair("attention over packed words", step(plain_self, [queries, own]), step(packed_self, [queries, own]))

    group = shapes.texts // shapes.images
    context = torch.randn(shapes.images, shapes.image_tokens, 2, heads, head_dim).to(dtype).requires_grad_()

    def plain_cross() -> Tensor:
        keys, values = context.permute(2, 0, 3, 1, 4)
        (padded,) = layout.pad_heads(queries.flatten(1), 1, head_dim, group)
        return layout.pack_heads(fused(padded, keys, values), group)

    def packed_cross() -> Tensor:
        keys, values = context.permute(2, 0, 3, 1, 4)
        return packed_cross_attention(queries, keys, values, layout.image_buckets(group)).flatten(1)

    yield Pair(
        "cross-attention of packed words", step(plain_cross, [queries, context]), step(packed_cross, [queries, context])
    )

    kv_proj, norm = nn.Linear(shapes.context_width, 2 * heads * head_dim).to(dtype), nn.Identity()
    tokens = torch.randn(shapes.images, shapes.image_tokens, shapes.context_width).to(dtype).requires_grad_()
    leaves = [queries, tokens, kv_proj.weight]

    def plain_images() -> Tensor:
        keys, values = kv_proj(tokens).unflatten(-1, (2, heads, head_dim)).permute(2, 0, 3, 1, 4)
        (padded,) = layout.pad_heads(queries.flatten(1), 1, head_dim, group)
        return layout.pack_heads(fused(padded, keys, values), group)

    def shared_images() -> Tensor:
        images = SharedImages.of(tokens, layout.lengths.view(-1, group).sum(dim=1), heads, norm)
        return attend_to_images(queries, images, kv_proj, norm, heads).flatten(1)

    words_per_image = words / shapes.images
    if projects_words(words_per_image, shapes.image_tokens, heads, head_dim, kv_proj):
        yield Pair("words projected, not the image", step(plain_images, leaves), step(shared_images, leaves))


def product_pairs(shapes: Shapes, dtype: torch.dtype) -> Iterator[Pair]:
    words, width = 14 * shapes.texts, shapes.width
    up, down = Linear(width, 4 * width).to(dtype), Linear(4 * width, width).to(dtype)
    x = torch.randn(words, width).to(dtype).requires_grad_()
    leaves = [x, up.weight, down.weight]
    yield Pair(
        "activation made again for the gradient",
        step(lambda: F.linear(F.gelu(F.linear(x, up.weight, up.bias)), down.weight, down.bias), leaves),
        step(lambda: activate_and_project(F.linear(x, up.weight, up.bias), F.gelu, down), leaves),
    )
    residual, dropout = torch.randn(words, width).to(dtype).requires_grad_(), Dropout(0.2)
    yield Pair(
        "dropout by bytes",
        step(lambda: residual + F.dropout(x, 0.2), [x, residual]),
        step(lambda: dropout(x, residual), [x, residual]),
    )
    few = torch.randn(8, width).to(dtype)
    packed_up, packed_down = Linear(width, 4 * width).to(dtype), Linear(4 * width, width).to(dtype)
    held = pack_weights(packed_up, packed_down)

    def without_gradient(function: Callable[[], Tensor]) -> Run:
        def run() -> None:
            with torch.inference_mode():
                function()

        return run

    yield Pair(
        "packed weights, 8 rows",
        without_gradient(lambda: F.linear(F.gelu(F.linear(few, up.weight, up.bias)), down.weight, down.bias)),
        without_gradient(lambda: packed_down(F.gelu(packed_up(few)))),
    )
    del held


def fastest(pair: Pair, seconds: float) -> tuple[float, float]:
    """The least time of a call of either way, of all calls, in turn, that fit the time."""
    runs, least = (pair.plain, pair.form), [float("inf"), float("inf")]
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < 5:
        for index in (0, 1) if rounds % 2 else (1, 0):
            start = time.perf_counter()
            runs[index]()
            least[index] = min(least[index], time.perf_counter() - start)
        rounds += 1
    return least[0], least[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="for each pair")
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # Without instructions for it, products in bfloat16 take a hundred times as long, whatever the form.
    has_bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    dtypes = (torch.float32, torch.bfloat16) if has_bf16 else (torch.float32,)
    rows = []
    for label, shapes in SHAPES.items():
        for dtype in dtypes:
            for pairs in (dense_pairs, text_pairs, product_pairs):
                for pair in pairs(shapes, dtype):
                    plain, form = fastest(pair, arguments.seconds)
                    gain = plain / form
                    rows.append(
                        {
                            "form": pair.name,
                            "shapes": label,
                            "dtype": str(dtype).removeprefix("torch."),
                            "plain_ms": round(1e3 * plain, 3),
                            "form_ms": round(1e3 * form, 3),
                            "gain": round(gain, 2),
                        }
                    )
                    print(rows[-1], flush=True)
    report({"machine": machine(), "threads": torch.get_num_threads(), "rows": rows}, arguments.out)


if __name__ == "__main__":
    main()
