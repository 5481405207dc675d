"""The user's own factory of a network: found from where one works, called, and fenced."""

import contextlib
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

from kclib._util import places
from kclib._util.traces import where
from kclib.errors import InvalidValueError, KclibError, reason


def made(name: str) -> object:
    """Return what a factory makes.

    Parameters
    ----------
    name : str
        ``package.module:factory``: a function or class that needs no arguments. A module in the folder where
        one works is found first, whatever is installed under its name.

    Raises
    ------
    InvalidValueError
        There is no such module or factory, another module of that name is in use, or its code raised an
        error; the sentence says which, and where.
    """
    module_name, _, factory_name = name.partition(":")
    with _this_folder_first():
        factory = _found(name, _imported(name, module_name), factory_name)
        _check_callable(name, factory)
        try:
            return factory()
        except (KclibError, KeyboardInterrupt):
            raise
        except BaseException as error:  # of the user's own code, such as SystemExit
            raise InvalidValueError(f"{name!r} failed: {_said(error)}.") from error


def _imported(name: str, module_name: str) -> ModuleType:
    if module_name.endswith(".py") or not all(part.isidentifier() for part in module_name.split(".")):
        raise InvalidValueError(
            f"model {name!r} could not be imported ({module_name!r} is no module's name); it must be "
            "package.module:factory, such as mine:make for the function make of mine.py."
        )
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise InvalidValueError(
                f"model {name!r} could not be imported: its code needs {_said(error)}; install it here."
            ) from error
        raise InvalidValueError(
            f"model {name!r} could not be imported ({reason(error)}); it must be package.module:factory, "
            f"importable from where you run, {os.getcwd()}."
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise InvalidValueError(f"model {name!r} could not be imported: {_said(error)}.") from error


def _found(name: str, module: ModuleType, factory_name: str) -> Callable:
    """Return a module's factory by its name."""
    factory = module
    for part in factory_name.split("."):
        factory = getattr(factory, part, None)
    if factory is not None:
        return factory
    path = Path(getattr(module, "__file__", None) or "")
    local = Path.cwd().joinpath(*module.__name__.split(".")).with_suffix(".py")
    if local.is_file() and not (path.is_file() and path.samefile(local)):
        raise InvalidValueError(
            f"model {name!r} could not be imported: Python already uses another module {module.__name__} "
            f"({path}); give {local} another name."
        )
    callables = [x for x, value in vars(module).items() if callable(value) and not x.startswith("_")]
    near = difflib.get_close_matches(factory_name, callables, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise InvalidValueError(
        f"model {name!r} could not be imported: {path or module.__name__} has no {factory_name!r}{hint}; it "
        "must be package.module:factory."
    )


def _check_callable(name: str, factory: object) -> None:
    """Refuse what cannot be called without arguments, or is the network already."""
    network = hasattr(factory, "state_dict") and not inspect.isclass(factory)
    if network or not callable(factory):
        raise InvalidValueError(
            f"{name!r} could not be called without arguments (it is of type {type(factory).__name__}); "
            "it must be a factory, a function that makes the network."
        )
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise InvalidValueError(
            f"{name!r} could not be called without arguments ({reason(error)}); it must be a factory."
        ) from error
    except ValueError:  # code without a signature: it is called to see
        pass


def _said(error: BaseException) -> str:
    """Return what the user's code raised, and where."""
    if isinstance(error, SyntaxError):
        place = f" in {Path(error.filename or '').name}, line {error.lineno}"
        return f"{type(error).__name__}: {error.msg}{place}"
    return f"{type(error).__name__}: {reason(error)}{where(error)}"


@contextlib.contextmanager
def own_modules() -> Iterator[None]:
    """Make modules in the current folder importable, also for the notebooks and workers that are started."""
    places.check_folder()
    folder, before = os.getcwd(), sys.path
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), folder]
    sys.path = [*before, folder]
    try:
        with places.environment({"PYTHONPATH": os.pathsep.join(paths)}):
            yield
    finally:
        sys.path = before


@contextlib.contextmanager
def _this_folder_first() -> Iterator[None]:
    """Search the current folder for modules first, and come back to it.

    Afterwards it is searched last, for what is imported or unpickled later.
    """
    places.check_folder()
    folder = os.getcwd()
    importlib.invalidate_caches()  # a file may just have been written
    sys.path.insert(0, folder)
    try:
        with contextlib.chdir(folder):  # other people's code may go elsewhere
            yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
