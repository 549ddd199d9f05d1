"""The one error that a user's mistake raises: a sentence that says what is wrong, where, and how to
mend it.

The command line prints the sentence and exits with code 2; a library user catches `UserError` (a
`ValueError`).
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: a file, a name, a value or a size that the caller can mend."""


class CacheFullError(UserError):
    """A step would write a position beyond the cache's capacity; nothing was written."""


def close_matches(word: str, names: Iterable[str]) -> str:
    """` Did you mean 'x' or 'y'?` for the names that look like `word`; empty if none does."""
    found = difflib.get_close_matches(word, list(names), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, found))}?" if found else ""
