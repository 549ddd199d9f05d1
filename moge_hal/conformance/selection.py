"""Which cases run: globs on ids, a profile, the quick ones, other inputs.

A word that selects nothing is an error with close matches: a run that judges nothing proves
nothing.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from moge_hal.conformance.cases import DTYPES, PROPERTIES, Case, parse
from moge_hal.conformance.listing import every_case, is_quick
from moge_hal.conformance.result import Selection
from moge_hal.errors import UserError, close_matches
from moge_hal.registry import PROFILES


def select(selection: Selection) -> list[Case]:
    """The cases of a selection, in the order of the list; an id that is not in the list may be
    named in full. Raises `UserError` if there are none."""
    profile, offset = selection.profile, selection.seed_offset
    if type(offset) is not int or not 0 <= offset < 10**9:
        raise UserError(f"the seed offset {offset!r} must be a whole number below a billion")
    if profile is not None and profile not in PROFILES:
        near = close_matches(profile, PROFILES)
        raise UserError(f"no profile {profile!r}; there are {', '.join(PROFILES)}.{near}")
    cases = _matching(list(every_case()), selection.filters)
    cases = [case for case in cases if profile in (None, case.profile)]
    if selection.quick:
        cases = [case for case in cases if is_quick(case)]
    if not cases:
        parts = [f"the filters {', '.join(selection.filters)}"] if selection.filters else []
        parts += [f"the profile {profile}"] if profile else []
        parts += ["the quick ones"] if selection.quick else []
        raise UserError(f"no case belongs to {' and '.join(parts)}: leave one of these out")
    return [case.shifted(offset) for case in cases]


def _matching(cases: list[Case], filters: Sequence[str]) -> list[Case]:
    if not filters:
        return cases
    chosen: dict[str, Case] = {}
    for pattern in filters:
        found = [case for case in cases if fnmatchcase(case.id, pattern)]
        if not found and pattern.count("/") == 4 and not set(pattern) & set("*?["):
            found = [parse(pattern)]
        if not found:
            raise UserError(f"no case matches {pattern!r}{_advice(pattern, cases)}")
        chosen |= {case.id: case for case in found}
    return list(chosen.values())


def _advice(pattern: str, cases: list[Case]) -> str:
    """What is wrong with a glob that matches nothing: the word in it that does not exist, or what
    looks like it."""
    fields = pattern.split("/")
    properties = sorted({case.prop for case in cases})
    known = [(0, "operation", list(PROPERTIES))]
    known += [(1, "dtype", list(DTYPES))] if len(fields) > 2 else []
    known += [(-1, "property", properties)]
    for at, kind, names in known if len(fields) > 1 else ():
        word = fields[at]
        if word and not set(word) & set("*?[") and word not in names:
            return f": there is no {kind} {word!r}.{close_matches(word, names)}"
    globs = [f"{op}/*" for op in PROPERTIES] + [f"*/{name}" for name in properties]
    close = close_matches(pattern, dict.fromkeys([*globs, *(case.id for case in cases)]))
    return f"; a filter is a glob on whole ids, such as 'experts/*'.{close}"
