"""Whatever a user's factory does: a sentence that says where, or the work is done all the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from sentences import is_one_sentence
from what_happens import told

KIND = "Your code"
pytestmark = pytest.mark.usefixtures("one_thread")
# What a factory does, and its code.
WRONG = {
    "it raises an exception": "def make():\n    raise ValueError('no\\nsuch GPU')",
    "it ends the process": "import sys\ndef make():\n    sys.exit('no GPU')",
    "it raises what is no `Exception`": "def make():\n    raise GeneratorExit",
    "it calls itself for ever": "def make():\n    return make()",
    "it has no memory": "def make():\n    raise MemoryError",
    "its module has a syntax error": "def make(:\n    pass",
    "its module needs a package that is not installed": "import no_such_package\ndef make(): pass",
    "its module raises": "1 / 0\ndef make(): pass",
    "its module ends the process": "raise SystemExit(0)",
    "it returns no network": "def make():\n    return 'network'",
    "it takes arguments": "def make(n_classes): pass",
    "it is no function": "make = 3",
    "there is none of that name": "def made(): pass",
}
MADE = "import os, sys\nfrom tiny import tiny_model\ndef make():\n"
RIGHT = {
    "it prints, and the file goes to standard output": f"{MADE}    print('hello')\n"
    "    os.write(1, b'hello')\n    os.system('echo hello')\n"
    "    sys.__stdout__.write('hello')\n    return tiny_model()",
    "it changes the working folder": f"{MADE}    os.chdir('/')\n    return tiny_model()",
}


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """Writes a module of a name of its own."""
    monkeypatch.syspath_prepend(Path(tiny.__file__).parent)
    monkeypatch.chdir(tmp_path)
    name = "own" + "".join(x for x in request.node.name if x.isalpha())

    def write(text: str) -> str:
        Path(f"{name}.py").write_text(text)
        return name

    return write


@pytest.mark.parametrize("what", WRONG)
def test_what_ends_in_a_sentence(module, kclib, seen, what):
    name = module(WRONG[what])
    code, _, said = kclib("compress", f"{name}:make", "--clusters", "2", "-o", "x")
    assert (code, is_one_sentence(said), os.path.exists("x")) == (2, True, False), said
    seen(KIND, what, told(code, said, mine=name, FOLDER=Path.cwd()))


def test_ctrl_c_in_a_factory(module, kclib, seen):
    name = module("def make():\n    raise KeyboardInterrupt")
    code, _, said = kclib("compress", f"{name}:make", "--clusters", "2", "-o", "x")
    assert code == 130
    seen(KIND, "Ctrl-C comes while it works", told(code, said))


def shell_out(name: str, file) -> int:
    """Compress to standard output, which is a file; return the exit code."""
    command = [sys.executable, "-m", "kclib", "compress", name, "--clusters", "2", "-o", "-"]
    path = os.pathsep.join([str(Path(tiny.__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run(
        command, stdout=file, stderr=subprocess.PIPE, env=environment, check=False
    ).returncode


@pytest.mark.parametrize("what", RIGHT)
def test_what_is_of_no_matter(module, kclib, seen, what):
    name = module(RIGHT[what])
    folder = Path.cwd()
    code, out, said = kclib("compress", f"{name}:make", "--clusters", "2", "-o", "/dev/null")
    assert code == 0, said
    assert (code, Path.cwd(), "hello" in out) == (0, folder, "prints" in what)
    with open("whole", "wb") as file:
        code = shell_out(f"{name}:make", file)
    kclib("compress", f"{name}:make", "--clusters", "2", "-o", folder / "file")
    assert (code, Path("whole").read_bytes()) == (0, Path("file").read_bytes())
    seen(KIND, what, "the file is what it would be")
