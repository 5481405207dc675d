import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from gates import PATIENCE
from matplotlib.figure import Figure

from kclib.errors import InvalidValueError, StoppedError
from kclib.explorers import _background
from kclib.explorers._background import Answer, Explorer, Newest, Progress, attempted
from kclib.kmeans._fit_progress import FitStep


class Gate:
    """Where a thread waits, so that a test can do something meanwhile."""

    def __init__(self):
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self):
        self.reached.set()
        assert self.open.wait(PATIENCE)


@dataclass(frozen=True)
class Question:
    number: int = 0
    words: str = ""


class Numbers(Explorer[Question]):
    """Answers with the number it is asked for, once the number's gate opens; does not care to be stale."""

    def __init__(self, *gated, fails=None):
        super().__init__(Question())
        self.gates, self.fails, self.asked = {number: Gate() for number in gated}, fails or {}, []

    def check(self, question):
        if question.number < 0:
            raise InvalidValueError(f"number is {question.number}; it must be at least 0.")

    def answered(self, question, stale):
        self.asked.append(question.number)
        if question.number in self.gates:
            self.gates[question.number]()
        if question.number in self.fails:
            raise self.fails[question.number]
        return Answer(question, Figure(), {"number": str(question.number)})

    def ask(self, number):
        """Choose a gated number, and return once it is worked on."""
        self.choose(number=number)
        assert self.gates[number].reached.wait(PATIENCE)


def told(explorer):
    """Return a list that will hold what can be seen each time that listeners are called."""
    seen = []

    def look():
        number = explorer.answer and int(explorer.answer.facts["number"])
        seen.append((explorer.question.number, number, explorer.status))

    explorer.listeners.append(look)
    return seen


