"""The command line. `app.py` has what all commands share, `models.py` those that run a model,
`judge.py` and `bisect.py` those that judge a backend.
"""

from moge_hal.cli import bisect, judge, models  # their commands register themselves
from moge_hal.cli.app import app, main

__all__ = ["app", "bisect", "judge", "main", "models"]
