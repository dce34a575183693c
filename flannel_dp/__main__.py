"""The programs ``flannel-dp``, also started by ``python -m flannel_dp``, and ``flannel-dpd``.

A sync with nothing to do takes little longer than Python's start and end, so both are short:
loading modules makes no garbage that is worth looking for, and taking an interpreter apart
piece by piece does nothing that the end of the process does not do at once.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

#: The exit code of a shell's command that SIGINT has ended.
INTERRUPTED = 130
FAILED = 1


def run_daemon() -> NoReturn:
    """``flannel_dp.command.daemon.main_of_daemon``, as ``run``: flanneld's start line works."""
    run(daemon=True)


def run(*, daemon: bool = False) -> NoReturn:
    """``flannel_dp.command.cli.main``, then the end of the process. Commands that go on for long
    enable the collector again. SIGINT ends it with exit code 130 and one line at any moment."""
    ignored: list[bool] = []

    def unraisable(what: UnraisableHookArgs) -> None:
        """Note an interrupt that came where no exception can be raised, as in a destructor."""
        if what.exc_type is KeyboardInterrupt:
            ignored.append(True)
        else:
            sys.__unraisablehook__(what)

    said, code = False, INTERRUPTED
    try:
        sys.unraisablehook = unraisable
        gc.disable()
        if daemon:
            from flannel_dp.command.daemon import main_of_daemon

            code = main_of_daemon()
        else:
            from flannel_dp.command.cli import main

            code = main()
        said = code == INTERRUPTED
        with suppress(OSError, ValueError):  # its reader is gone, or it is closed
            if sys.stderr is not None:
                sys.stderr.flush()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except MemoryError:  # while an error was written
        code = FAILED
        with suppress(OSError):
            os.write(2, b"flannel-dp: error: out of memory\n")
    if (code == INTERRUPTED or ignored) and not said:
        code = INTERRUPTED
        with suppress(OSError):
            os.write(2, b"flannel-dp: interrupted\n")
    os._exit(code)


if __name__ == "__main__":
    run()
