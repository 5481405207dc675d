import re

import nbformat
import papermill
import pytest

from kclib import parameters, profiles
from kclib.errors import InvalidValueError, UnknownNameError

RIGHT = [
    ("int", 3),
    ("int", -1),
    ("float", 3),
    ("float", 0.5),
    ("str", ""),
    ("bool", False),
    ("list", []),
    ("list", [1, "a"]),
    ("list[int]", [1, 2]),
    ("list[int]", []),
    ("list[float]", [1, 0.5]),
    ("list[int | None]", [1, None]),
    ("str | None", None),
    ("Path", 3),
    ("dict[str, int]", 3),
    ("", 3),
    ("no type at all", 3),
]
WRONG = [
    ("int", "3"),
    ("int", 3.0),
    ("int", True),
    ("int", None),
    ("int", [3]),
    ("float", "0.5"),
    ("float", True),
    ("float", float("nan")),
    ("str", 3),
    ("str", None),
    ("bool", 1),
    ("bool", "yes"),
    ("list", None),
    ("list", "layer"),
    ("list", 3),
    ("list[int]", [1, 2.5]),
    ("list[int]", ["64"]),
    ("list[int]", [True]),
    ("list[str]", "layer"),
    ("list[int | None]", [0.5]),
    ("str | None", 3),
]


@pytest.mark.parametrize(("annotation", "value"), RIGHT)
def test_a_value_of_the_declared_type_is_taken(annotation, value):
    parameters.check_value("k", value, annotation)


@pytest.mark.parametrize(("annotation", "value"), WRONG)
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
    parameters.check(namespace | {"In": ["", "seeed = 2", "kclib.parameters.check(globals())"]})
    with pytest.raises(UnknownNameError, match="did you mean 'seed'"):
        parameters.check(
            namespace | {"In": ["", "# Parameters\nseeed = 2\nseed = 1\n", "parameters.check()"]}
        )


NOTEBOOKS = sorted(profiles.NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_every_notebook_checks_its_parameters_first(path):
    cells = [x for x in nbformat.read(path, as_version=4).cells if x.cell_type == "code"]
    (place,) = [i for i, x in enumerate(cells) if "parameters" in x.metadata.get("tags", ())]
    assert cells[place + 1].source.startswith("parameters.check(globals())\n")
    if "dashboard" in cells[place].metadata.tags:
        assert "dashboard" in cells[place + 1].metadata.tags
    declared = profiles.declared(path)
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
        nbformat.v4.new_code_cell("from kclib import parameters"),
        nbformat.v4.new_code_cell(
            "limit: int = 3\nscopes: list[str] = ['layer']", metadata={"tags": ["parameters"]}
        ),
        nbformat.v4.new_code_cell("parameters.check(globals())\nprint(limit)"),
    ]
    kernel = {"name": "python3", "display_name": "Python", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"limit": 5}, ""),
        ({"limit": "2e3"}, "limit is '2e3'"),
        ({"scopes": "layer"}, "scopes is 'layer'"),
        ({"limt": 5}, "unknown parameter"),
    ],
)
def test_papermill_alone_is_told_too(notebook, tmp_path, given, sentence, seen):
    def run():
        papermill.execute_notebook(
            notebook, tmp_path / "out.ipynb", given, progress_bar=False, kernel_name="python3"
        )

    if not sentence:
        run()
        assert "5\n" in (tmp_path / "out.ipynb").read_text().replace("\\n", "\n")
        return
    with pytest.raises(papermill.PapermillExecutionError) as found:
        run()
    assert sentence in found.value.evalue
    ((name, value),) = given.items()
    seen(
        "Notebooks",
        f"`papermill -p {name} {value}`",
        f"the cell after the parameters ends in `{found.value.evalue}`",
    )
