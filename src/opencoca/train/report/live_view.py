"""What a run shows while it goes: a bar with two lines of figures in a terminal, a line now and then in a log file."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

from opencoca.train.report.metrics_log import followed


class LiveView:
    """``with LiveView(total_steps, done_steps) as view``: advance it by every step, show it every line of the log."""

    def __init__(self, total_steps: int, done_steps: int = 0, hidden: bool = False, stream: TextIO | None = None):
        """hidden: shows nothing (of several processes, one is seen). stream: by default, stderr."""
        self.total_steps, self.done_steps, self.hidden = total_steps, done_steps, hidden
        self.stream = stream or sys.stderr
        self._lines: list[tqdm] = []
        self._first_step = done_steps

    def __enter__(self) -> "LiveView":
        self._began = time.monotonic()
        if not self.hidden and self.stream.isatty():
            bar = tqdm(
                total=self.total_steps,
                initial=self.done_steps,
                desc="training",
                unit="step",
                file=self.stream,
                dynamic_ncols=True,
                position=0,
            )
            self._lines = [bar] + [
                tqdm(total=0, bar_format="{desc}", file=self.stream, dynamic_ncols=True, position=1 + number)
                for number in range(2)
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for line in reversed(self._lines):
            line.close()

    def advance(self) -> None:
        """Counts one step more."""
        self.done_steps += 1
        if self._lines:
            self._lines[0].update()

    def show(self, line: dict[str, float]) -> None:
        """Shows a line that the metrics log has of training."""
        if self.hidden:
            return
        learning, working = learning_figures(line), working_figures(line)
        if self._lines:
            for shown, text in zip(self._lines[1:], (learning, working), strict=True):
                shown.set_description_str("  " + text)
            return
        done = 100 * self.done_steps / max(1, self.total_steps)
        left = f"  {duration(self._seconds_left())} left" if self.done_steps < self.total_steps else ""
        print(
            f"step {self.done_steps}/{self.total_steps} ({done:.0f}%)  {learning}  {working}{left}",
            file=self.stream,
            flush=True,
        )

    def write(self, text: str) -> None:
        """Prints a line that stays, above the bar if there is one."""
        if self.hidden:
            return
        if self._lines:
            tqdm.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)

    def _seconds_left(self) -> float:
        done = self.done_steps - self._first_step
        return (time.monotonic() - self._began) / max(1, done) * (self.total_steps - self.done_steps)


def learning_figures(line: dict[str, float]) -> str:
    """Loss and its terms, gradient norm, what the task follows beside them, learning rate."""
    parts = [f"{name.removesuffix('_loss')} {value:.3f}" for name, value in line.items() if name.endswith("_loss")]
    loss = f"loss {line['loss']:.3f}" + (f" ({', '.join(parts)})" if parts else "")
    rest = "".join(f"  {name.replace('_', ' ')} {value:.1f}" for name, value in followed(line).items())
    return f"{loss}  grad norm {line['grad_norm']:.2f}{rest}  lr {line['lr']:.2e}"


def working_figures(line: dict[str, float]) -> str:
    """Images and tokens a second, utilisation, memory, share of time that steps wait for data: what the line has."""
    rates = {"images": line.get("images_per_sec"), "tokens": line.get("tokens_per_sec")}
    figures = [f"{_short(rate)} {name}/s" for name, rate in rates.items() if rate]
    if "model_flops_utilisation" in line:
        figures.append(f"MFU {100 * line['model_flops_utilisation']:.2g}%")
    if "memory_bytes" in line:
        figures.append(f"memory {line['memory_bytes'] / 1e9:.1f} GB")
    if line.get("step_ms"):
        figures.append(f"data wait {100 * line['data_wait_ms'] / line['step_ms']:.0f}%")
    return "  ".join(figures)


def duration(seconds: float) -> str:
    """A duration in the largest unit that fits, to two figures."""
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _short(value: float) -> str:
    return f"{value / 1e3:,.1f}k" if value >= 10_000 else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
