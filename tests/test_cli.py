import importlib
import re
import shlex
import subprocess
import sys
import webbrowser
from pathlib import Path

import nbformat
import onnx
import pytest
import torch
import typer
from nbformat import v4
from PIL import Image
from safetensors.torch import save_file
from sentences import is_one_sentence

from kclib import __version__ as version
from kclib import cli, compression, datasets, evaluation, loading
from kclib.compression import _container, expand
from kclib.errors import InvalidValueError, NotebookError
from kclib.experiments import _batch
from kclib.models import _loading

FACTORIES = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )

def uneven():
    network = nn.Sequential(nn.Conv2d(3, 20, 3), nn.Conv2d(20, 50, 3))
    for layer in (network[0], network[1]):
        nn.init.constant_(layer.weight, 1.0)
        layer.weight.data[:2, :2] = 2.0
    return network

def tied():
    network = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3))
    network[1].weight = network[0].weight
    return network

def headed():
    torch.manual_seed(0)
    return nn.Sequential(*make(), nn.Linear(10, 1000))
"""


@pytest.fixture
def profile(tmp_path):
    """The path of a profile of one notebook with parameters, which fails."""
    cells = [
        v4.new_code_cell(source) for source in ('names: list = ["a"]\nk: int = 1\nany_kind = None', "1 / 0")
    ]
    cells[0].metadata["tags"] = ["parameters"]
    python = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(v4.new_notebook(cells=cells, metadata=python), tmp_path / "broken.ipynb")
    (tmp_path / "tiny.yaml").write_text("folder: .\nnotebooks: {broken: }")
    return tmp_path / "tiny.yaml"


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """What `batch.run` was called with, in place of running it."""
    calls = []

    def run(profile, out, jobs):
        calls.append((profile, out, jobs))
        return tmp_path / "index.html"

    monkeypatch.setattr(_batch, "run", run)
    return calls


def shell(*arguments) -> tuple[int, str, str]:
    """Run the command line as a user does."""
    command = [sys.executable, "-m", "kclib", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_failed_notebook_is_exit_code_1(profile, tmp_path):
    code, _, said = shell("batch", "--profile", profile, "--out", tmp_path / "out")
    assert code == 1
    assert is_one_sentence(said.splitlines(keepends=True)[-1])
    assert "notebook broken failed (ZeroDivisionError: division by zero)" in said
    assert "kclib/" not in said.replace(str(tmp_path), ""), "no frame of ours is shown"
    assert (tmp_path / "out" / "tiny" / "broken.ipynb").is_file()


def test_a_wrong_input_in_the_shell_is_one_sentence_and_exit_code_2():
    code, out, said = shell("batch", "--profile", "smok")
    assert (code, out) == (2, "")
    assert is_one_sentence(said)
    assert "did you mean 'smoke'?" in said


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
    assert kclib("batch", "--profile", profile, "--set", f"any_kind={text}", "--set", "names=[]")[0] == 0
    assert ran[0][0].parameters == {"broken": {"any_kind": value, "names": []}}


def test_a_change_would_run_no_code(kclib, profile, tmp_path):
    target = tmp_path / "exploded"
    change = f"k=!!python/object/apply:os.mkdir [{target}]"
    code, _, said = kclib("batch", "--profile", profile, "--out", tmp_path / "out", "--set", change)
    assert (code, "Traceback" in said, target.exists()) == (2, False, False)


def test_a_home_folder_is_understood_where_the_shell_leaves_it(kclib, ran, profile, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kclib("batch", "--profile=~/tiny.yaml", "--out=~/out", "--set", "any_kind=folder:~/x")[0] == 0
    assert (ran[0][0].name, ran[0][1]) == ("tiny", tmp_path / "out")
    assert ran[0][0].parameters["broken"]["any_kind"] == f"folder:{tmp_path}/x"
    assert kclib("inspect", "~/absent.safetensors")[2].startswith(f"kclib: {tmp_path}/absent.safetensors")


def test_a_finished_batch_says_where_its_report_is(kclib, ran, profile, tmp_path):
    code, out, _ = kclib("batch", "--profile", profile, "--out", tmp_path / "out")
    assert (code, out.strip()) == (0, f"report: {(tmp_path / 'index.html').resolve()}")
    assert ran[0][1] == tmp_path / "out"


def test_without_options_the_smoke_profile_goes_to_reports(kclib, ran):
    assert kclib("batch")[0] == 0
    assert ran[0][0].name == "smoke"
    assert ran[0][1:] == (Path("reports"), _batch.fitting_jobs())


def test_as_many_notebooks_side_by_side_as_asked(kclib, ran):
    assert kclib("batch", "--jobs", "3")[0] == 0
    assert ran[0][2] == 3


@pytest.mark.parametrize(("error", "code"), [(NotebookError("it broke"), 1), (KeyboardInterrupt(), 130)])
def test_a_run_that_ends_early_leaves_no_traceback(kclib, monkeypatch, profile, error, code):
    def run(profile, out, jobs):
        raise error

    monkeypatch.setattr(_batch, "run", run)
    found, _, said = kclib("batch", "--profile", profile)
    assert (found, "Traceback" in said) == (code, False)


def test_without_a_command_the_commands_are_listed(kclib):
    code, out, said = kclib()
    assert code == 2
    for command in ("batch", "sweep", "compress", "inspect", "evaluate", "export"):
        assert command in out + said


def test_compress_comes_first_in_the_list_of_commands(kclib):
    listed = kclib("--help")[1].partition("Commands:")[2].split("\n")
    names = [line.split()[0] for line in listed if line.strip()]
    assert names[0] == "compress"
    assert {*names} >= {"try", "inspect", "evaluate", "export", "sweep", "batch"}
    assert "..." not in "".join(listed)  # no sentence is cut


def test_the_version_is_shown(kclib):
    code, out, said = kclib("--version")
    assert (code, out, said) == (0, f"kclib {version}\n", "")


@pytest.mark.parametrize("command", sorted(typer.main.get_command(cli.app).commands))
def test_help_has_two_examples_and_types_in_words(kclib, command):
    code, out, _ = kclib(command, "--help")
    assert code == 0
    text, _, examples = out.partition("Examples:\n")
    examples = examples.strip().splitlines()
    assert len(examples) == 2
    for example in examples:
        assert example.strip().startswith(f"kclib {command}")
    assert not re.search(r"<\w+|x>=|\bTEXT\b|\bINTEGER\b", text)


def test_inspecting_loads_no_torch(made):
    _, path = made()
    code = f"import sys; sys.argv = ['kclib', 'inspect', {str(path)!r}]; from kclib import cli"
    code += (
        "\ntry: cli.main()\nexcept SystemExit: print(sorted({'torch', 'numba', 'sklearn'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("bytes in all\n[]\n")


@pytest.fixture
def tried(kclib, factories, tmp_path):
    """Try a network of the factories; answer exit code, what was printed, and the folder."""

    def run(*options):
        given = ("--limit", 50, "--clusters", 5, "--out", tmp_path)
        code, out, said = kclib("try", f"{factories}:make", *given, *options)
        return code, out, said, tmp_path / "try"

    return run


def test_a_first_try_shows_what_was_lost_and_saved(tried, factories):
    code, out, said, folder = tried("--no-open")
    assert (code, said) == (0, "")
    model, images = loading.load_model(f"{factories}:make"), datasets.load_data(limit=50)
    small = compression.load(folder / "small.safetensors", architecture=f"{factories}:make")
    before, after = (evaluation.evaluate(x, images, progress=False) for x in (model, small))
    rows = {row[:27].strip(): row[27:].split("  ") for row in out.splitlines()}
    page = (folder / "index.html").read_text()
    for text in (str(before.top1), str(after.top1), str(evaluation.drop(before, after).points)):
        assert text in out
        assert text in page
    assert f"{(folder / 'small.safetensors').stat().st_size:,}" in rows["bytes in a file"][-1]
    assert rows["kernels stored"][-1].strip() == "10"
    assert [line.split("  ")[1] for line in out.splitlines()[-3:]] == [
        "kclib try package.module:factory --data folder:images", "make run", "make lab"
    ]  # fmt: skip
    assert 'src="data:image/png;base64,' in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


@pytest.mark.parametrize("error", [webbrowser.Error("none"), OSError("none"), None])
def test_a_first_try_ends_well_where_no_browser_opens(tried, monkeypatch, error):
    opened = []

    def refuse(address):
        opened.append(address)
        if error:
            raise error

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(webbrowser, "open", refuse)
    code, *_, folder = tried()
    assert (code, opened) == (0, [(folder / "index.html").as_uri()])


@pytest.fixture
def factories(monkeypatch, tmp_path):
    """The name of a module of tiny networks that can be imported."""
    (tmp_path / "kclib_test_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    yield "kclib_test_factories"
    sys.modules.pop("kclib_test_factories", None)


@pytest.fixture
def made(kclib, factories, tmp_path):
    """Compress a network of the factories; answer what was printed and where the file lies."""

    def make(*options, name="make", clusters=5):
        path = tmp_path / "model.safetensors"
        code, out, said = kclib(
            "compress", f"{factories}:{name}", "--clusters", clusters, "-o", path, *options
        )
        assert (code, said) == (0, "")
        return out, path

    return make


def test_a_model_of_a_module_in_this_folder_is_found_also_by_notebooks_and_workers(
    kclib, tmp_path, monkeypatch
):
    (tmp_path / "kclib_test_mine.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    assert kclib("compress", "kclib_test_mine:make", "--clusters", 5, "-o", "x.safetensors")[0] == 0
    del sys.modules["kclib_test_mine"]
    started = [sys.executable, "-c", "import kclib_test_mine"]
    monkeypatch.setattr(cli, "app", lambda **_: subprocess.run(started, cwd="/", check=True))
    assert cli.main() is None
    with pytest.raises(ImportError):
        importlib.import_module("kclib_test_mine")


def printed_bytes(text: str) -> dict[str, int]:
    found = re.findall(r"^ *([\d,]+)  (\w.*)$", text, re.MULTILINE)
    return {part: int(count.replace(",", "")) for count, part in found}


@pytest.mark.parametrize(
    "options", [(), ("--scaled", "--turned", "--precision", "int8")], ids=["plain", "both"]
)
def test_compressing_writes_a_file_and_says_what_its_bytes_are(made, options):
    out, path = made(*options)
    printed = printed_bytes(out)
    whole = printed.pop("bytes in all")
    assert sum(printed.values()) == whole == path.stat().st_size
    assert printed["codebooks"] == 10 * (11 if options else 36)
    assert printed.get("scales", 0) == (2 * (8 * 3 + 10 * 8) if options else 0)
    dense = 4 * (8 * 3 * 9 + 8 + 10 * 8 * 9 + 10)
    assert f"{dense / whole:.2f} times smaller than the {dense:,} bytes of the dense weights" in out
    assert out.splitlines()[-3] == str(path.resolve())


def test_without_data_compressing_ends_with_the_command_that_measures(kclib, made, factories):
    out, path = made()
    *_, said, command = out.splitlines()
    assert said.startswith("its accuracy was not measured; this does it (DATA: folder:PATH")
    assert shlex.split(command) == [
        "kclib",
        "evaluate",
        str(path),
        "--data",
        "DATA",
        "--model",
        f"{factories}:make",
    ]
    code, out, _ = kclib(*shlex.split(command.replace("DATA", "fashion-mnist"))[1:], "--limit", 20)
    assert (code, out.startswith("top-1 ")) == (0, True)


def test_a_shared_weight_counts_once_among_the_dense_bytes(made):
    out, _ = made(name="tied")
    assert f"than the {4 * (3 * 3 * 9 + 2 * 3)} bytes" in out


def test_the_options_of_compress_reach_the_file(made, tmp_path, factories):
    plain = _container.inspect(made()[1])
    assert plain.groups.index.tolist() == ["0", "2"]
    assert (plain.groups[["clusters", "turned", "seed", "precision"]] == [5, False, 0, "fp32"]).all(axis=None)
    assert plain.bytes["scales"] == 0
    assert (plain.description["architecture"], plain.description["accuracy"]) == (f"{factories}:make", None)
    options = ("--scope", "global", "--precision", "bf16", "--scaled", "--turned", "--seed", 3)
    other = _container.inspect(made(*options, clusters=7)[1])
    assert other.groups.loc["global", ["clusters", "kernels", "precision", "turned", "seed"]].tolist() == [
        7, 104, "bf16", True, 3
    ]  # fmt: skip
    assert other.bytes["scales"] == 2 * 104
    ones = {
        x: torch.ones_like(v) for x, v in loading.load_model(f"{factories}:make").network.state_dict().items()
    }
    save_file(ones, tmp_path / "ones.safetensors")
    out, path = made("--weights", tmp_path / "ones.safetensors")
    assert "0: 1 clusters in place of 5" in out
    loaded = compression.load(path, architecture=f"{factories}:make", resident="dense")
    assert all((value == 1).all() for value in loaded.network.state_dict().values())


def test_linear_weights_are_rounded_as_asked_and_a_part_of_their_own(made, kclib):
    for options, n_bytes in (
        ((), 4 * 10_000),
        (("--linear", "int8", "--indices", "fixed"), 10_000 + 2 * 1000),
        (("--linear", "int4", "--indices", "fixed"), 5000 + 2 * 1000),
    ):
        out, path = made(*options, name="headed")
        assert printed_bytes(out)["linear weights"] == n_bytes
        assert printed_bytes(kclib("inspect", path)[1])["linear weights"] == n_bytes
    assert _container.inspect(made("--linear", "int4", name="headed")[1]).bytes["linear weights"] <= n_bytes
    code, _, said = kclib(
        "compress", "kclib_test_factories:headed", "--clusters", 5, "-o", path, "--linear", "int9"
    )
    assert code == 2
    assert said.startswith("kclib: unknown precision of linear layers 'int9'")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("coding", "found"), [("entropy", {"group", "layer"}), ("fixed", {"fixed"})])
def test_indices_are_coded_as_asked_for(made, coding, found):
    out, path = made("--indices", coding, name="uneven", clusters=2)
    codings = set(_container.inspect(path).layers.coding)
    assert codings <= found | {"fixed"}
    assert codings & found
    assert ("frequency tables" in printed_bytes(out)) == (coding == "entropy")


def test_the_accuracy_on_a_data_set_is_kept_in_the_file(kclib, made, monkeypatch, factories):
    whole = datasets.load_data
    monkeypatch.setattr("kclib.load_data", lambda name, limit=None: whole(name, limit=40))
    out, path = made("--data", "fashion-mnist")
    top1 = _container.inspect(path).description["accuracy"]
    small = compression.load(path, architecture=f"{factories}:make")
    before, after = (
        evaluation.evaluate(x, whole(limit=40), progress=False)
        for x in (loading.load_model(f"{factories}:make"), small)
    )
    assert top1 == after.top1.estimate
    assert f"top-1 {top1:.2f} [" in out
    assert f"{evaluation.drop(before, after)}, from {before.top1} % of the dense network" in out
    assert f"accuracy {top1:.2f} %" in kclib("inspect", path)[1]


def test_inspecting_shows_groups_layers_and_bytes(kclib, made, factories):
    out, path = made("--turned")
    code, shown, said = kclib("inspect", path)
    contents = _container.inspect(path)
    assert (code, said) == (0, "")
    assert shown.startswith(f"architecture {factories}:make, accuracy unknown, written by kclib ")
    assert contents.sha256 in shown
    assert contents.groups.to_string() in shown
    assert contents.layers.drop(columns="same_as").to_string() in shown
    assert "[10, 8, 3, 3]" in shown
    assert "same_as" not in shown
    printed = printed_bytes(shown)
    assert printed == printed_bytes(out)
    assert printed.pop("bytes in all") == sum(printed.values()) == path.stat().st_size


def test_inspecting_says_which_layers_share_their_indices(kclib, made):
    shown = kclib("inspect", made(name="tied")[1])[1]
    rows = [line.split() for line in shown.splitlines() if "[3, 3, 3, 3]" in line]
    assert [(row[0], row[-1]) for row in rows] == [("0", "0"), ("1", "0")]
    assert "same_as" in shown


def test_a_file_is_inspected_without_its_network(kclib, made, monkeypatch):
    _, path = made()
    monkeypatch.setattr(_loading, "architecture", lambda name: pytest.fail("built"))
    sys.modules.pop("kclib_test_factories")
    assert kclib("inspect", path)[0] == 0
    assert "kclib_test_factories" not in sys.modules


def test_evaluating_a_factorys_file_needs_the_model(kclib, made, factories):
    _, path = made("--precision", "fp16")
    sys.modules.pop(factories)
    code, out, said = kclib("evaluate", path, "--limit", 50)
    assert (code, out) == (2, "")
    assert is_one_sentence(said)
    assert f"made from {factories}:make, and no module is imported on a file's word" in said
    assert factories not in sys.modules
    code, out, _ = kclib("evaluate", path, "--limit", 50, "--model", f"{factories}:make")
    loaded = compression.load(path, architecture=f"{factories}:make")
    found = evaluation.evaluate(loaded, datasets.load_data(limit=50), progress=False)
    assert code == 0
    assert out.startswith(f"top-1 {found.top1} % of 50 images, in ")
    assert found.notes
    assert out.splitlines()[1:] == list(found.notes)


def test_outputs_without_names_are_named_on_the_command_line(kclib, made, factories, tmp_path):
    path, model = made()[1], ("--model", f"{factories}:make")
    order = list(_loading.FASHION_CLASSES)
    for name in order[:3]:
        (place := tmp_path / "photos" / name.replace("/", "-")).mkdir(parents=True)
        Image.new("RGB", (28, 28), "grey").save(place / "a.png")
    data = ("--data", f"folder:{tmp_path / 'photos'}", *model)
    code, _, said = kclib("evaluate", path, *data)
    assert code == 2
    assert "--classes" in said
    answered = compression.load(path, architecture=f"{factories}:make").network(
        torch.full((1, 3, 28, 28), 128 / 255)
    )
    place = int(answered.argmax())  # all images are alike, so one class is right, if it is among them
    for names, top1 in ((order[-place:] + order[:-place], "33.33"), (order[3:] + order[:3], None)):
        code, out, _ = kclib("evaluate", path, *data, "--classes", ", ".join(names))
        assert code == 0
        assert out.startswith(f"top-1 {top1 or ('33.33' if names[place] in order[:3] else '0.00')} ")
    assert kclib("evaluate", path, *data, "--classes", "by position")[0] == 0
    assert kclib("evaluate", path, *data, "--classes", "by position", "--shape", 3, 20, 20)[0] == 0


def test_exported_files_answer_as_the_file_does(kclib, made, factories, tmp_path):
    _, path = made("--scaled")
    model = ("--model", f"{factories}:make")
    loaded = compression.load(path, architecture=f"{factories}:make")
    for name in ("model.onnx", "model.pt2"):
        code, out, _ = kclib("export", path, tmp_path / name, "--shape", 3, 28, 28, *model)
        size = (tmp_path / name).stat().st_size
        assert (code, out) == (0, f"{(tmp_path / name).resolve()}: {size:,} bytes\n")
    (image,) = onnx.load(tmp_path / "model.onnx").graph.input
    assert [axis.dim_value for axis in image.type.tensor_type.shape.dim] == [0, 3, 28, 28]
    program = torch.export.load(tmp_path / "model.pt2").module()
    images = torch.rand(4, 3, 28, 28)
    assert torch.equal(program(images), expand(loaded.network)(images))


def test_shape_and_dense_reach_the_exporter(kclib, made, factories, monkeypatch, tmp_path):
    asked = []

    def write(network, path, shape, **options):
        asked.append((shape, options))
        path.write_text("12345")

    monkeypatch.setattr("kclib.compression._exporting.to_onnx", write)
    monkeypatch.setattr("kclib.compression._exporting.to_program", write)
    _, path = made()
    model = ("--model", f"{factories}:make")
    assert kclib("export", path, tmp_path / "a.onnx", "--shape", 3, 9, 8, "--dense", *model)[0] == 0
    code, _, said = kclib("export", path, tmp_path / "a.onnx", *model)
    assert code == 2, "a network that takes images of every size"
    assert "--shape" in said
    assert kclib("export", path, tmp_path / "a.pt2", "--shape", 3, 9, 8, *model)[1].endswith(
        "a.pt2: 5 bytes\n"
    )
    assert asked == [((3, 9, 8), {"dense": True}), ((3, 9, 8), {})]


@pytest.mark.parametrize("name", ["model.txt", "model", "model.safetensors", "model.onnx.gz"])
def test_an_export_of_another_suffix_is_refused(kclib, made, factories, tmp_path, name):
    _, path = made()
    (tmp_path / "out").mkdir()
    code, out, said = kclib("export", path, tmp_path / "out" / name, "--model", f"{factories}:make")
    assert (code, out) == (2, "")
    assert is_one_sentence(said)
    assert "must end in .onnx or .pt2" in said
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("command", [("inspect",), ("evaluate",), ("export", "out.onnx")], ids=lambda x: x[0])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "is truncated or no safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"?"), "do not have the SHA-256"),
        (lambda path: path.write_bytes(b""), "is truncated or no safetensors file"),
        (lambda path: save_file({"a": torch.zeros(1)}, path), "holds no compressed model"),
    ],
    ids=["missing", "truncated", "changed", "empty", "other"],
)
def test_a_file_that_is_missing_or_damaged_is_one_sentence(
    kclib, made, factories, monkeypatch, tmp_path, command, damage, message
):
    _, path = made()
    damage(path)
    monkeypatch.chdir(tmp_path)
    model = () if command == ("inspect",) else ("--model", f"{factories}:make")
    code, out, said = kclib(command[0], path, *command[1:], *model)
    assert (code, out) == (2, "")
    assert is_one_sentence(said)
    assert message in said
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clusters", 81], "n_clusters is 81;"),
        (["--clusters", 5, "--scope", "laye"], "did you mean 'layer'?"),
        (
            ["--clusters", 5, "--precision", "fp8"],
            "unknown precision 'fp8'; known: fp32, fp16, bf16, int8, int4.",
        ),
        (
            ["--clusters", 5, "--indices", "fix"],
            "unknown coding of indices 'fix' (did you mean 'fixed'?); known: entropy, fixed.",
        ),
        (["--clusters", 5, "--weights", "absent"], "weights file absent does not exist"),
        (["--clusters", 5, "--data", "fashion"], "unknown data set 'fashion'"),
        (["--clusters", 5, "--seed", -1], "seed is -1"),
    ],
)
def test_a_compression_that_cannot_be_is_one_sentence_and_writes_nothing(
    kclib, factories, tmp_path, options, message
):
    code, _, said = kclib("compress", f"{factories}:make", "-o", tmp_path / "out" / "model", *options)
    assert code == 2
    assert is_one_sentence(said)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_what_was_compressed_is_written_before_it_is_evaluated(kclib, factories, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise InvalidValueError("no answers.")

    monkeypatch.setattr("kclib.evaluate", fails)
    path = tmp_path / "model.safetensors"
    options = ["--clusters", 5, "-o", path, "--data", "fashion-mnist"]
    code, out, said = kclib("compress", f"{factories}:make", *options)
    assert (code, said.strip()) == (2, "kclib: no answers.")
    assert str(path.resolve()) in out
    assert compression.load(path, architecture=f"{factories}:make")


@pytest.mark.parametrize("options", [["--clusters", 0], ["--clusters", "many"], []], ids=str)
def test_a_k_that_is_none_is_exit_code_2(kclib, factories, tmp_path, options):
    code, _, said = kclib("compress", f"{factories}:make", "-o", tmp_path / "model", *options)
    assert (code, "--clusters" in said, "Traceback" in said) == (2, True, False)
    assert not (tmp_path / "model").exists()


def test_a_model_that_is_unknown_or_another_is_one_sentence(kclib, made, tmp_path):
    _, path = made()
    for arguments, message in (
        (("compress", "vgg16-fashin", "--clusters", 5, "-o", tmp_path / "out"), "mean 'vgg16-fashion'?"),
        (("compress", "absent:make", "--clusters", 5, "-o", tmp_path / "out"), "could not be imported"),
        (("evaluate", path, "--model", "alexnet"), "load it into the architecture it was made from"),
        (
            ("export", path, tmp_path / "out.onnx", "--model", "kclib_test_factories:absent"),
            "could not be imported",
        ),
    ):
        code, _, said = kclib(*arguments)
        assert code == 2
        assert is_one_sentence(said)
        assert message in said


def test_a_compressed_file_that_cannot_be_written_is_exit_code_2(kclib, factories, tmp_path):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "model"
    code, _, said = kclib("compress", f"{factories}:make", "--clusters", 5, "-o", out)
    assert code == 2
    assert is_one_sentence(said)
    assert "could not be written" in said


def test_a_device_that_is_none_is_one_sentence(kclib, made, factories):
    code, _, said = kclib("evaluate", made()[1], "--model", f"{factories}:make", "--device", "nope")
    assert code == 2
    assert is_one_sentence(said)
