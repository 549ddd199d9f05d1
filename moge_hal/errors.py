"""The one error that a user's mistake raises: a sentence that says what is wrong, where, and how to
mend it.

The command line prints the sentence and exits with code 2; a library user catches `UserError` (a
`ValueError`).
"""

import difflib
from collections.abc import Iterable
from typing import NoReturn


class UserError(ValueError):
    """Bad input: a file, a name, a value or a size that the caller can mend."""


class CacheFullError(UserError):
    """A step would write a position beyond the cache's capacity; nothing was written."""


def close_matches(word: str, names: Iterable[str]) -> str:
    """` Did you mean 'x' or 'y'?` for the names that look like `word`; empty if none does."""
    found = difflib.get_close_matches(word, list(names), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""


def refuse(name: str, value: object, rule: str) -> NoReturn:
    """Raises `UserError`: the name of a value, the value, and the rule that it breaks."""
    raise UserError(f"{name} = {value!r} {rule}")


def require_whole(name: str, value: object) -> None:
    """Raises `UserError` unless `value` is a whole number of at least 1."""
    if type(value) is not int or value < 1:
        refuse(name, value, "must be a whole number of at least 1")


def is_number(value: object) -> bool:
    """Whether `value` is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