def in_thread(call):
    """Start a thread that cannot keep the tests from ending."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def test_of_the_calls_that_wait_only_the_newest_runs():
    newest, gate, ran = Newest(), Gate(), []
    newest(lambda stale: (gate(), ran.append("first")))
    assert gate.reached.wait(PATIENCE)
    for i in range(5):
        newest(lambda stale, i=i: ran.append(i))
    gate.open.set()
    assert newest.wait(PATIENCE)
    assert ran == ["first", 4]


def test_calls_from_many_threads_run_one_at_a_time_and_the_newest_of_all_runs():
    newest, alone, start = Newest(), threading.Lock(), threading.Barrier(8)
    ran = []

    def work(stale):
        free = alone.acquire(blocking=False)
        ran.append((free, stale()))
        if free:
            alone.release()

    def caller(_):
        start.wait(PATIENCE)
        for _ in range(20):
            newest(work)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(caller, range(8)))
    assert newest.wait(PATIENCE)
    assert all(free for free, _ in ran)
    assert ran[-1] == (True, False)
    assert len(ran) <= 160


@pytest.mark.parametrize("end", ["a newer call", "drop"])
def test_a_call_can_see_that_it_has_become_pointless(end):
    newest, gate, seen = Newest(), Gate(), []

    def work(stale):
        seen.append(stale())
        gate()
        seen.append(stale())

    newest(work)
    assert gate.reached.wait(PATIENCE)
    newest.drop() if end == "drop" else newest(lambda stale: None)
    gate.open.set()
    assert newest.wait(PATIENCE)
    assert seen == [False, True]


def test_what_is_dropped_before_its_turn_never_runs():
    newest, gate, ran = Newest(), Gate(), []
    newest(lambda stale: gate())
    assert gate.reached.wait(PATIENCE)
    newest(lambda stale: ran.append(1))
    newest.drop()
    gate.open.set()
    assert newest.wait(PATIENCE)
    assert ran == []


def test_wait_says_whether_all_had_ended_in_time():
    newest, gate = Newest(), Gate()
    assert newest.wait(0)
    newest(lambda stale: gate())
    assert not newest.wait(0)
    assert not newest.wait(0.01)
    gate.open.set()
    assert newest.wait()


def test_a_call_that_fails_keeps_nobody_waiting(monkeypatch):
    failures, newest, ran = [], Newest(), []
    monkeypatch.setattr(threading, "excepthook", lambda args: failures.append(args.exc_type))
    newest(lambda stale: 1 / 0)
    assert newest.wait(1)
    newest(lambda stale: ran.append(1))
    assert newest.wait(1)
    assert (failures, ran) == ([ZeroDivisionError], [1])


def test_waiting_while_a_call_is_about_to_start_is_no_error(monkeypatch):
    newest, genuine, results = Newest(), threading.Thread.start, []

    def waiting():
        try:
            results.append(newest.wait(PATIENCE))
        except RuntimeError as error:
            results.append(error)

    waiter = threading.Thread(target=waiting, daemon=True)

    def start(thread):
        if thread is not waiter and not results:
            genuine(waiter)
            waiter.join(0.2)  # it may have to wait until the other has started
        genuine(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    newest(lambda stale: None)
    waiter.join(PATIENCE)
    assert results == [True]


def test_a_choice_returns_at_once_and_its_answer_comes_later():
    explorer = Numbers(7)
    first = explorer.show()
    explorer.ask(7)
    assert explorer.question == Question(7)
    assert explorer.answer is first
    assert explorer.status == "working …"
    explorer.gates[7].open.set()
    assert explorer.wait(PATIENCE)
    assert (explorer.answer.question, explorer.answer.facts) == (Question(7), {"number": "7"})
    assert explorer.status == ""


def test_an_older_answer_that_ends_between_a_newer_question_and_its_answer_is_dropped():
    explorer = Numbers(1, 2)
    seen = told(explorer)
    explorer.ask(1)
    explorer.choose(number=2)
    explorer.gates[1].open.set()
    assert explorer.gates[2].reached.wait(PATIENCE)  # so the first has ended
    assert (explorer.question.number, explorer.answer, explorer.status) == (2, None, "working …")
    explorer.gates[2].open.set()
    assert explorer.wait(PATIENCE)
    assert seen == [(1, None, "working …"), (2, None, "working …"), (2, 2, "")]


def test_of_questions_chosen_while_one_is_worked_on_only_the_last_is_answered():
    explorer = Numbers(1)
    explorer.ask(1)
    for number in (2, 3, 4):
        explorer.choose(number=number)
    explorer.gates[1].open.set()
    assert explorer.wait(PATIENCE)
    assert explorer.asked == [1, 4]
    assert explorer.answer.question.number == 4


@pytest.mark.parametrize("error", [StoppedError("a newer question came."), ValueError("old")])
def test_how_an_older_question_failed_is_not_said_of_a_newer_one(error):
    explorer = Numbers(1, 2, fails={1: error})
    seen = told(explorer)
    explorer.ask(1)
    explorer.choose(number=2)
    explorer.gates[1].open.set()
    assert explorer.gates[2].reached.wait(PATIENCE)
    assert explorer.status == "working …"
    explorer.gates[2].open.set()
    assert explorer.wait(PATIENCE)
    assert {status for *_, status in seen} == {"working …", ""}


def test_how_far_an_older_question_is_is_not_said_of_a_newer_one():
    explorer = Numbers()
    seen = told(explorer)
    explorer.change(lambda: False, status="half")
    explorer.change(lambda: True, status="three quarters")
    assert explorer.status == "half"
    assert seen == [(0, None, "half")]


def test_going_back_to_a_question_while_another_is_worked_on_answers_it():
    explorer = Numbers(1)
    explorer.show()
    explorer.ask(1)
    explorer.choose(number=0)
    explorer.gates[1].open.set()
    assert explorer.wait(PATIENCE)
    assert (explorer.answer.question.number, explorer.status) == (0, "")


def test_an_answer_here_and_now_does_not_overwrite_that_of_a_newer_question():
    explorer = Numbers(0)
    shown = in_thread(explorer.show)
    assert explorer.gates[0].reached.wait(PATIENCE)
    explorer.choose(number=3)
    assert explorer.wait(PATIENCE)
    explorer.gates[0].open.set()
    shown.join(PATIENCE)
    assert explorer.answer.question == explorer.question == Question(3)


def test_fifty_choices_from_eight_threads_end_with_the_last_questions_own_answer():
    explorer, start = Numbers(), threading.Barrier(8)
    seen = told(explorer)
    orders = [random.Random(i).sample(range(1000 * i, 1000 * i + 50), 50) for i in range(8)]

    def choices(order):
        start.wait(PATIENCE)
        for number in order:
            explorer.choose(number=number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(choices, orders))
    assert explorer.wait(PATIENCE)
    assert explorer.answer.question == explorer.question
    assert explorer.question.number in {order[-1] for order in orders}
    assert explorer.status == ""
    assert len(seen) >= 400
    question, number, status = seen[-1]
    assert status == "working …" or question == number


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (InvalidValueError("give at least 3."), "give at least 3."),
        (ValueError("no such thing"), "failed: ValueError: no such thing"),
    ],
)
def test_a_failing_answer_keeps_the_old_one_and_says_what_went_wrong(error, sentence):
    explorer = Numbers(fails={1: error})
    first = explorer.show()
    explorer.choose(number=1)
    assert explorer.wait(PATIENCE)
    assert (explorer.question.number, explorer.answer, explorer.status) == (1, first, sentence)
    explorer.choose(number=2)
    assert explorer.wait(PATIENCE)
    assert (explorer.answer.question.number, explorer.status) == (2, "")


def test_an_invalid_choice_is_refused_and_changes_nothing():
    explorer = Numbers(1)
    explorer.show()
    explorer.ask(1)
    seen = told(explorer)
    before = explorer.question, explorer.answer, explorer.status
    with pytest.raises(InvalidValueError, match=r"^number is -1;"):
        explorer.choose(number=-1, words="new")
    with pytest.raises(TypeError, match="colour"):
        explorer.choose(colour="red")
    assert (explorer.question, explorer.answer, explorer.status) == before
    assert seen == []
    explorer.gates[1].open.set()
    assert explorer.wait(PATIENCE)
    assert explorer.answer.question.number == 1, "what was under way went on"


def test_fields_that_are_not_named_stay():
    explorer = Numbers()
    explorer.choose(words="new")
    explorer.choose(number=3)
    assert explorer.wait(PATIENCE)
    assert explorer.answer.question == Question(3, "new")


def test_the_question_that_is_answered_is_not_answered_again():
    explorer = Numbers()
    explorer.show()
    seen = told(explorer)
    explorer.choose(number=0)
    assert explorer.wait(PATIENCE)
    assert (explorer.asked, seen) == ([0], [])


def test_the_first_question_is_answered_when_it_is_chosen():
    explorer = Numbers()
    assert (explorer.answer, explorer.status, explorer.asked) == (None, "", [])
    explorer.choose(number=0)
    assert explorer.wait(PATIENCE)
    assert explorer.answer.question.number == 0


def test_show_answers_in_the_callers_thread_and_raises_what_goes_wrong():
    explorer, threads = Numbers(fails={1: InvalidValueError("no.")}), []
    explorer.listeners.append(lambda: threads.append(threading.current_thread()))
    answer = explorer.show()
    assert answer is explorer.answer
    assert threads == [threading.current_thread()]
    explorer.question = Question(1)
    with pytest.raises(InvalidValueError, match=r"^no.$"):
        explorer.show()
    explorer.question = Question(-1)
    with pytest.raises(InvalidValueError, match="number is -1"):
        explorer.show()
    assert explorer.answer is answer


def test_a_question_that_fails_here_and_now_is_not_said_to_be_worked_on_for_ever():
    explorer = Numbers(1, fails={1: InvalidValueError("no.")})
    explorer.ask(1)
    explorer.gates[1].reached.clear()
    said = []
    shown = in_thread(lambda: said.append(attempted(explorer.show)))
    assert explorer.gates[1].reached.wait(PATIENCE)
    explorer.gates[1].open.set()
    shown.join(PATIENCE)
    assert explorer.wait(PATIENCE)
    assert said == [(None, "no.")]
    assert explorer.status in ("", "no.")


def test_listeners_hear_of_a_choice_and_of_its_answer_from_the_thread_of_each():
    explorer, threads = Numbers(), []
    for _ in range(2):
        explorer.listeners.append(lambda: threads.append(threading.current_thread()))
    explorer.choose(number=1)
    assert explorer.wait(PATIENCE)
    assert len(threads) == 4
    assert threads.count(threading.current_thread()) == 2
    assert len(set(threads)) == 2


def test_a_listener_may_choose():
    explorer = Numbers()

    def next_one():
        if explorer.answer and explorer.answer.question == explorer.question and explorer.question.number < 5:
            explorer.choose(number=explorer.question.number + 1)

    explorer.listeners.append(next_one)
    explorer.choose(number=1)
    assert explorer.wait(PATIENCE)
    assert explorer.asked == [1, 2, 3, 4, 5]
    assert explorer.answer.question.number == 5


def test_a_listener_may_choose_under_a_lock_of_its_own_while_another_choice_is_told():
    explorer, mine, telling, done = Numbers(), threading.RLock(), Gate(), []
    chooser = threading.Thread(target=lambda: explorer.choose(number=1), daemon=True)

    def listener():
        if threading.current_thread() is chooser:
            telling.reached.set()
        with mine:
            pass

    explorer.listeners.append(listener)
    with mine:
        chooser.start()
        assert telling.reached.wait(PATIENCE)
        other = in_thread(lambda: (explorer.choose(number=2), done.append(2)))
        assert wait_for(lambda: explorer.question.number == 2)
    for thread in (chooser, other):
        thread.join(PATIENCE)
    assert explorer.wait(PATIENCE)
    assert (done, explorer.answer.question.number) == ([2], 2)


def wait_for(condition):
    """Return whether a condition came true in time."""
    pause = threading.Event()
    return any(condition() or pause.wait(0.002) for _ in range(int(PATIENCE / 0.002)))


def test_waiting_ends_when_every_question_is_answered():
    explorer = Numbers(1)
    assert explorer.wait(0)
    explorer.ask(1)
    assert not explorer.wait(0.01)
    explorer.gates[1].open.set()
    assert explorer.wait()


def test_what_is_attempted_comes_back_or_its_failure_in_words(capsys):
    assert attempted(lambda: 3) == (3, "")
    assert attempted(lambda: None) == (None, "")

    def refused():
        raise InvalidValueError("K is 1; it must be at least 2.")

    assert attempted(refused) == (None, "K is 1; it must be at least 2.")
    assert capsys.readouterr().err == ""
    assert attempted(lambda: 1 / 0) == (None, "failed: ZeroDivisionError: division by zero")
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_no_failure_to_be_told():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempted(interrupted)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(_background, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    return now


def test_progress_says_the_share_and_the_time_left_now_and_then(clock):
    said = []
    progress = Progress(lambda: False, said.append)
    progress.begin("clustering:")
    hear = progress.of(0.5)
    for seconds, share in ((1000.1, 0.1), (1010, 0.4), (1010.1, 0.1), (1030, 0.4)):
        clock.seconds = seconds
        assert not hear(FitStep(share, 1.0))
    # a quarter after 10 s leaves 30 s, a half after 30 s leaves 30 s
    assert said == ["clustering: 25%, about 00:30 left", "clustering: 50%, about 00:30 left"]


def test_parts_of_the_work_add_up_and_another_begins_anew(clock):
    said = []
    progress = Progress(lambda: False, said.append)
    progress.begin("one:")
    for part in (0.25, 0.75):
        clock.seconds += 10
        progress.of(part)(FitStep(1.0, 1.0))
    clock.seconds += 10
    progress.of(0.5)(FitStep(1.0, 1.0))  # rounding may lead above the whole
    progress.begin("two:")
    clock.seconds += 100
    progress.of(1.0)(FitStep(0.5, 1.0))
    assert said == [
        "one: 25%, about 00:30 left",
        "one: 100%, about 00:00 left",
        "one: 100%, about 00:00 left",
        "two: 50%, about 01:40 left",
    ]


def test_a_fit_is_asked_to_stop_once_its_question_is_old_and_is_not_kept():
    old = []
    progress = Progress(lambda: bool(old))
    progress.begin("clustering:")
    hear = progress.of(1.0)
    assert not hear(FitStep(0.1, 1.0))
    progress.check()
    old.append(1)
    assert hear(FitStep(0.1, 1.0))
    with pytest.raises(StoppedError):
        progress.check()
