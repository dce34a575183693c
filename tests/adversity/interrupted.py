"""Run the command and send SIGINT to it at its Nth call of a function; see test_interrupt.py.

``interrupted.py N ARGUMENTS``: N counts the calls of Python functions from the first line of
``flannel_dp.__main__`` on, imports included. With N 0 nothing is sent, and the last line of
standard error is the number of calls. A run that had ended before its Nth call says so.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn


def main() -> None:
    at, sys.argv[1:] = int(sys.argv[1]), sys.argv[2:]
    calls = 0
    end = os._exit

    def trace(frame: FrameType, event: str, value: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            sys.settrace(None)
            signal.raise_signal(signal.SIGINT)

    def count_and_end(code: int) -> NoReturn:
        sys.settrace(None)
        if not at:
            os.write(2, f"{calls}\n".encode())
        elif calls < at:
            os.write(2, b"ended before\n")
        end(code)

    import flannel_dp.__main__

    os._exit = count_and_end
    sys.settrace(trace)
    flannel_dp.__main__.run()


main()
