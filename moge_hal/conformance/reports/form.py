"""JSON into dataclasses, or one sentence that says what is wrong with it and where.

The type hints of a dataclass are the only description of the form: there is no second one that
could say something else.

Every text is one line without hidden characters: a terminal or a log would obey an escape sequence,
and a line break would begin a line that reads like one of ours. `cleaned` is for who writes.
"""

import json
import math
import types
import unicodedata
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from moge_hal.errors import UserError, is_number

T = TypeVar("T")

# Unicode's categories of control characters, of what is not seen or turns the direction of what is
# (Cf), of halves of characters, and of separators of lines and paragraphs.
_HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_LARGEST = 10**15  # a whole number has a meaning here, and a float holds it exactly


def hidden(text: str) -> bool:
    """Whether it holds a character that has no place in one line of plain text."""
    return not text.isprintable() and any(unicodedata.category(c) in _HIDDEN for c in text)


def one_line(text: str) -> str:
    """The text with a space for each run of hidden characters and spaces."""
    return " ".join("".join(" " if hidden(c) else c for c in text).split())


def cleaned(value: T) -> T:
    """A dataclass with `one_line` of every text in it that holds hidden characters."""
    return _cleaned(value)  # type: ignore[no-any-return]


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return one_line(value) if hidden(value) else value
    if isinstance(value, list):
        return [_cleaned(part) for part in value]
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(part) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: _cleaned(part) for name, part in parts.items()})
    return value


def load(data: bytes, name: str) -> object:
    """What JSON in UTF-8 says, with finite numbers and no key twice; name: of it, for a message.

    Raises `UserError`.
    """
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_no,
            parse_float=_finite,
            parse_int=_whole,
        )
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{name} is not JSON, or was cut off: {error.msg} at {place}") from None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        raise UserError(f"{name} is no JSON that can be read: {error}") from None


def build(kind: type[T], value: object, name: str) -> T:
    """An instance of the dataclass.

    Every field must be there, and no other; each of the type that it is declared with. Hints may be
    str, int, float, bool, Literal, dataclasses, lists, dictionaries by str, and any of them or
    None. Raises `UserError`.
    """
    built: T = _build(kind, value, name)
    return built


def _once(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return found


def _no(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in JSON")


def _finite(digits: str) -> float:
    if math.isinf(number := float(digits)):
        raise ValueError(f"{_cut(digits)} is too large a number")
    return number


def _whole(digits: str) -> int:
    if abs(number := int(digits)) > _LARGEST:
        raise ValueError(f"{_cut(digits)} is too large a number")
    return number


def _build(kind: Any, value: object, place: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _instance(kind, value, place)
    if origin is types.UnionType:
        return None if value is None else _build(args[0], value, place)
    if origin is list and isinstance(value, list):
        return [_build(args[0], part, f"{place}[{i}]") for i, part in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        for key in value:
            _require_plain(key, f"a key of {place}")
        return {key: _build(args[1], part, f"{place}.{key}") for key, part in value.items()}
    if origin is Literal and value in args and isinstance(value, str):
        return value
    if kind is float and is_number(value):
        return value
    if type(value) is kind and kind is not float:
        if isinstance(value, str):
            _require_plain(value, place)
        return value
    raise UserError(f"{place} is {_short(value)}, must be {_said(kind)}")


def _require_plain(text: str, place: str) -> None:
    if hidden(text):
        found = next(c for c in text if hidden(c))
        raise UserError(
            f"{place} is {_short(text)}, with the character U+{ord(found):04X}, must be one line "
            f"of plain text"
        )


def _instance(kind: Any, value: object, place: str) -> Any:
    if not isinstance(value, dict):
        raise UserError(f"{place} is {_short(value)}, must be an object")
    hints = get_type_hints(kind)
    for key in [*hints, *value]:
        if key not in value:
            raise UserError(f"{place} has no {key!r}")
        if key not in hints:
            raise UserError(f"{place} has {key!r}, which does not belong there")
    return kind(**{key: _build(hint, value[key], f"{place}.{key}") for key, hint in hints.items()})


def _said(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    names = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return names.get(kind, "a list" if get_origin(kind) is list else "an object")


def _short(value: object) -> str:
    return _cut(json.dumps(value))


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
