"""A plan in words and tables, for a terminal."""

from collections.abc import Iterable, Sequence

from opencoca.plan.forecast import Plan

_NAMES = {
    "image_encoder": "image encoder",
    "image_pooling": "poolers",
    "poolers": "poolers",
    "unimodal_decoder": "unimodal decoder",
    "unimodal": "unimodal decoder",
    "multimodal_decoder": "multimodal decoder",
    "multimodal": "multimodal decoder",
    "heads": "projections, vocabulary head",
    "vocabulary_loss": "vocabulary loss",
    "contrastive_loss": "contrastive loss",
    "linear_branch": "linear branch",
    "task_head": "task head",
}


def describe(plan: Plan) -> str:
    """All of the plan."""
    sections = [
        _heading(plan),
        _parameters(plan),
        _flops(plan),
        _memory(plan),
        _strategies(plan),
        _communication(plan),
        _time(plan),
        _verdict(plan),
    ]
    return "\n\n".join(section for section in sections if section)


def _heading(plan: Plan) -> str:
    shape, cluster = plan.shape, plan.cluster
    batch = f"{shape.images:,} images and {shape.texts:,} texts a device in a micro-batch"
    if shape.sub_images != shape.images:
        batch += f", {shape.sub_images:,} images at a time (GradCache)"
    spread = plan.strategy + (f" over {plan.shard_size}" if plan.strategy == "fsdp" else "")
    return (
        f"{plan.model_name} on {cluster.devices:,} x {plan.device.name} ({plan.device.source}), {spread}\n"
        f"{batch}, {plan.mean_words:.1f} words a text"
    )


def _parameters(plan: Plan) -> str:
    total = sum(plan.parameters.values())
    rows = [(_NAMES.get(name, name), f"{count / 1e6:,.1f} M") for name, count in plan.parameters.items() if count]
    return _table("parameters", [*rows, ("all", f"{total / 1e6:,.1f} M"), ("trained", _millions(plan))])


def _millions(plan: Plan) -> str:
    return f"{plan.trained_parameters / 1e6:,.1f} M"


def _flops(plan: Plan) -> str:
    total = plan.flops.total
    rows = [
        (_NAMES[name], f"{value / 1e12:,.2f} TFLOP", f"{100 * value / total:.1f} %")
        for name, value in plan.flops._asdict().items()
        if value
    ]
    rows.append(("all", f"{total / 1e12:,.2f} TFLOP", ""))
    if plan.recomputed_flops:
        rows.append(("done again to save memory", f"{plan.recomputed_flops / 1e12:,.2f} TFLOP", ""))
    return _table("work of a step, all devices, forward and backward", rows)


def _memory(plan: Plan) -> str:
    memory = plan.chosen
    rows = [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer state", memory.optimizer),
        ("averaged weights", memory.average),
        *((f"activations, {_NAMES.get(part, part)}", size) for part, size in memory.activations.items()),
        ("weights, cast or gathered", memory.weight_copies),
        ("logits in work, and their gradients", memory.logits),
        ("embeddings of all devices, similarities", memory.gathered),
        ("images", memory.inputs),
        ("a block's gradients in work", memory.working),
        ("Python and PyTorch, gaps between tensors", memory.process),
    ]
    shown = [(name, _gib(size)) for name, size in rows if size]
    title = f"memory of a device ({memory.strategy}, recompute {memory.recompute}); not all of it at the same time"
    return _table(title, [*shown, (f"most, at {memory.moment}", _gib(memory.peak_bytes))])


def _strategies(plan: Plan) -> str:
    rows = [
        (
            memory.strategy,
            memory.recompute,
            _gib(sum(memory.activations.values())),
            _gib(memory.peak_bytes),
            "fits" if memory.peak_bytes <= plan.usable_bytes else "does not fit",
        )
        for memory in plan.memory
    ]
    title = f"memory by strategy and compute.recompute; {_gib(plan.usable_bytes).strip()} are usable"
    return _table(title, [("strategy", "recompute", "activations", "most", ""), *rows])


def _communication(plan: Plan) -> str:
    rows = [
        (message.name, f"{message.sent_bytes / 1e9:,.2f} GB sent", f"{message.seconds:,.3f} s")
        for message in plan.exchanges
    ]
    return _table("communication of a device in a step, each by itself", rows) if rows else ""


def _time(plan: Plan) -> str:
    low, high = plan.step_seconds
    share = f"{100 * plan.cluster.utilisation:.0f} %"
    rows = [
        (f"work at {share} of the device's peak", f"{plan.compute_seconds:,.3f} s"),
        ("a step, communication hidden behind work", f"{low:,.3f} s"),
    ]
    if high > low:
        rows.append(("a step, communication not hidden", f"{high:,.3f} s"))
    if plan.steps is not None:
        days = plan.days
        assert days is not None
        shown = " to ".join(dict.fromkeys(map(_days, days)))
        rows.append((f"{plan.steps:,} steps", shown))
    note = "" if plan.steps is not None else "\n  how long in all: give --images N (of an epoch), or max_steps"
    return _table("time", rows) + note


def _days(days: float) -> str:
    return f"{days:,.1f} days" if days >= 1 else f"{24 * days:,.1f} hours"


def _verdict(plan: Plan) -> str:
    if plan.fits:
        free = plan.usable_bytes - plan.chosen.peak_bytes
        return f"It fits; {free / 2**30:.1f} GiB of the usable memory stay free."
    remedy = f"\nremedy: {plan.remedy}" if plan.remedy else ""
    return "\n".join(f"It does not fit: {problem}." for problem in plan.problems) + remedy


def _gib(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB"


def _table(title: str, rows: Iterable[Sequence[str]]) -> str:
    rows = [tuple(row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([title, *(line.rstrip() for line in lines)])
