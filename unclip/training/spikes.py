"""A guard that sees a loss or a gradient leave the range of the steps before."""

import collections
import math
import statistics

WINDOW = 128  # steps whose values make the range
LEAST = 32  # before that many nothing is judged
_MAD = 1.4826  # a normal distribution's standard deviation / its median absolute deviation


class SpikeGuard:
    """Judges each step's loss and gradient norm by the median of the last `WINDOW` sound ones.

    A value is a spike above median + factor * s, with s = 1.4826 times the median absolute
    deviation, which a few outliers do not move; of the gradient's norm the logarithm is taken,
    since it varies by factors. A spike is not added to the window. After `WINDOW` spikes in a row
    the new height is taken for the usual one.

    Args:
      factor: how many standard deviations; 0 judges nothing.
    """

    def __init__(self, factor: float):
        self.factor = factor
        self._window = {name: collections.deque(maxlen=WINDOW) for name in ("loss", "grad_norm")}
        self._spikes = 0

    def see(self, loss: float, grad_norm: float) -> str:
        """What is out of range at a step, in words; "" where nothing is.

        Args:
          loss, grad_norm: of the step, finite.
        """
        if not self.factor:
            return ""
        seen = {"loss": loss, "grad_norm": math.log(max(grad_norm, 1e-30))}
        told = []
        for name, value in seen.items():
            window = self._window[name]
            if len(window) < LEAST:
                continue
            middle = statistics.median(window)
            spread = _MAD * statistics.median(abs(v - middle) for v in window)
            # Where the window hardly varies, as it may when a small set is learned by heart.
            floor = 0.1 if name == "grad_norm" else 0.05 * abs(middle)
            if value > middle + self.factor * max(spread, floor):
                shown = (value, middle) if name == "loss" else (grad_norm, math.exp(middle))
                told.append(f"{name} {shown[0]:.4g}, the median before is {shown[1]:.4g}")
        self._spikes = self._spikes + 1 if told else 0
        if told and self._spikes < WINDOW:
            return "; ".join(told)
        if told:
            for window in self._window.values():
                window.clear()
        for name, value in seen.items():
            self._window[name].append(value)
        return ""
