import ast
import doctest
import importlib
import os
import pkgutil
import re
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


# What a name is made public for; a class may also be what a function takes or returns.
READERS = [
    *HOME.parent.glob("notebooks/*.ipynb"),
    *HOME.parent.glob("docs/*.md"),
    *HOME.parent.glob("benchmarks/*.py"),
    HOME.parent / "README.md",
    HOME.parent / "data" / "train.py",
    HOME / "cli.py",
]


def is_private(module: Path) -> bool:
    return any(x.startswith("_") and x != "__init__.py" for x in module.parts)


def defined(module: Path) -> set[str]:
    """Return the names that a module defines and that do not begin with an underscore."""
    found = set()
    for node in ast.parse((HOME / module).read_text()).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found |= {x.id for x in targets if isinstance(x, ast.Name)}
        found |= {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else set()
    return {x for x in found if not x.startswith("_")}


def annotated() -> set[str]:
    """Return every name in an annotation of the library."""
    nodes = [node for x in MODULES for node in ast.walk(ast.parse((HOME / x).read_text()))]
    found = [y for x in nodes for y in (getattr(x, "annotation", None), getattr(x, "returns", None)) if y]
    return set(re.findall(r"\w+", " ".join(map(ast.unparse, found))))


def handed_out(room: str) -> list[str]:
    return getattr(importlib.import_module(f"kclib.{room}"), "__all__", [])


def private_names(module: Path) -> list[str]:
    """Return what a module uses of other rooms that begins with an underscore and is no module."""
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
    modules = {x.with_suffix("").parts for x in MODULES}
    return sorted(
        ".".join(x) for x in (*taken.values(), *used) if re.match("_[^_]", x[-1]) and x not in modules
    )


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


def test_public_names_are_few():
    """Those of modules that are public, and those that rooms hand out from modules that are not.

    What ``cli.py`` defines are commands, which nobody imports.
    """
    modules = [x for x in MODULES if not is_private(x) and x.name != "cli.py"]
    public = [(x.parts[0], name) for x in modules for name in defined(x)]
    handed = {(room, name) for room in ROOMS for name in handed_out(room)}
    assert 150 < len(public) + len(handed - {*public}) <= 200


@pytest.mark.parametrize("room", ROOMS)
def test_names_that_a_room_hands_out_are_used_outside_the_library(room):
    used = set(re.findall(r"\w+", "\n".join(x.read_text() for x in READERS))) | {*NAMES}
    used |= {x for x in annotated() if x[0].isupper()}
    assert {*handed_out(room)} - used == set()


def test_no_private_name_crosses_rooms():
    assert {str(x): private for x in MODULES if (private := private_names(x))} == {}


def test_picture_of_the_rooms_is_what_the_linter_holds():
    root = HOME.parent
    layers = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0][
        "layers"
    ]
    picture = (root / "CONTRIBUTING.md").read_text().split("```text\n")[1].split("```")[0]
    assert [line.split("  ")[0] for line in picture.splitlines()] == layers
