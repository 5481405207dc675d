import re

import nbformat
import papermill
import pytest

from kclib.errors import InvalidValueError, UnknownNameError
from kclib.experiments import _profiles, parameters

RIGHT = [
    ("int", [3, -1]),
    ("float", [3, 0.5]),
    ("str", ["", "a"]),
    ("bool", [False]),
    ("list", [[], [1, "a"]]),
    ("list[int]", [[], [1, 2]]),
    ("list[float]", [[1, 0.5]]),
    ("list[int | None]", [[1, None]]),
    ("str | None", [None, "a"]),
    *((other, [3]) for other in ("Path", "dict[str, int]", "", "no type at all")),
]
WRONG = [
    ("int", ["3", 3.0, True, None, [3]]),
    ("float", ["0.5", True, float("nan"), None]),
    ("str", [3, None]),
    ("bool", [1, "yes"]),
    ("list", [None, "layer", 3]),
    ("list[int]", [[1, 2.5], ["64"], [True], "64", 64]),
    ("list[str]", ["layer"]),
    ("list[int | None]", [[0.5]]),
    ("str | None", [3]),
]


def each(cases: list) -> list:
    return [(annotation, value) for annotation, values in cases for value in values]


@pytest.mark.parametrize(("annotation", "value"), each(RIGHT))
def test_a_value_of_the_declared_type_is_taken(annotation, value):
    parameters.check_value("k", value, annotation)


@pytest.mark.parametrize(("annotation", "value"), each(WRONG))
def test_another_value_is_one_sentence_with_the_parameters_name(annotation, value):
    with pytest.raises(InvalidValueError, match="parameter k is"):
        parameters.check_value("k", value, annotation)


@pytest.mark.parametrize("value", ["2e3", 2000.0, "2000", "2000.0"])
def test_what_yaml_reads_otherwise_is_written_out(value):
    with pytest.raises(InvalidValueError, match="such as 2000"):
        parameters.check_value("limit", value, "int")


def test_a_namespace_is_checked_by_its_annotations():
    kinds = {"a": int, "b": list[int], "c": float, "d": "str | None"}
    parameters.check({"__annotations__": kinds, "a": 1, "b": [2], "c": 3, "d": None, "other": object()})
    with pytest.raises(InvalidValueError, match="parameter b is"):
        parameters.check({"__annotations__": kinds, "a": 1, "b": ["2"], "c": 3, "d": None})
    parameters.check({})


def test_a_name_that_is_not_declared_is_unknown_only_where_papermill_gives_it():
    namespace = {"__annotations__": {"seed": int}, "seed": 1, "seeed": 2}
    parameters.check(namespace | {"In": ["", "seeed = 2", "kclib.experiments.parameters.check(globals())"]})
    with pytest.raises(UnknownNameError, match="did you mean 'seed'"):
        parameters.check(
            namespace | {"In": ["", "# Parameters\nseeed = 2\nseed = 1\n", "parameters.check()"]}
        )


NOTEBOOKS = sorted(_profiles.NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_every_notebook_checks_its_parameters_first(path):
    cells = [x for x in nbformat.read(path, as_version=4).cells if x.cell_type == "code"]
    (place,) = [i for i, x in enumerate(cells) if "parameters" in x.metadata.get("tags", ())]
    assert cells[place + 1].source.startswith("parameters.check(globals())\n")
    if "dashboard" in cells[place].metadata.tags:
        assert "dashboard" in cells[place + 1].metadata.tags
    declared = _profiles.declared(path)
    names = re.findall(r"^(\w+)(?:: | = )", cells[place].source, re.MULTILINE)
    assert [*declared] == names
    assert all(declared.values())
    for name, about in papermill.inspect_notebook(path).items():
        default = eval(about["default"], {})
        parameters.check_value(name, default, declared[name])


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """A notebook that has parameters, checks them, and does nothing else."""
    path = tmp_path_factory.mktemp("notebook") / "one.ipynb"
    cells = [
        nbformat.v4.new_code_cell("from kclib.experiments import parameters"),
        nbformat.v4.new_code_cell(
            "limit: int = 3\nscopes: list[str] = ['layer']", metadata={"tags": ["parameters"]}
        ),
        nbformat.v4.new_code_cell("parameters.check(globals())\nprint(limit)"),
    ]
    kernel = {"name": "python3", "display_name": "Python", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.mark.parametrize(
    ("command", "given", "sentence"),
    [
        ("papermill -p limit 2e3", {"limit": 2000.0}, "limit is 2000"),
        ("papermill -r limit 2e3", {"limit": "2e3"}, "limit is '2e3'"),
        ("papermill -p limt 5", {"limt": 5}, "unknown parameter 'limt'"),
    ],
)
def test_papermill_alone_is_told_too(notebook, tmp_path, command, given, sentence, seen):
    def run():
        papermill.execute_notebook(
            notebook, tmp_path / "out.ipynb", given, progress_bar=False, kernel_name="python3"
        )

    with pytest.raises(papermill.PapermillExecutionError) as found:
        run()
    assert sentence in found.value.evalue
    seen(
        "Notebooks",
        f"`{command}`",
        f"the cell after the parameters ends in `{found.value.evalue}`",
    )
