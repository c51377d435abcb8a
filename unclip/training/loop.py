"""The one training loop: evaluate, save, next batch, step, log the step before."""

import json
import time

import jax
import numpy as np

from unclip import errors
from unclip.files import images
from unclip.runtime import collectives, distributed, flops, sharding


class Loop:
    """The loop proper; its order is law: evaluate, save, next batch, step, log the step before."""

    def __init__(self, config, folder, saver, writer, evaluators, batches, bar, mesh):
        self.config, self.folder, self.saver, self.writer = config, folder, saver, writer
        self.evaluators, self.batches, self.bar, self.mesh = evaluators, batches, bar, mesh
        self.measured = set()  # (step, evaluator's prefix): what need not be measured again
        self.skipped = 0  # consecutive steps
        self.pending = None  # (step, metrics on the device) of the step before
        self.flops = None  # of one step
        self.data = None  # fingerprint of the collection
        self.loss = "?"
        self.clock, self.clock_step, self.paused = time.perf_counter(), None, 0.0

    def __call__(self, step_fn, state, frozen, first):
        config = self.config
        compiled = None
        self.recall(first)
        for step in range(first, config.total_steps):
            self.evaluate(state, step)
            self.save(state, step)
            if distributed.should_stop(step):
                self.stop(state, step)
            batch = sharding.put_batch(self.next_batch(state, step), self.mesh)
            if compiled is None:
                compiled = self.compile(step_fn, state, frozen, batch)
            state, measured = compiled(state, frozen, batch)
            self.log_pending()
            self.pending = (step + 1, measured)
            self.bar.update(1, loss=self.loss)
        self.log_pending()
        if config.total_steps >= first:  # a run that is over may lack its last evaluations
            if not self.evaluate(state, config.total_steps):
                self.stop(state, config.total_steps)
            self.save(state, config.total_steps, force=True)
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
        raise errors.Stopped(
            f"asked to stop: saved step {step} of {self.config.total_steps}; "
            "the same command resumes"
        )

    def compile(self, step_fn, state, frozen, batch):
        start = time.perf_counter()
        compiled = step_fn.lower(state, frozen, batch).compile()
        seconds = time.perf_counter() - start
        self.writer.scalars(int(state["step"]), {"compile_seconds": seconds})
        self.clock, self.paused = time.perf_counter(), 0.0
        return compiled

    def recall(self, first):
        """Notes what metrics.jsonl already says of the step a run resumes from.

        A save follows the evaluations of its step, but a stop cuts them short; then those that
        left no line are due again.
        """
        if first == 0 or not self.evaluators:
            return
        names = self.writer.restored_names
        done = np.array([any(n.startswith(f"{e.prefix}/") for n in names) for e in self.evaluators])
        done = collectives.gather_rows(done)[: len(done)]  # process 0, which writes the file, knows
        self.measured = {(first, e.prefix) for e, was in zip(self.evaluators, done) if was}

    def evaluate(self, state, step) -> bool:
        """Runs the evaluators due at a step; False where a request to stop left some undone."""
        config = self.config
        pause = time.perf_counter()
        for evaluator in self.evaluators:
            every = config[f"{evaluator.schedule}_steps"]
            due = step == config.total_steps or (step and every and step % every == 0)
            if not due or (step, evaluator.prefix) in self.measured:
                continue
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
        self.paused += time.perf_counter() - pause
        return True

    def save(self, state, step, force=False):
        if not (force or self.saver.due(step)):
            return
        self.log_pending()  # a kill right after the save must not lose this step's line
        pause = time.perf_counter()
        meta = {"stage": self.config.stage, "preset": self.config.preset, "data": self.data}
        self.saver.save(step, state, self.batches.position, meta, force=force)
        self.paused += time.perf_counter() - pause

    def log_pending(self):
        """Fetches the previous step's metrics, which by now are computed, and judges them."""
        if self.pending is None:
            return
        step, measured = self.pending
        self.pending = None
        measured = {name: float(value) for name, value in jax.device_get(measured).items()}
        self.skipped = self.skipped + 1 if measured["skipped"] else 0
        if self.skipped >= self.config.max_skipped_steps:
            self.writer.scalars(step, measured)
            self.saver.wait()
            latest = self.saver.latest()
            saved = "there is no checkpoint yet"
            if latest is not None:  # skipped steps change nothing, so whatever was saved is good
                saved = f"the last good state is {self.saver.directory / str(latest)}"
            raise errors.NumericsError(
                f"{self.skipped} steps in a row up to step {step} had a loss or gradient that is "
                f"not finite; {saved}"
            )
        if self.clock_step is None:  # the first step after compiling also fills caches
            self.clock, self.clock_step, self.paused = time.perf_counter(), step, 0.0
        if step % self.config.log_steps and step != self.config.total_steps:
            return
        seconds = time.perf_counter() - self.clock - self.paused
        steps = step - self.clock_step
        if steps > 0:
            measured["images_per_second"] = steps * self.config.batch_size / seconds
            used = flops.utilisation(self.flops, seconds / steps, jax.devices())
            if used is not None:
                measured["flop_utilisation"] = used
        counters = self.batches.counters().items()
        measured |= {f"input/{name}": count for name, count in counters if count}
        self.list_bad()
        self.writer.scalars(step, measured)
        self.loss = f"{measured['loss']:.4g}"
        self.clock, self.clock_step, self.paused = time.perf_counter(), step, 0.0

    def list_bad(self):
        """Appends the samples that could not be used to a file of this process."""
        found = self.batches.drain_bad()
        if found:
            path = self.folder / f"bad_samples-{distributed.process_index():05d}.jsonl"
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
