"""Every kind of exception that a thread may meet."""

from __future__ import annotations

import copy
import errno
import os
from typing import TypeVar

from flannel_dp.errors import ConfigError, Unavailable
from flannel_dp.sources.etcd.messages import DecodeError


class Foreign(Exception):
    """An exception that is derived from none of ours."""


#: What work on a thread may raise: what libraries do for answers that they cannot read, what a
#: machine at its limits does, what mistakes of ours do, and our own.
FAILURES: tuple[Exception, ...] = (
    ValueError("a mistake"),
    OverflowError("int too big to convert"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    DecodeError("Error parsing message"),
    RecursionError("maximum recursion depth exceeded"),
    MemoryError(),
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
    BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)),
    RuntimeError("can't start new thread"),
    KeyError("key"),
    IndexError("list index out of range"),
    TypeError("not iterable"),
    AttributeError("no attribute"),
    ZeroDivisionError("division by zero"),
    AssertionError(),
    StopIteration(),
    Unavailable("the store is away", hint="wait"),
    ConfigError("the option cannot be used", hint="use another"),
    Foreign("nobody knows"),
)


class ForeignEnd(BaseException):
    """An exception that is not meant to be caught."""


#: What ends a thread for good.
OUTRIGHT_ENDS: tuple[BaseException, ...] = (
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    ForeignEnd("the end"),
)

_Error = TypeVar("_Error", bound=BaseException)


def fresh(error: _Error) -> _Error:
    """Another of the same: one that is raised keeps the frames it went through."""
    return copy.copy(error)
