"""Questions that can change at any moment, and answers worked out in the background: what widgets stand on.

A question is a frozen value; choosing another one is cheap and returns at once. What can be answered within
tens of milliseconds is answered there and then; the rest is worked out in a thread, and dropped if a newer
question has come meanwhile. Callbacks of widgets may run side by side
(ipykernel 7 gives them threads of their own), so every change of state is made under one lock.
"""

import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from kclib._util import checks
from kclib.errors import KclibError, StoppedError
from kclib.kernels import KernelBank
from kclib.kmeans._fit_progress import FitStep

Q, T = TypeVar("Q"), TypeVar("T")
_TELL_EVERY = 0.2  # seconds
Stale = Callable[[], bool]


@dataclass(frozen=True)
class Answer(Generic[Q]):
    """The answer to a question: a figure and facts.

    Attributes
    ----------
    question : frozen dataclass
    figure : matplotlib.figure.Figure
    facts : mapping of str to str
        Numbers with their units, by what they are.
    is_final : bool
        Whether no better answer to the question is on its way.
    """

    question: Q
    figure: Figure
    facts: Mapping[str, str]
    is_final: bool = True


class Newest:
    """Runs calls one at a time in background threads, and of those that wait only the newest."""

    def __init__(self):
        self._count, self._known, self._turn = 0, threading.Lock(), threading.Lock()
        self._threads: set[threading.Thread] = set()

    def __call__(self, work: Callable[[Stale], None]) -> None:
        """Start `work(stale)`; ``stale()`` tells whether a newer call, or `drop`, has made it pointless."""
        stale = self.drop()

        def run() -> None:
            try:
                with self._turn:
                    if not stale():
                        work(stale)
            finally:
                with self._known:
                    self._threads.discard(thread)

        thread = threading.Thread(target=run, daemon=True)
        with self._known:
            self._threads.add(thread)
            thread.start()

    def drop(self) -> Stale:
        """Make everything given so far pointless; return what tells when this moment is past."""
        with self._known:
            self._count += 1
            count = self._count
        return lambda: count != self._count

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is under way; return whether that came to pass in time."""
        end = time.monotonic() + (threading.TIMEOUT_MAX / 2 if seconds is None else seconds)
        while under_way := self._under_way():
            for thread in under_way:
                thread.join(max(0, end - time.monotonic()))
            if time.monotonic() >= end:
                break
        return not self._under_way()

    def _under_way(self) -> tuple[threading.Thread, ...]:
        with self._known:
            return tuple(self._threads)


class Explorer(Generic[Q]):
    """A question and the newest answer there is.

    Parameters
    ----------
    question : frozen dataclass
        To begin with; answered by `show`, or once it is changed.

    Attributes
    ----------
    question
        What is asked now.
    answer : Answer or None
        The newest; of an earlier question while this one is worked on, or if it failed.
    status : str
        What is under way, or what went wrong; empty if nothing.
    listeners : list of callable
        Called without arguments, from any thread, whenever one of these has changed.
    """

    def __init__(self, question: Q):
        self.question, self.answer, self.status = question, None, ""
        self.listeners: list[Callable[[], object]] = []
        self._lock, self._answers = threading.RLock(), Newest()

    def choose(self, **changes) -> None:
        """Ask another question, changed in some fields; it is answered in the background.

        Raises
        ------
        KclibError
            A value that cannot be; the question at hand stays.
        """
        with self._lock:
            question = self.changed(**changes)
            if self.answer and question == self.question == self.answer.question:
                return
            self.check(question)
            self._answers.drop()
            self.question, self.answer = question, self.at_once(question) or self.answer
            if self.answer and self.answer.question == question and self.answer.is_final:
                self.status = ""
            else:
                self.status = self.announced(question)
                self._answers(lambda stale: self._work(question, stale))
        self.tell()

    def show(self) -> Answer[Q]:
        """Answer the question here and now."""
        with self._lock:
            self.check(self.question)
            question, stale = self.question, self._answers.drop()
        answer = None
        try:
            answer = self.answered(question, lambda: False)
        finally:  # what was under way is dropped, also if this fails
            self._publish(answer, "", stale)
        return answer

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until every question is answered; return whether that came to pass in time."""
        return self._answers.wait(seconds)

    def changed(self, **changes) -> Q:
        """Return the question at hand, changed in some fields."""
        return replace(self.question, **changes)

    @property
    def largest(self) -> int:
        """The largest number of clusters that can be asked for, where it can."""
        return 1

    def check(self, question: Q) -> None:
        """Raise a KclibError for a question that has no answer."""

    def at_once(self, question: Q) -> Answer[Q] | None:
        """Return what can be answered within tens of milliseconds, final or not; None if nothing can."""
        return None

    def announced(self, question: Q) -> str:
        """Return what can be said before the answer is there."""
        return "working …"

    def answered(self, question: Q, stale: Stale) -> Answer[Q]:
        """Return the answer, or raise StoppedError once it is stale."""
        raise NotImplementedError

    def tell(self) -> None:
        """Call the listeners."""
        for listener in tuple(self.listeners):
            listener()

    def change(self, stale: Stale, **attributes) -> None:
        """Set attributes all at once and call the listeners, unless a newer question has come."""
        with self._lock:
            if stale():
                return
            vars(self).update(attributes)
        self.tell()

    def _work(self, question: Q, stale: Stale) -> None:
        answer, status = attempted(lambda: self.answered(question, stale))
        self._publish(answer, status, stale)

    def _publish(self, answer: Answer[Q] | None, status: str, stale: Stale) -> None:
        self.change(stale, status=status, **({"answer": answer} if answer else {}))


