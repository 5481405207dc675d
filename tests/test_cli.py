import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat import v4

from kclib import batch, cli, training
from kclib.errors import NotebookError


@pytest.fixture
def kclib(monkeypatch, capsys):
    """Run the command line in this process; answer its exit code, output and error text."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["kclib", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        said = capsys.readouterr()
        return exit_.value.code, said.out, said.err

    return run


@pytest.fixture
def profile(tmp_path):
    """The path of a profile of one notebook with parameters, which fails."""
    cells = [v4.new_code_cell(source) for source in ('names: list = ["a"]\nk: int = 1', "1 / 0")]
    cells[0].metadata["tags"] = ["parameters"]
    python = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(v4.new_notebook(cells=cells, metadata=python), tmp_path / "broken.ipynb")
    (tmp_path / "tiny.yaml").write_text("folder: .\nnotebooks: {broken: }")
    return tmp_path / "tiny.yaml"


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """What `batch.run` was called with, in place of running it."""
    calls = []

    def run(profile, out):
        calls.append((profile, out))
        return tmp_path / "index.html"

    monkeypatch.setattr(batch, "run", run)
    return calls


def shell(*arguments) -> tuple[int, str, str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "kclib", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


def is_one_sentence(text: str) -> bool:
    return text.count("\n") == 1 and text.startswith("kclib: ") and "Traceback" not in text


def test_a_failed_notebook_is_exit_code_1(profile, tmp_path):
    code, _, said = shell("batch", "--profile", profile, "--out", tmp_path / "out")
    assert code == 1
    assert is_one_sentence(said.splitlines(keepends=True)[-1])
    assert "notebook broken failed (ZeroDivisionError: division by zero)" in said
    assert "Traceback" not in said
    assert (tmp_path / "out" / "tiny" / "broken.ipynb").is_file()


def test_a_wrong_input_in_the_shell_is_one_sentence_and_exit_code_2():
    code, out, said = shell("batch", "--profile", "smok")
    assert (code, out) == (2, "")
    assert is_one_sentence(said)
    assert "Did you mean 'smoke'?" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "kk=3"], "unknown parameter 'kk'"),
        (["--set", "k=[3"], "k=[3"),
        (["--set", "k"], "must be name=value"),
        (["--sett", "k=3"], "No such option"),
    ],
)
def test_a_wrong_change_is_refused_before_anything_runs(kclib, profile, tmp_path, arguments, message):
    code, _, said = kclib("batch", "--profile", profile, "--out", tmp_path / "out", *arguments)
    assert (code, message in said, "Traceback" in said) == (2, True, False)
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_written_is_exit_code_2(kclib, profile, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, said = kclib("batch", "--profile", profile, "--out", tmp_path / "file")
    assert code == 2
    assert is_one_sentence(said)
    assert "could not be written" in said


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("0.5", 0.5), ("[b, c]", ["b", "c"]), ("true", True), ("vgg16", "vgg16"), ("a=b", "a=b")],
)
def test_a_change_has_the_type_it_reads_as(kclib, ran, profile, text, value):
    assert kclib("batch", "--profile", profile, "--set", f"k={text}", "--set", "names=[]")[0] == 0
    assert ran[0][0].parameters == {"broken": {"k": value, "names": []}}


def test_a_change_would_run_no_code(kclib, profile, tmp_path):
    target = tmp_path / "exploded"
    change = f"k=!!python/object/apply:os.mkdir [{target}]"
    code, _, said = kclib("batch", "--profile", profile, "--out", tmp_path / "out", "--set", change)
    assert (code, "Traceback" in said, target.exists()) == (2, False, False)


def test_a_finished_batch_says_where_its_report_is(kclib, ran, profile, tmp_path):
    code, out, _ = kclib("batch", "--profile", profile, "--out", tmp_path / "out")
    assert (code, out.strip()) == (0, f"report: {(tmp_path / 'index.html').resolve()}")
    assert ran[0][1] == tmp_path / "out"


def test_without_options_the_smoke_profile_goes_to_reports(kclib, ran):
    assert kclib("batch")[0] == 0
    assert (ran[0][0].name, ran[0][1]) == ("smoke", Path("reports"))


@pytest.mark.parametrize(("error", "code"), [(NotebookError("it broke"), 1), (KeyboardInterrupt(), 130)])
def test_a_run_that_ends_early_leaves_no_traceback(kclib, monkeypatch, profile, error, code):
    def run(profile, out):
        raise error

    monkeypatch.setattr(batch, "run", run)
    found, _, said = kclib("batch", "--profile", profile)
    assert (found, "Traceback" in said) == (code, False)


def test_training_takes_its_recipe_from_the_options(kclib, monkeypatch, tmp_path):
    asked = []
    trained = training.Trained(None, ({"held_back": 93.456}, {"held_back": 90.0}))
    monkeypatch.setattr(training, "train_fashion", lambda *options: asked.append(options) or trained)
    code, out, _ = kclib("train", "--out", tmp_path / "w.safetensors", "--epochs", 3, "--seed", 4)
    assert (code, "93.46 %" in out) == (0, True)
    assert asked == [(tmp_path / "w.safetensors", None, training.Recipe(epochs=3, seed=4), "cpu")]


def test_training_for_no_epochs_or_from_nowhere_is_exit_code_2(kclib, tmp_path):
    assert kclib("train", "--out", tmp_path / "w.safetensors", "--epochs", 0)[0] == 2
    absent = tmp_path / "absent.safetensors"
    code, _, said = kclib("train", "--out", tmp_path / "w.safetensors", "--start", absent)
    assert (code, said) == (2, f"kclib: weights file {absent} does not exist.\n")


def test_without_a_command_the_commands_are_listed(kclib):
    code, out, said = kclib()
    assert code == 2
    assert "batch" in out + said
    assert "train" in out + said
