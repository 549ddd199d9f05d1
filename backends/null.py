"""The smallest backend, as an example: it overrides nothing, so it is the specification itself, run
by plain torch.
"""

from moge_hal.backend import Backend


class NullBackend(Backend):
    name = "null"
