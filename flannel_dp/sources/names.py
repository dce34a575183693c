"""Resolve names in bounded time.

getaddrinfo(3) cannot be called off, and with a name server that does not answer it takes half a
minute or more. So it runs on a thread of its own, which is left behind where it takes too long.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

from flannel_dp.threads import Thread

Address = tuple[int, Any]
"""The family, and what connect(2) and bind(2) take."""

#: So many look-ups that were left behind may be under way at once, each of them a thread.
_MOST = 32
_left = threading.BoundedSemaphore(_MOST)


def resolve(host: str, port: int, wait: Callable[[threading.Event], object]) -> list[Address]:
    """Return the stream addresses of ``host``, like ``getent ahosts HOST``.

    A literal address is not resolved. For a name ``wait(done)`` has to return when the event
    is set, and raises to call it off. Raises OSError and ValueError for a name that is not
    known, and RuntimeError where no thread can be started.
    """
    if _is_literal(host):
        return _ask(host, port, socket.AI_NUMERICHOST)
    found: list[Address] = []
    failed: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        try:
            found.extend(_ask(host, port, 0))
        except Exception as error:
            failed.append(error)
        finally:
            _left.release()
            done.set()

    if not _left.acquire(blocking=False):
        raise RuntimeError(f"{_MOST} earlier look-ups have not ended")
    try:
        Thread(target=run, name="flannel-dp-lookup", daemon=True).start()
    except BaseException:
        _left.release()
        raise
    wait(done)
    if failed:
        raise failed[0]
    return found


def resolve_within(host: str, port: int, seconds: float) -> list[Address]:
    """As ``resolve``. Raises TimeoutError after ``seconds``."""

    def wait(done: threading.Event) -> None:
        # In slices, so that a signal's handler runs in time on the main thread.
        until = time.monotonic() + seconds
        while not done.wait(min(0.2, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                raise TimeoutError(f"no name server answers for {host}")

    return resolve(host, port, wait)


def _is_literal(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _ask(host: str, port: int, flags: int) -> list[Address]:
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(int(info[0]), info[4]) for info in infos]
