"""A training run from recipe to report: loops over steps, validates, keeps checkpoints, survives interruption.

What it is made of is prepared in setup.py; what a step computes is in step.py and gradient.py; where batches come from,
in batches.py; what is scored, in validation.py; what is kept to continue from, in checkpoints/, and as the run's model,
in best_model.py. Of several processes all run this loop and score their share; the main one writes and prints.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from opencoca.data import Batch
from opencoca.distributed.world import World
from opencoca.model.coca import CoCa
from opencoca.system.allocator import release_freed_memory
from opencoca.system.files import WriteError
from opencoca.system.notice import Notice
from opencoca.train.best_model import BestModel
from opencoca.train.checkpoints import Checkpoints, TrainState
from opencoca.train.checkpoints.random_state import random_state, seed_generators, set_random_state
from opencoca.train.flops import Throughput
from opencoca.train.optim.optimizer import MakeOptimizer, WeightAverage, build_optimizer
from opencoca.train.parallel import ParallelModel
from opencoca.train.recipe.recipe import Recipe
from opencoca.train.report.live_view import LiveView
from opencoca.train.report.metrics_log import MetricsLog, MetricsWindow
from opencoca.train.report.report import write_report
from opencoca.train.run_folder import RunFolder
from opencoca.train.setup import RunSetup
from opencoca.train.step import NonFiniteLossError, TrainStep
from opencoca.train.survival.bad_steps import SpikeRule, too_many_non_finite
from opencoca.train.survival.stop_signal import StopSignal
from opencoca.train.survival.watchdog import Watchdog, is_restartable
from opencoca.train.validation import ValidationScores, headline, shared_scores

_RELEASE_EVERY_STEPS = 20


class TrainingInterrupted(Exception):
    """The run was asked to stop and saved its state; running the same command again continues it."""


class Trainer:
    """``Trainer(recipe).run()`` trains, or continues what an earlier call began in the same folder."""

    def __init__(
        self,
        recipe: Recipe,
        world: World | None = None,
        make_optimizer: MakeOptimizer = build_optimizer,
        continue_with: Sequence[str] = (),
    ):
        """Prepares the run, or what continues it.

        Args:
            world: the processes that train together; by default this one alone.
            make_optimizer: makes the optimizer.
            continue_with: keys of the recipe in which it may differ from what the run began with; see `train`.
        """
        self.world = world or World()
        self.folder = Path(recipe.output)
        self.run_folder = RunFolder(self.folder)
        self.checkpoints = Checkpoints(self.folder, recipe.checkpoint, self.world)
        setup = self._set_up(recipe, continue_with)
        self.recipe = recipe = setup.recipe
        self.task, self.device = setup.task, setup.device
        self.model, self.frozen_stages = setup.model, setup.frozen_stages
        self.batches, self.train_source = setup.batches, setup.train_source
        self.validator, self.val_source = setup.validator, setup.val_source
        self.best = BestModel(recipe, self.task, self.folder, setup.tokenizer, setup.preprocess)
        self.parallel = ParallelModel(self.model, self.device, recipe, self.world, self.task)
        self.average = WeightAverage(self.model, recipe.optimizer.ema_decay) if recipe.optimizer.ema_decay else None
        self.total_steps, self.data = setup.total_steps, setup.data
        progress = {"step": 0, "best": None, "best_step": 0, "seconds": 0.0, "window": {}}
        self.state = TrainState(self.model, make_optimizer(self.model, recipe), self.average, progress)
        self.step = TrainStep(self.model, self.state.optimizer, self.average, recipe, self.parallel)
        self.throughput = Throughput(self.model.config, recipe, self.task, self.device, self.world.size)
        self.spikes = SpikeRule(recipe, progress)
        self.stop = StopSignal()
        limit_s, exits = 60 * recipe.safety.hang_minutes, is_restartable()
        self.watchdog = Watchdog(self.folder / "stacks", self.world, limit_s, exits)

    def _set_up(self, recipe: Recipe, continue_with: Sequence[str]) -> RunSetup:
        continues = self.checkpoints.exist()
        self.world.on_main(lambda: self.run_folder.check(continues))
        try:
            return self.world.together(
                lambda: RunSetup(recipe, self.run_folder, self.checkpoints, self.world, continue_with)
            )
        except BaseException:
            self.run_folder.leave()
            raise

    def run(self) -> Path:
        """Trains to the end; returns the folder, which is then a model folder with the best weights.

        Raises TrainingInterrupted after Ctrl-C or SIGTERM (the state is saved), NonFiniteLossError, ValueError if no
        checkpoint can be continued from, and OSError if something cannot be written (what was there before stays).
        """
        try:
            return self._run()
        finally:
            self.run_folder.leave()

    def _run(self) -> Path:
        seed_generators(self.recipe.seed, self.world.rank)
        self.world.together(lambda: self.checkpoints.resume(self.state))
        self._compare_like_with_like()
        log = None
        if self.world.is_main:
            patient = self.recipe.checkpoint.when_unwritable == "continue"
            path, done = self.folder / "metrics.jsonl", self.state.progress["step"]
            log = MetricsLog(path, done, self.recipe.tensorboard, patient)
        try:
            with self.stop, self.watchdog:
                self._loop(log)
                self._complete_saves(must_succeed=True)
                return self._finish()
        except Exception:
            self.checkpoints.close()
            raise
        finally:
            if log is not None:
                log.close()

    def _compare_like_with_like(self) -> None:
        """Forgets which weights are the best if they were scored on other samples, or by another score."""
        validation = self.data.validation
        scored_by = f"{validation.digest if validation else 'nothing'} {getattr(self.recipe.task, 'select_by', '')}"
        if self.state.progress.setdefault("scored_by", scored_by) != scored_by:
            self.state.progress |= {"best": None, "scored_by": scored_by}

    def _loop(self, log: MetricsLog | None) -> None:
        progress = self.state.progress
        supply = self.batches.iterate(progress["step"])
        window = MetricsWindow(progress.get("window"))
        self._set_train_mode()
        saved = time.monotonic()
        owes = progress.get("owes_validation", False)
        hidden = not self.world.is_main
        with LiveView(self.total_steps, progress["step"], hidden) as bar:
            while owes or progress["step"] < self.total_steps:
                if owes:
                    validated = self._validate(log, bar)
                else:
                    validated = self._advance(supply, window, log) and self._report_step(log, window, bar)
                self.watchdog.alive(progress["step"])
                now = time.monotonic()
                # Signals, clocks and disks differ from process to process; they save and stop at the same step.
                every = self.recipe.checkpoint.every_steps
                is_due = now - saved > 60 * self.recipe.checkpoint_minutes
                is_due = is_due or (every is not None and progress["step"] % every == 0)
                stop, is_due, owes, failed = self.world.any(
                    self.stop.asked, is_due, progress.get("owes_validation", False), self.checkpoints.has_failed
                )
                if failed:
                    self._complete_saves()
                if validated or stop or is_due:
                    progress |= {"seconds": progress["seconds"] + now - saved, "window": window.state()}
                    saved = now
                    self._save()
                if stop and (owes or progress["step"] < self.total_steps):
                    self._complete_saves(must_succeed=True)
                    where = f"step {progress['step']} of {self.total_steps}"
                    raise TrainingInterrupted(f"stopped after {where}; the same command continues from there")

    def _save(self) -> None:
        self._complete_saves()
        self.checkpoints.save(self.state)
        if not self.recipe.checkpoint.in_background:
            self._complete_saves()

    def _complete_saves(self, must_succeed: bool = False) -> None:
        """Waits for the save under way; its error is a warning if the recipe says so, unless it must succeed."""
        if must_succeed or self.recipe.checkpoint.when_unwritable == "stop":
            self.world.together(self.checkpoints.finish)
            return
        try:
            self.checkpoints.finish()
        except WriteError as error:  # in all processes alike
            if self.world.is_main:
                warnings.warn(f"{error}; training continues without this checkpoint", Notice, stacklevel=2)

    def _advance(self, supply: Iterator[Batch], window: MetricsWindow, log: MetricsLog | None) -> bool:
        """Takes one step; returns False if it could not, because the signal to stop ended the worker processes too."""
        began = time.monotonic()
        batch = None
        try:
            batch = next(supply)
        except RuntimeError:
            if not self.stop.asked:
                raise
        if any(self.world.any(batch is None)):
            return False
        assert batch is not None
        waited = time.monotonic() - began
        progress, limit = self.state.progress, self.spikes.limit()
        try:
            metrics = self.step(batch, progress["step"], self.total_steps, limit)
        except NonFiniteLossError as error:
            self._survive(error, log)
        else:
            self.spikes.add(metrics.grad_norm)
            if metrics.skipped:
                self._log_event(log, "spike", grad_norm=metrics.grad_norm, limit=limit)
            if self.world.is_main:
                seconds, flops = time.monotonic() - began, self.throughput.flops(batch)
                window.add(metrics, waited, seconds, flops)
        progress["step"] += 1
        if self.device.type == "cpu" and progress["step"] % _RELEASE_EVERY_STEPS == 0:
            release_freed_memory()
        return True

    def _survive(self, error: NonFiniteLossError, log: MetricsLog | None) -> None:
        """Handles a step that changed nothing: leaves it out, goes back to the last checkpoint, or raises the error."""
        policy = self.recipe.safety.non_finite
        if policy == "stop":
            raise error
        if too_many_non_finite(self.recipe, self.state.progress):
            count = len(self.state.progress["non_finite_steps"])
            raise NonFiniteLossError(
                f"{error} It was number {count} in 1000 steps (safety.non_finite_limit)."
            ) from error
        back_to = None
        if policy == "roll_back":
            self._complete_saves()
            # The data go on: going back over the same steps would end the same way.
            back_to = self.world.together(lambda: self.checkpoints.resume(self.state, with_progress=False))
            if back_to is None:
                raise NonFiniteLossError(f"{error} There is no checkpoint yet to go back to.") from error
        self._log_event(log, "non_finite", **({} if back_to is None else {"weights_of_step": back_to}))

    def _log_event(self, log: MetricsLog | None, name: str, **values: float) -> None:
        counts = self.state.progress.setdefault("events", {})
        counts[name] = counts.get(name, 0) + 1
        if log is not None:
            log.write("event", self.state.progress["step"] + 1, {"event": name, "count": counts[name], **values})

    def _report_step(self, log: MetricsLog | None, window: MetricsWindow, bar: LiveView) -> bool:
        """Writes metrics and validates where they are due; True if it validated."""
        step = self.state.progress["step"]
        bar.advance()
        is_due = step % self.recipe.log_every_steps == 0 or step == self.total_steps
        if log is not None and is_due and not window.is_empty:
            line = self.throughput.figures(window.flops_per_sec) | window.flush() | self.task.monitors(self.model)
            log.write("train", step, line | {"epoch": self._epoch()})
            bar.show(line)
        validates = step % (self.recipe.validate_every_epochs * self.batches.steps_per_epoch) == 0
        return self._validate(log, bar) if validates or step == self.total_steps else False

    def _set_train_mode(self) -> None:
        # Dropout in what is frozen would only add noise; cached features have none either.
        self.model.train()
        self.model.structure().image_encoder.stages[: self.frozen_stages].eval()

    def _epoch(self) -> float:
        return round(self.state.progress["step"] / self.batches.steps_per_epoch, 3)

    def _validate(self, log: MetricsLog | None, bar: LiveView) -> bool:
        """Scores the averaged weights (if there are) and keeps them as the run's model if they are the best so far.

        If a signal to stop ends it, it is done when the run continues.
        """
        with self.watchdog.paused():
            if self.average is not None:
                self.average.swap()
            try:
                self._score(log, bar)
            finally:
                if self.average is not None:
                    self.average.swap()
        self._set_train_mode()
        return True

    def _score(self, log: MetricsLog | None, bar: LiveView) -> None:
        """Scores each process's share of the validation images; the main process joins the scores and keeps them."""
        progress, result, before = self.state.progress, None, random_state()
        model = self.parallel.gathered(everywhere=self.validator is not None)
        if (validator := self.validator) is not None:
            assert model is not None
            result = self.world.together(lambda: shared_scores(validator, model, self.world, self.stop.unless_asked))
        if not self.world.is_main:
            result = None
        given_up = self.world.on_main(lambda: validator is not None and result is None)
        progress["owes_validation"] = given_up
        if given_up:
            set_random_state(before)
            return
        self.world.on_main(lambda: self._keep_scores(model, result, log, bar))

    def _keep_scores(
        self, model: CoCa | None, result: ValidationScores | None, log: MetricsLog | None, bar: LiveView
    ) -> None:
        """In the main process: logs the scores, and keeps the model if it is the best so far."""
        assert model is not None
        progress = self.state.progress
        if result is not None and log is not None:
            found = result.values | {"selection": result.selection, "epoch": self._epoch()}
            log.write("validation", progress["step"], found)
            if result.shown:
                log.write("captions", progress["step"], {"epoch": self._epoch(), "captions": result.shown})
            bar.write(headline(self.task, result.values, self._epoch()))
        self.best.consider(model, result, progress)

    def _finish(self) -> Path:
        if not self.world.is_main:
            return self.folder
        minutes = self.state.progress["seconds"] / 60
        best = f"best weights: step {self.state.progress['best_step']}"
        title = f"{self.folder.name}: {self.total_steps} steps in {minutes:.0f} minutes, {best}"
        write_report(self.folder, self.val_source, title)
        return self.folder
