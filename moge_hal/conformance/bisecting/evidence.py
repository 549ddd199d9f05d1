"""What a run has shown: every call of an operation, judged as it comes.

A call is judged on the inputs that it really got, whatever became of them before, against the
specification in float64 and within the limit that the suite measures for these very inputs.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moge_hal.conformance.bisecting.recording import Call
from moge_hal.conformance.golden.store import case_of
from moge_hal.conformance.inputs import Args
from moge_hal.conformance.judge import check, measure
from moge_hal.conformance.limits import worst_row
from moge_hal.conformance.oracle import exact
from moge_hal.conformance.properties.scenes import Scene
from moge_hal.conformance.subject import ROLES
from moge_hal.conformance.verdict import Failure, Verdict
from moge_hal.errors import UserError


@dataclass(frozen=True)
class Suspect:
    """The first call of an operation that was found wrong."""

    call: Call
    scene: Scene
    number: int  # of the move in the scene
    failure: Failure


@dataclass
class Evidence:
    """What watching a run has shown."""

    own: set[str]  # operations that the backend runs itself
    wrong: dict[str, Suspect] = field(default_factory=dict)  # by operation, in order
    written: Suspect | None = None  # the first call that wrote over something
    share: dict[str, float] = field(default_factory=dict)  # of its limit that an operation reached
    raised: Exception | None = None  # what was wrong with the run as a whole

    def examine(self, call: Call, scene: Scene, number: int) -> None:
        """Judges a call, unless its operation was found wrong before."""
        if call.wrote and self.written is None:
            failure = Failure(f"it wrote over {call.wrote}")
            self.written = Suspect(call, scene, number, failure)
        if call.op in self.wrong:
            return
        result = judge_call(call)
        if isinstance(result, Verdict):
            if result.error is not None and result.limit:
                share = result.error / result.limit
                self.share[call.op] = max(share, self.share.get(call.op, 0.0))
        elif result is not None and not self._inside(call, scene, number):
            self.wrong[call.op] = Suspect(call, scene, number, result)

    def _inside(self, call: Call, scene: Scene, number: int) -> bool:
        """Whether it is a part of the call that is wrong. What a backend's own operation hands to
        its parts may be packed, and is judged by nobody but that operation; what they raise is
        theirs."""
        raised = isinstance(call.out, Exception)
        if call.op in self.own and not raised:
            return False
        for part in call.inner:
            if not raised or isinstance(part.out, Exception):
                self.examine(part, scene, number)
        return any(part.op in self.wrong for part in call.inner)


def judge_call(call: Call) -> Verdict | Failure | None:
    """None: an earlier call has spoilt the inputs, so nothing can be said."""
    if isinstance(call.out, Failure):
        return call.out
    if isinstance(call.out, Exception):
        return Failure(f"raised {type(call.out).__name__}: {call.out}")
    if not all(_finite(call.op, args) for args in (*call.past, call.args)):
        return None
    try:
        if call.op == "attention":
            return _judge_attention(call, call.out)
        case = case_of(call.op, call.args)
        return check(case, call.out, call.args, measure(case, call.args))
    except Failure as failure:
        return failure
    except (
        UserError,
        RuntimeError,
        IndexError,
    ):  # no limits, or none of the specification's inputs
        return None


def _finite(op: str, args: Args) -> bool:
    return all(
        bool(value.isfinite().all())
        for name, value in args.items()
        if isinstance(value, Tensor) and (op, name) not in ROLES
    )


def _judge_attention(call: Call, out: tuple[Tensor, ...]) -> Verdict:
    """Over a cache as over all keys at once, the newest columns of it."""
    newest = call.args["q"]
    if len(out) != 1 or out[0].shape != newest.shape or out[0].dtype != newest.dtype:
        found = [(list(part.shape), part.dtype) for part in out]
        raise Failure(f"the output is {found}, must be {list(newest.shape)} {newest.dtype}")
    if not bool(out[0].isfinite().all()):
        raise Failure("the output is not finite", float("inf"))
    calls = [*call.past, call.args]
    joined: Args = {
        name: None if value is None else torch.cat([args[name] for args in calls], 1)
        for name, value in call.args.items()
    }
    real = call.args["positions"] >= 0
    (allowed,) = measure(case_of(call.op, joined), joined)
    want = exact(call.op, joined)[0][:, -newest.shape[1] :]
    error = worst_row(out[0][real].flatten(1), want[real].flatten(1))
    if error > allowed.limit:
        raise Failure("the output is wrong in its worst row", error, allowed.limit)
    return Verdict(error, allowed.limit)
