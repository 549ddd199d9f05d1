"""`python -m moge_hal` is `moge-hal`."""

from moge_hal.cli import main

main()
