"""The command line. `app.py` has what all commands share, `models.py` those that run a model,
`judge.py` those that judge a backend.
"""

from moge_hal.cli import judge, models  # their commands register themselves
from moge_hal.cli.app import app, main

__all__ = ["app", "judge", "main", "models"]