def attempted(work: Callable[[], T]) -> tuple[T | None, str]:
    """Return what `work()` returns and an empty sentence, or None and what went wrong.

    Nobody sees how a thread ends, so what went wrong must be said where people look.
    """
    try:
        return work(), ""
    except KclibError as error:
        return None, str(error)
    except Exception as error:
        traceback.print_exc()
        return None, f"failed: {type(error).__name__}: {error}"


class Progress:
    """Says how far a fit is, and ends it once nobody waits for it.

    Parameters
    ----------
    stale : callable
    say : callable, optional
        Called now and then with a sentence: the share done and the time left.
    """

    def __init__(self, stale: Stale, say: Callable[[str], object] = lambda sentence: None):
        self.stale, self.say = stale, say
        self.begin("")

    def begin(self, what: str, total: float = 1.0) -> None:
        """Begin another part of the work, of `total` in units of one's own."""
        self.what, self.total, self.share = what, total, 0.0
        self.started = self.told = time.monotonic()

    def of(self, part: float) -> Callable[[FitStep], bool]:
        """Return what a fit that is this much of the total calls."""

        def hear(step: FitStep) -> bool:
            self.share = min(1.0, self.share + part / self.total * step.share)
            now = time.monotonic()
            if now - self.told > _TELL_EVERY and self.share:
                self.told, left = now, (now - self.started) * (1 / self.share - 1)
                self.say(f"{self.what} {self.share:.0%}, about {tqdm.format_interval(left)} left")
            return self.stale()

        return hear

    def check(self) -> None:
        """Raise StoppedError once a newer question has come: a fit that ended early is not kept."""
        if self.stale():
            raise StoppedError("a newer question came.")


def check_k(n_clusters: int, largest: int) -> None:
    """Raise InvalidValueError unless a number of clusters is from 1 to `largest`."""
    checks.check_whole("K", n_clusters, 1, largest)


def called(bank: KernelBank, layers: tuple[str, ...]) -> str:
    """Name a choice of layers for a title."""
    layers = tuple(dict.fromkeys(layers))
    if len(layers) == len(bank.layers):
        return f"all {len(layers)} layers" if len(layers) > 1 else layers[0]
    return layers[0] if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} … {layers[-1]}"


def rows_of(bank: KernelBank, rows: np.ndarray, layers: Iterable[str]) -> np.ndarray:
    """Return those of the rows that belong to some layers, in their order."""
    return rows[np.isin(rows, np.concatenate([bank.layer(name).of(rows) for name in layers]))]
