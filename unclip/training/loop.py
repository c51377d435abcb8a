"""The one training loop: evaluate, save, next batch, step, log the step before.

The last state is saved before it is evaluated.
"""

import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from unclip import errors
from unclip.files import images
from unclip.runtime import collectives, distributed, flops, progress, sharding
from unclip.runtime.checkpoint import Checkpointer
from unclip.runtime.writer import MetricWriter
from unclip.training.evaluators.passes import Evaluator
from unclip.training.plan import Plan
from unclip.training.spikes import SpikeGuard


class Loop:
    """Carries a plan's step from the state it is given to `total_steps`.

    Args:
      plan: what is trained; frozen: its task's frozen trees, on the mesh.
      folder: the workdir.
      saver, writer: of checkpoints and of metrics; batches: the input, see `data.batches`.
      evaluators: in the order they run.
      fingerprint: of the training collection, kept with every checkpoint.
      needed_flops: operations of a step; None leaves the utilisation out.
    """

    def __init__(
        self,
        plan: Plan,
        frozen: Any,
        folder: pathlib.Path,
        saver: Checkpointer,
        writer: MetricWriter,
        batches: Any,
        evaluators: Sequence[Evaluator],
        *,
        fingerprint: str,
        needed_flops: float | None = None,
    ):
        self.plan, self.config, self.frozen, self.folder = plan, plan.config, frozen, folder
        self.saver, self.writer, self.batches = saver, writer, batches
        self.evaluators, self.fingerprint, self.needed_flops = evaluators, fingerprint, needed_flops
        self.measured = set()  # (step, evaluator's prefix): what need not be measured again
        self.skipped = 0  # consecutive steps
        self.guard, self.spike = SpikeGuard(self.config.spike_factor), ""
        self.best = {}  # {"metric", "value", "step"} of the step that is kept as the best
        self.pending = None  # (step, metrics on the device) of the step before
        self.loss = "?"
        self.clock, self.clock_step, self.paused = time.perf_counter(), None, 0.0

    def run(self, step_fn: Callable, state: dict, first: int) -> dict:
        """The state after the last step.

        Args:
          step_fn: jitted, from `Plan.make_step`; first: the step that `state` is at. After a
            resume, `recall` it before.

        Raises:
          Stopped: asked to stop; the state is saved. NumericsError: too many steps skipped.
          DataError: the input failed, or the disk.
        """
        config = self.config
        bar = progress.progress(config.total_steps, config.stage, initial=first)
        compiled, self.best = None, self.saver.about("best")
        try:
            with bar:
                for step in range(first, config.total_steps):
                    self.evaluate(state, step)
                    self.save(state, step)
                    if distributed.should_stop(step):
                        self.stop(state, step)
                    rows = self.next_batch(state, step)
                    if compiled is None:
                        compiled = self.compile(step_fn, state, step)
                    # A transfer that nobody asked for would make the device wait for the host.
                    with (
                        jax.profiler.StepTraceAnnotation("train", step_num=step),
                        jax.transfer_guard("disallow"),
                    ):
                        batch = sharding.put_batch(rows, self.plan.mesh)
                        state, measured = compiled(state, self.frozen, batch)
                        self.log_pending()
                    self.pending = (step + 1, measured)
                    bar.update(1, loss=self.loss)
                self.log_pending()
                if config.total_steps >= first:  # a run that is over may lack its last evaluations
                    # What all steps were for is on disk before a measurement can fail.
                    self.save(state, config.total_steps, force=True)
                    self.saver.wait()
                    if not (self.skipped or self.spike):
                        self.saver.trust(config.total_steps)
                    if not self.evaluate(state, config.total_steps):
                        self.stop(state, config.total_steps)
        finally:
            self.list_bad()
        return state

    def next_batch(self, state, step):
        """The next batch; if the input fails, what was learned so far is saved first."""
        try:
            return next(self.batches)
        except errors.DataError:
            if distributed.process_count() == 1 and step:  # others may be well, and not save along
                self.log_pending()
                self.save(state, step, force=True)
                self.saver.wait()
            raise

    def stop(self, state, step):
        """Saves and leaves; an evaluation of this step that was cut short is done on resuming."""
        self.log_pending()
        self.save(state, step, force=True)
        self.saver.wait()
        saved = (
            f"saved step {step}"
            if self.saver.latest() == step
            else (f"the newest saved step is {self.saver.latest()}")
        )
        raise errors.Stopped(
            f"asked to stop: {saved} of {self.config.total_steps}; the same command resumes"
        )

    def compile(self, step_fn, state, step):
        """The step's executable; notes how long compiling took."""
        start = time.perf_counter()
        compiled = step_fn.lower(state, self.frozen, self.plan.batch_shapes()).compile()
        seconds = time.perf_counter() - start
        self.writer.scalars(step, {"compile_seconds": seconds})
        self.clock, self.paused = time.perf_counter(), 0.0
        return compiled

    def recall(self, first):
        """Notes what metrics.jsonl already says of the step a run resumes from.

        A save follows the evaluations of its step, but a stop cuts them short, and those of the
        last step come after its save: the ones that left no line are due again.
        """
        if first == 0 or not self.evaluators:
            return
        names = self.writer.restored_names
        done = np.array([any(n.startswith(f"{e.prefix}/") for n in names) for e in self.evaluators])
        # Process 0, which writes the file, knows.
        done = collectives.gather_rows(done)[: len(done)]
        self.measured = {(first, e.prefix) for e, was in zip(self.evaluators, done) if was}

    def due(self, step) -> list[Evaluator]:
        """The evaluators whose interval ends at a step, without those that measured it already."""
        config, found = self.config, []
        for evaluator in self.evaluators:
            every = config[f"{evaluator.interval}_steps"]
            due = step == config.total_steps or (step and every and step % every == 0)
            if due and (step, evaluator.prefix) not in self.measured:
                found.append(evaluator)
        return found

    def evaluate(self, state, step) -> bool:
        """Runs the evaluators due at a step; False where a request to stop left some undone."""
        config = self.config
        pause = time.perf_counter()
        for evaluator in self.due(step):
            if distributed.should_stop(step):
                return False
            # All or nothing: an evaluator that is interrupted gives no figures.
            results = list(evaluator.run(state, step))
            if not results and distributed.should_stop(step):
                return False
            found = {}
            for name, value in results:
                if isinstance(value, np.ndarray):
                    self.writer.images(step, name, value)
                    if distributed.is_main():
                        path = self.folder / "samples" / f"{step:07d}-{name}.png"
                        images.write_png(path, value, {"step": step, "stage": config.stage})
                else:
                    found[name] = value
            if found:
                self.writer.scalars(step, found)
                self.compare(step, found)
        self.paused += time.perf_counter() - pause
        return True

    def compare(self, step, found):
        """Notes whether a step is the best so far by the metric of `config.keep_best`."""
        order, _, metric = self.config.keep_best.partition(" ")
        value = found.get(metric) if order else None
        if value is None or not np.isfinite(value):
            return
        sign = 1 if order == "lowest" else -1
        known = self.best.get("metric") == metric
        if not known or sign * float(value) < sign * self.best["value"]:
            self.best = {"metric": metric, "value": float(value), "step": step}

    def save(self, state, step, force=False):
        """Saves the state and the input's position where a save is due.

        Nothing is saved while steps are skipped: the state is the one that makes them fail.
        """
        best = self.best.get("step") == step
        if not (force or best or self.saver.due(step)):
            return
        self.log_pending()  # a kill right after the save must not lose this step's line
        if self.skipped:
            return
        pause = time.perf_counter()
        meta = {
            "stage": self.config.stage, "preset": self.config.preset, "data": self.fingerprint,
            "skip_examples": self.config.skip_examples,
        }  # fmt: skip
        position = self.batches.position
        saved = self.saver.save(step, state, position, meta, force=force or best, trusted=False)
        if best and saved:
            self.saver.name("best", step, self.best)
        self.paused += time.perf_counter() - pause

    def log_pending(self):
        """Fetches the previous step's metrics, which by now are computed, and judges them."""
        if self.pending is None:
            return
        step, measured = self.pending
        self.pending = None
        measured = {name: float(value) for name, value in jax.device_get(measured).items()}
        self.judge(step, measured)
        if self.clock_step is None:  # the first step after compiling also fills caches
            self.clock, self.clock_step, self.paused = time.perf_counter(), step, 0.0
        if step % self.config.log_steps and step != self.config.total_steps:
            return
        seconds = time.perf_counter() - self.clock - self.paused
        steps = step - self.clock_step
        if steps > 0:
            measured["images_per_second"] = steps * self.config.batch_size / seconds
            used = flops.utilisation(self.needed_flops, seconds / steps, jax.devices())
            if used is not None:
                measured["flop_utilisation"] = used
        counters = self.batches.counters().items()
        measured |= {f"input/{name}": count for name, count in counters if count}
        self.list_bad()
        self.writer.scalars(step, measured)
        self.loss = f"{measured['loss']:.4g}"
        self.clock, self.clock_step, self.paused = time.perf_counter(), step, 0.0

    def judge(self, step, measured):
        """Trusts the state before a step whose loss was sound, and ends a run that is lost."""
        config = self.config
        self.skipped = self.skipped + 1 if measured["skipped"] else 0
        if not self.skipped:
            spike = self.guard.see(measured["loss"], measured["grad_norm"])
            if spike and not self.spike:
                kept = self.saver.name_trusted("before_spike")
                logging.warning(
                    "step %d: %s. Until it is back nothing is deleted%s. To go back there: stop, "
                    "move the newer steps away, and start again with a lower "
                    "--config.optim.learning_rate or --config.skip_examples=%d",
                    step, spike, "" if kept is None else f", and step {kept} is kept",
                    self.examples_since(kept, step),
                )  # fmt: skip
            self.spike = spike
            if not spike:  # the loss was that of the state before the step
                self.saver.trust(step - 1)
            return
        if self.skipped < config.max_skipped_steps:
            return
        self.writer.scalars(step, measured)
        latest = self.saver.distrust()
        saved = "there is no checkpoint yet"
        if latest is not None:
            saved = (
                f"the last good state is {self.saver.directory / str(latest)}, from which the same "
                "command goes on: with a lower --config.optim.learning_rate, or without the "
                f"samples since, --config.skip_examples={self.examples_since(latest, step)}"
            )
        raise errors.NumericsError(
            f"{self.skipped} steps in a row up to step {step} had a loss or gradient that is "
            f"not finite; {saved}"
        )

    def examples_since(self, saved, step):
        """What `config.skip_examples` is to be to leave out the samples since a saved step."""
        return self.config.skip_examples + (step - (saved or 0)) * self.config.batch_size

    def list_bad(self):
        """Appends the samples that could not be used to a file of this process."""
        found = self.batches.drain_bad()
        if found:
            path = self.folder / f"bad_samples-{distributed.process_index():05d}.jsonl"
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
