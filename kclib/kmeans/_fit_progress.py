"""The progress of a fit, for its caller and for a progress bar."""

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

from kclib._util import progress_bars


@dataclass(frozen=True)
class FitStep:
    """A report on the progress of a fit.

    Attributes
    ----------
    share : float
        Share of the work done since the last step; they sum to 1.
    inertia : float
        Of the best clustering so far; NaN before there is one.
    """

    share: float
    inertia: float


class Progress:
    """Passes shares of the work on to a caller, and remembers whether it asked to stop.

    Parameters
    ----------
    call : callable, optional
        Called with each `FitStep`; a true answer asks to stop at once.

    Attributes
    ----------
    inertia : float
        To be told, in the fit's own unit.
    unit : float
        That unit, in the caller's.
    """

    def __init__(self, call: Callable[[FitStep], object] | None = None):
        self.call, self.stopped, self.inertia, self.unit, self.left = call, False, math.nan, 1.0, 1.0

    def __call__(self, share: float) -> None:
        """Report a share of the whole."""
        share = min(share, self.left)
        self.left -= share
        if self.call and self.call(FitStep(share, self.inertia * self.unit)):
            self.stopped = True

    def part(self, weight: float) -> Callable[[float], bool]:
        """Return a function that reports shares of a part of the whole, and tells whether to stop."""

        def report(share: float) -> bool:
            if share or not self.stopped:
                self(share * weight)
            return self.stopped

        return report


def scaled(call: Callable[[FitStep], object] | None, part: float) -> Callable[[FitStep], object] | None:
    """Return what a fit calls that is only a part of the work."""
    return call and (lambda step: call(FitStep(step.share * part, step.inertia)))


class Fits:
    """A progress bar over kernels that several fits advance from their threads."""

    def __init__(self, total: int, memory: int, shown: bool):
        self.inertias, self.lock = {}, threading.Lock()
        self.bar = progress_bars.tqdm(
            total=total, desc=f"clustering (up to {memory / 2**30:.1f} GiB)", unit="kernel", unit_scale=True,
            delay=2, leave=False, disable=not shown,
        )  # fmt: skip

    def __enter__(self) -> "Fits":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def of(self, name: str, n: int) -> Callable[[FitStep], None]:
        """Return what the fit of one group of n kernels calls."""

        def step(step: FitStep) -> None:
            with self.lock:
                if not math.isnan(step.inertia):
                    self.inertias[name] = step.inertia
                    self.bar.set_postfix_str(f"inertia {sum(self.inertias.values()):.4g}", refresh=False)
                self.bar.update(min(step.share * n, self.bar.total - self.bar.n))  # shares are rounded

        return step
