"""Parameters of notebooks: what is given is what the notebook declares, whoever gives it."""

import ast
from collections.abc import Iterable, Mapping

from kclib._util import checks
from kclib.errors import InvalidValueError, UnknownNameError

_INJECTED = "# Parameters"  # how papermill begins the cell that it puts in
_SAID = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "True or False",
    "list": "a list",
}


def check(namespace: Mapping[str, object]) -> None:
    """Check the parameters of the notebook that calls this, in the first cell after them.

    Parameters
    ----------
    namespace : mapping of str to object
        ``globals()``, where the parameters' cell has left its annotations, and IPython the cells that ran.

    Raises
    ------
    UnknownNameError
        A name was given that the notebook does not declare.
    InvalidValueError
        A value that is not of the declared type.
    """
    declared = namespace.get("__annotations__", {})
    for name in _injected(namespace.get("In", ())):
        if name not in declared:
            raise UnknownNameError("parameter", name, declared)
    for name, annotation in declared.items():
        check_value(name, namespace.get(name), _text(annotation))


def check_value(name: str, value: object, annotation: str) -> None:
    """Raise an `InvalidValueError` unless a value is of a declared type; unknown types are not checked.

    Parameters
    ----------
    annotation : str
        As it is written: of int, float, str, bool, list, None, ``list[...]`` and ``|``.
    """
    try:
        wanted = ast.parse(annotation, mode="eval").body
    except SyntaxError:
        return
    if not _fits(value, wanted):
        must = f"it must be {_said(wanted)}{_hint(value, wanted)}"
        raise InvalidValueError(f"parameter {name} is {checks.said(value)}; {must}.")


def _injected(cells: Iterable[str]) -> list[str]:
    """Return the names that papermill's cell gives values, if one ran just now."""
    given = [x for x in [*cells][-2:] if x.startswith(_INJECTED)]
    statements = [x for source in given for x in ast.parse(source).body if isinstance(x, ast.Assign)]
    return [target.id for x in statements for target in x.targets if isinstance(target, ast.Name)]


def _text(annotation: object) -> str:
    """Return an annotation as it is written."""
    return annotation.__name__ if type(annotation) is type else str(annotation)


def _fits(value: object, wanted: ast.expr) -> bool:
    match wanted:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return _fits(value, left) or _fits(value, right)
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return isinstance(value, (list, tuple)) and all(_fits(x, inner) for x in value)
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id="int"):
            return checks.is_whole(value)
        case ast.Name(id="float"):
            return checks.is_real(value)
        case ast.Name(id="str"):
            return isinstance(value, str)
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="list"):
            return isinstance(value, (list, tuple))
    return True


def _said(wanted: ast.expr) -> str:
    """Return a type for readers."""
    match wanted:
        case ast.BinOp(left=left, right=right):
            return f"{_said(left)} or {_said(right)}"
        case ast.Subscript(slice=inner):
            return f"a list, each of it {_said(inner)}"
        case ast.Name(id=name):
            return _SAID.get(name, name)
    return ast.unparse(wanted)


def _hint(value: object, wanted: ast.expr) -> str:
    """Return what may be meant: YAML reads 2e3 as text, and JSON 2000.0 as no whole number."""
    try:
        number = float(value) if isinstance(value, (str, float)) else float("nan")
    except ValueError:
        return ""
    whole = isinstance(wanted, ast.Name) and wanted.id == "int" and number.is_integer()
    return f", such as {int(number)}" if whole else ""
