"""The program ``flannel-dp``, also started by ``python -m flannel_dp``.

A sync with nothing to do takes little longer than Python's start and end, so both are short:
loading modules makes no garbage that is worth looking for, and taking an interpreter apart
piece by piece does nothing that the end of the process does not do at once.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from typing import NoReturn


def run() -> NoReturn:
    """``flannel_dp.command.cli.main``, then the end of the process. Commands that go on for long
    enable the collector again."""
    gc.disable()
    from flannel_dp.command.cli import main

    code = main()
    with suppress(OSError, ValueError):  # nobody reads it any more, or it is closed
        if sys.stderr is not None:
            sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
