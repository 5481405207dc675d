"""The user's own factory: found where one works, and its faults said with file and line."""

import os
import re
import sys
from pathlib import Path

import pytest

from kclib import loading
from kclib.errors import InvalidValueError, MissingFileError
from kclib.models import _factories

MAKE = "from torch import nn\ndef make():\n    return nn.Conv2d(3, 2, 3)\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes modules into the folder where one works; they are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def written(**texts: str) -> Path:
        for name, text in texts.items():
            Path(f"{name}.py").write_text(text)
        return tmp_path

    yield written
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["mine", "turtledemo", "models", "kernels", "this"])
def test_a_module_where_one_works_is_found_whatever_else_has_its_name(write, name):
    write(**{name: MAKE})
    assert name not in sys.modules, "what is imported already is another test"
    assert loading.load_model(f"{name}:make").network.out_channels == 2


def test_modules_beside_it_are_found_also_when_they_are_imported_later(write):
    late = "def make():\n    import kclib_test_later\n    return kclib_test_later.make()\n"
    write(kclib_test_beside=MAKE, kclib_test_later=MAKE, kclib_test_late=late)
    write(kclib_test_first="from kclib_test_beside import make\n")
    assert loading.load_model("kclib_test_first:make").network.out_channels == 2
    assert loading.load_model("kclib_test_late:make").network.out_channels == 2
    assert os.getcwd() in sys.path, "for what is unpickled later"


def test_a_name_that_python_itself_uses_is_said_with_both_files(write):
    folder = write(random=MAKE)
    with pytest.raises(InvalidValueError, match="another name") as found:
        loading.load_model("random:make")
    assert str(folder / "random.py") in str(found.value)
    assert sys.modules["random"].__file__ in str(found.value)


CLASSES = """
from torch import nn

class Net(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 2, 3)

    @classmethod
    def made(cls):
        return cls()

def with_defaults(n=2, *args, **options):
    return nn.Conv2d(3, n, 3)
"""


@pytest.mark.parametrize("name", ["Net", "Net.made", "with_defaults"])
def test_what_needs_no_arguments_is_a_factory(write, name):
    write(kclib_test_classes=CLASSES)
    assert loading.load_model(f"kclib_test_classes:{name}").network.out_channels == 2


FAULTS = {
    "def make(:\n": ["SyntaxError", "kclib_test_faulty.py, line 1"],
    "\nimport absent_package\n": ["needs ModuleNotFoundError", "absent_package", "line 2"],
    "\n\nx = 1 / 0\n": ["ZeroDivisionError", "kclib_test_faulty.py, line 3"],
    "import sys\nsys.exit('usage')\n": ["SystemExit: usage", "kclib_test_faulty.py, line 2"],
    "def make():\n    return {}['width']\n": ["failed: KeyError", "kclib_test_faulty.py, line 2"],
    "def make():\n    return len(3)\n": ["failed: TypeError", "kclib_test_faulty.py, line 2"],
    "import torch\ndef make():\n    return torch.nn.Conv2d(3, 2, 3)(torch.ones(1, 1, 5, 5))\n": [
        "failed: RuntimeError", "kclib_test_faulty.py, line 3"
    ],
    "def make(width):\n    pass\n": ["without arguments", "'width'"],
    "import torch\nmake = torch.nn.Conv2d(3, 2, 3)\n": ["type Conv2d", "makes the network"],
    "make = 3\n": ["it is of type int"],
    "def mak():\n    pass\n": ["no 'make'", "did you mean 'mak'"],
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_of_the_users_code_is_one_sentence_with_its_place(write, text):
    write(kclib_test_faulty=text)
    with pytest.raises(InvalidValueError) as found:
        loading.load_model("kclib_test_faulty:make")
    said = str(found.value)
    assert re.fullmatch(r"[^\n]{20,400}\.", said), said
    assert all(part in said for part in ("'kclib_test_faulty:make'", *FAULTS[text])), said
    if "Error" in said:
        assert found.value.__cause__ is not None


def test_a_sentence_of_ours_in_the_users_code_stays_as_it_is(write):
    text = "from kclib import loading\ndef make():\n    loading.load_model(weights='absent.pt')\n"
    write(kclib_test_weights=text)
    with pytest.raises(MissingFileError, match=r"absent\.pt does not exist"):
        loading.load_model("kclib_test_weights:make")


@pytest.mark.parametrize("name", ["mine.py:make", "./mine:make", "nets/mine.py:make", ":make", "mine.:make"])
def test_a_path_in_place_of_a_module_is_refused_and_nothing_is_imported(write, name):
    write(mine="raise SystemExit(9)")
    with pytest.raises(InvalidValueError, match="no module's name"):
        _factories.made(name)


@pytest.mark.parametrize("name", ["w.pt", "resnet18.pth", "small.safetensors", "net.onnx", "mine.py"])
def test_a_file_in_place_of_a_model_is_told_from_a_wrong_name(name):
    with pytest.raises(InvalidValueError, match=f"'{name}' is a file's name"):
        loading.load_model(name)
