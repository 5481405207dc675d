import ast
import doctest
import importlib
import os
import pkgutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

import kclib

NAMES = [
    "load_model", "load_data", "Model", "ImageSet", "extract", "insert", "KernelBank", "cluster",
    "Clustering", "compress", "expand", "save", "load", "export", "footprint", "evaluate", "drop",
    "Evaluation", "shrink", "finetune", "sweep", "explore", "kmeans", "similarity", "plots",
]  # fmt: skip
HOME = Path(kclib.__file__).parent
ROOMS = [x.name for x in pkgutil.iter_modules(kclib.__path__) if x.ispkg]
MODULES = [x.relative_to(HOME) for x in sorted(HOME.rglob("*.py"))]


def private_names(module: Path) -> list[str]:
    """Return what a module uses of other rooms though its name begins with an underscore."""
    tree, room = ast.parse((HOME / module).read_text()), module.parts[0].removesuffix(".py")
    taken = {}  # by the name it has here, its path below kclib
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kclib":
            paths = {x.asname or x.name: (*node.module.split("."), x.name)[1:] for x in node.names}
            taken |= {name: path for name, path in paths.items() if path[0] != room}
    used = [
        (*taken[node.value.id], node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in taken
    ]
    return sorted(".".join(x) for x in (*taken.values(), *used) if any(y.startswith("_") for y in x[1:]))


@pytest.mark.parametrize("module", ["kclib", "kclib.cli"])
def test_import_loads_neither_torch_nor_numba(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'numba', 'pandas'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_door_has_the_names_of_the_design():
    assert sorted(kclib.__all__) == sorted(NAMES)


def test_names_are_completed_before_they_are_used():
    code = "import kclib; print(*dir(kclib))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) >= set(NAMES)


@pytest.mark.parametrize("name", ["kclib", *NAMES])
def test_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    documented = kclib if name == "kclib" else getattr(kclib, name)
    found = doctest.DocTestFinder(recurse=False).find(documented, name, globs={})
    assert found, f"{name} has no example"
    said, runner = [], doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        failed = runner.run(found[0], out=said.append).failed
    assert not failed, "".join(said)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("room", ROOMS)
def test_room_hands_out_its_names(room):
    found = importlib.import_module(f"kclib.{room}")
    names = getattr(found, "__all__", [])
    assert names or room == "_util"
    for name in names:
        getattr(found, name)
    assert not {x.name for x in pkgutil.iter_modules(found.__path__)} & set(names)


def test_no_private_name_crosses_rooms():
    assert {str(x): private for x in MODULES if (private := private_names(x))} == {}


def test_picture_of_the_rooms_is_what_the_linter_holds():
    root = HOME.parent
    layers = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0][
        "layers"
    ]
    picture = (root / "CONTRIBUTING.md").read_text().split("```text\n")[1].split("```")[0]
    assert [line.split("  ")[0] for line in picture.splitlines()] == layers
