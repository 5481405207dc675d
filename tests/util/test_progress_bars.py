import io
import os
import pty
import re
import subprocess
import sys
import termios
import threading
import time

import pytest
from tqdm import auto

from kclib._util import progress_bars
from kclib._util.progress_bars import tqdm

QUICK = """
from kclib._util import progress_bars
from kclib._util.progress_bars import tqdm
with progress_bars.readable():
    for _ in tqdm(range(10_000), desc="steps"):
        pass
"""


class Clock:
    """A monotonic clock that a test turns."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Log:
    """All that was written to the error stream since."""

    def __init__(self, capsys):
        self.capsys, self.text = capsys, ""

    def getvalue(self):
        self.text += self.capsys.readouterr().err
        return self.text


@pytest.fixture
def log(capsys):
    return Log(capsys)


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(progress_bars.time, "monotonic", found)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # no thread that draws by itself
    return found


def run(code, **options):
    return subprocess.run([sys.executable, "-c", code], check=True, timeout=60, **options)


def test_a_quick_bar_in_a_file_is_its_last_state_in_one_line(tmp_path):
    with open(tmp_path / "log", "w") as file:
        run(QUICK, stderr=file)
    text = (tmp_path / "log").read_bytes().decode()
    assert "\r" not in text
    assert "\x1b" not in text
    assert re.fullmatch(r"steps: 100%\|█+\| 10000/10000 \[\d\d:\d\d<00:00, .*it/s\]\n", text)


def test_on_a_terminal_a_bar_is_drawn_over_itself():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    run(QUICK, stderr=theirs)
    os.close(theirs)
    text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert text.count("\rsteps:") >= 2


def test_a_long_bar_is_a_line_in_thirty_seconds_with_the_share_and_the_time_left(log, clock):
    with progress_bars.readable(), tqdm(total=100, desc="long", mininterval=0) as bar:
        for _ in range(100):
            clock.now += 1
            bar.update()
    lines = log.getvalue().splitlines()
    assert [line[:9] for line in lines] == ["long:  30", "long:  60", "long:  90", "long: 100"]
    assert all(re.search(r"% *\|.*\| \d+/100 \[\S+<\S+, ", line) for line in lines)


def test_a_bar_that_waits_for_its_first_step_is_seen_all_the_same(log, clock):
    with (
        progress_bars.readable(),
        tqdm(total=100, desc="waits", mininterval=0) as bar,
        progress_bars.ticking(bar),
    ):
        clock.now += 31
        deadline = time.perf_counter() + 30
        while "waits:   0%" not in log.getvalue() and time.perf_counter() < deadline:
            time.sleep(0.1)
    assert re.match(r"waits:   0%\|.*\| 0/100 \[", log.getvalue())
    n_threads = threading.active_count()
    with tqdm(total=1, disable=True) as bar, progress_bars.ticking(bar):
        assert threading.active_count() == n_threads + 1
    assert threading.active_count() == n_threads


def test_nested_bars_are_whole_lines_without_moves_of_the_cursor(log, clock):
    with progress_bars.readable(), tqdm(total=2, desc="all", mininterval=0) as whole:
        for _ in range(2):
            with tqdm(total=2, desc="one", position=1, leave=False, mininterval=0) as part:
                for _ in range(2):
                    clock.now += 20
                    part.update()
            whole.update()
    lines = log.getvalue().split("\n")
    assert [line.split("|")[0] for line in lines] == ["one: 100%", "all:  50%", "one: 100%", "all: 100%", ""]


def test_a_short_bar_that_would_be_cleared_leaves_no_line(log, clock):
    with progress_bars.readable():
        for _ in range(1000):
            list(tqdm(range(3), leave=False, mininterval=0))
    assert log.getvalue() == ""


def test_a_bar_that_would_be_cleared_ends_in_a_line_if_it_was_seen(log, clock):
    with progress_bars.readable(), tqdm(total=4, leave=False, mininterval=0) as bar:
        clock.now += 31
        bar.update(3)
        bar.update(1)
    assert [line.split("|")[0] for line in log.getvalue().splitlines()] == ["75%", "100%"]


def test_what_else_is_written_passes_unchanged(log):
    with progress_bars.readable(), tqdm(total=2) as bar:
        for text in ("warning: ", "\n", "\n", "a\rb", "\x1b[A"):
            bar.update(0)
            print(text, end="", file=sys.stderr)
        assert log.getvalue() == "warning: \n\na\rb\x1b[A"


def test_a_bar_that_has_a_file_of_its_own_keeps_it(log):
    own = io.StringIO()
    with progress_bars.readable():
        list(tqdm(range(3), file=own))
        list(tqdm(range(3), None, None, True, own))
    assert own.getvalue().count("\r") >= 2
    assert log.getvalue() == ""


def test_a_librarys_bar_is_a_line_with_the_options_that_say_so(log):
    assert progress_bars.as_lines(left=True) == {}
    with progress_bars.readable():
        for left in (True, False):
            list(auto.tqdm(range(3), desc="theirs", **{"leave": left} | progress_bars.as_lines(left)))
    (line,) = log.getvalue().splitlines()
    assert line.startswith("theirs: 100%")


def test_a_bar_is_disabled_where_it_asks_to_be_off_terminals(log):
    with progress_bars.readable():
        list(tqdm(range(3), disable=None))
    assert log.getvalue() == ""


def test_child_processes_draw_as_rarely_and_afterwards_all_is_as_before(log, monkeypatch):
    monkeypatch.setenv("TQDM_MAXINTERVAL", "7")
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    code = "from tqdm.auto import tqdm; bar = tqdm(total=1); print(bar.mininterval, bar.maxinterval)"
    with progress_bars.readable():
        assert run(code, capture_output=True).stdout.split() == [b"30.0", b"7.0"]
    assert "TQDM_MININTERVAL" not in os.environ
    list(tqdm(range(3)))
    assert "\r" in log.getvalue()


def test_lines_in_a_log_of_plain_letters_draw_no_blocks():
    found = run(QUICK, stderr=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert re.match(rb"steps: 100%\|#+\| 10000/10000", found.stderr)
