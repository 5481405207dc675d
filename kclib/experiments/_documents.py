"""YAML documents that know their lines: what is wrong with one is a sentence that says where."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import yaml

from kclib._util import checks
from kclib.errors import DamagedFileError, InvalidValueError, MissingFileError, UnknownNameError, reason

_LARGEST = 1 << 20  # bytes: more was not written by hand
_JSON = jsonschema.Draft202012Validator.TYPE_CHECKER
_FINITE = _JSON.redefine("number", lambda _, x: _JSON.is_type(x, "number") and abs(x) < math.inf)
_Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=_FINITE)


@dataclass(frozen=True)
class Document:
    """A YAML file of mappings, lists and plain values.

    Attributes
    ----------
    path : Path
    content : object
    lines : mapping of tuple to int
        The line, from 1, of what is at the keys and places of a tuple.
    """

    path: Path
    content: object
    lines: Mapping[tuple, int]

    @classmethod
    def read(cls, path: Path) -> "Document":
        """Read a file.

        Raises
        ------
        MissingFileError
        DamagedFileError
            It is not YAML, names types of its own, repeats a key, or refers to other parts of itself.
        """
        try:
            if path.stat().st_size > _LARGEST:
                raise DamagedFileError(f"{path} has more than {_LARGEST:,} bytes, which no profile needs.")
            text = path.read_text(encoding="utf-8")
            _check_no_references(path, text)
            node = yaml.compose(text, yaml.SafeLoader)
            lines = dict(_lines(path, node)) if node else {}
            return cls(path, yaml.safe_load(text), lines)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise MissingFileError(f"{path} is no file ({error.strerror}).") from error
        except OSError as error:
            raise DamagedFileError(f"{path} could not be read ({error.strerror}).") from error
        except yaml.YAMLError as error:
            mark, said = (getattr(error, name, None) for name in ("problem_mark", "problem"))
            place = f"line {mark.line + 1} of {path}" if mark else path
            raise DamagedFileError(f"{place} is not plain YAML ({said or reason(error)}).") from error
        except UnicodeDecodeError as error:
            raise DamagedFileError(f"{path} is not UTF-8 text; save it as UTF-8.") from error
        except (ValueError, OverflowError, RecursionError) as error:  # such as a date of month 13
            raise DamagedFileError(f"{path} is not plain YAML ({reason(error)}).") from error

    def where(self, *place: str | int) -> str:
        """Return the line of what is at these keys and places, or of the nearest around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return f"line {self.lines.get(place, 1)} of {self.path.name}"

    def check(self, schema: Mapping) -> None:
        """Raise an error that names the first line which is not as a JSON schema wants it.

        What must be is told by the ``description`` of a part of the schema, or by its ``enum``.

        Raises
        ------
        UnknownNameError
            A key that the schema does not have.
        InvalidValueError
        """
        errors = _Validator(schema).iter_errors(self.content)
        first = min(errors, key=lambda x: self.lines.get(tuple(x.absolute_path), 0), default=None)
        if first is not None:
            raise self._error(first)

    def _error(self, error: jsonschema.ValidationError) -> InvalidValueError | UnknownNameError:
        place = tuple(error.absolute_path)
        if error.validator == "additionalProperties":
            known = list(error.schema["properties"])
            unknown = next(key for key in error.instance if key not in known)
            return UnknownNameError(f"key in {self.where(*place, unknown)}", unknown, known)
        if error.validator == "required":
            missing = next(key for key in error.validator_value if key not in error.instance)
            return InvalidValueError(
                f"{self.where(*place)}: {_name(place)} has no {missing}; it must have one."
            )
        if error.parent is None and "propertyNames" in error.absolute_schema_path:
            place = (*place, error.instance)
        must = error.schema.get("description") or "one of " + ", ".join(error.schema.get("enum", ()))
        return InvalidValueError(
            f"{self.where(*place)}: {_name(place)} is {checks.said(error.instance)}; it must be {must}."
        )


def _check_no_references(path: Path, text: str) -> None:
    """Refuse anchors and aliases: nine lines of them can stand for a thousand million values."""
    for token in yaml.scan(text, yaml.SafeLoader):
        if isinstance(token, (yaml.AliasToken, yaml.AnchorToken)):
            line = token.start_mark.line + 1
            raise DamagedFileError(f"line {line} of {path} refers to another part; write the value in place.")


def _lines(path: Path, node: yaml.Node, place: tuple = ()) -> Iterator[tuple[tuple, int]]:
    """Yield every place below a node and its line."""
    yield place, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line, name = key.start_mark.line + 1, key.value
            if key.tag != "tag:yaml.org,2002:str":
                raise DamagedFileError(f"line {line} of {path} has a key that is no text; put it in quotes.")
            if name in seen:
                raise DamagedFileError(
                    f"line {line} of {path} repeats the key {name!r}; it must be there once."
                )
            seen.add(name)
            yield from _lines(path, value, (*place, name))
            yield (*place, name), line
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _lines(path, value, (*place, i))


def _name(place: tuple) -> str:
    return ".".join(map(str, place)) or "the whole"
