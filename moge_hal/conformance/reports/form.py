"""JSON into dataclasses, or one sentence that says what is wrong with it and where.

The type hints of a dataclass are the only description of the form: there is no second one that
could say something else.
"""

import json
import math
import types
from collections.abc import Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from moge_hal.errors import UserError, is_number

T = TypeVar("T")


def load(data: bytes, name: str) -> object:
    """What JSON in UTF-8 says, with finite numbers and no key twice; name: of it, for a message.

    Raises `UserError`.
    """
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no, parse_float=_finite
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
        raise ValueError(f"{digits} is too large a number")
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
        return {key: _build(args[1], part, f"{place}.{key}") for key, part in value.items()}
    if origin is Literal and value in args and isinstance(value, str):
        return value
    if kind is float and is_number(value):
        return value
    if type(value) is kind and kind is not float:
        return value
    raise UserError(f"{place} is {_short(value)}, must be {_said(kind)}")


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
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
