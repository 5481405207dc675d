"""Progress bars, seen from two seconds on, with the time left."""

import math
import threading
from collections.abc import Callable

from tqdm.auto import tqdm

from kclib.fitting import Step


def of_shares(what: str, shown: bool) -> tqdm:
    """Return a progress bar that is told shares of the work, and is seen from two seconds on."""
    form = "{desc} {percentage:3.0f} %|{bar}| about {remaining} left"
    return tqdm(total=1.0, desc=what, delay=2, leave=False, disable=not shown, bar_format=form)


class Fits:
    """A progress bar over kernels that several fits advance from their threads."""

    def __init__(self, total: int, memory: int, shown: bool):
        self.inertias, self.lock = {}, threading.Lock()
        self.bar = tqdm(
            total=total, desc=f"clustering (up to {memory / 2**30:.1f} GiB)", unit="kernel", unit_scale=True,
            delay=2, leave=False, disable=not shown,
        )  # fmt: skip

    def __enter__(self) -> "Fits":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def of(self, name: str, n: int) -> Callable[[Step], None]:
        """Return what the fit of one group of n kernels calls."""

        def step(step: Step) -> None:
            with self.lock:
                if not math.isnan(step.inertia):
                    self.inertias[name] = step.inertia
                    self.bar.set_postfix_str(f"inertia {sum(self.inertias.values()):.4g}", refresh=False)
                self.bar.update(min(step.share * n, self.bar.total - self.bar.n))  # shares are rounded

        return step
