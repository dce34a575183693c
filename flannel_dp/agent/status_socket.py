"""The socket at which ``flannel-dp status`` asks a running agent.

Each client gets the agent's document and the end of the stream; nothing is read from it, so that no
client can say anything wrong. The thread waits in accept(2): it costs nothing while no client
asks, and answers also while the agent's loop starts, works or is stuck.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from flannel_dp.agent.status import StatusBoard
from flannel_dp.agent.supervise import Worker
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.kernel.netns import netns_identity
from flannel_dp.kernel.unix_sockets import SOCKET, listening_socket, remove_unheld_socket

log = logging.getLogger(__name__)

#: How long one client may take to read its answer, in seconds; all others wait meanwhile.
ANSWER_SECONDS = 1.0
#: A pause where accept(2) fails, for lack of descriptors for instance, in seconds.
_PAUSE = 0.1
_BACKLOG = 16

#: What stands in place of a device's name before one is known.
STARTING = "starting-"


class StatusSocket:
    """Serves ``document()`` in ``directory``, under the names of devices.

    It listens under a random name as long as no device is known. The mode is 0600. For one thread,
    but for what the thread of the socket calls: ``prepare`` first, ``document`` for each client,
    and ``note`` with a failure of the thread, and with None when that is over. Raises OSError where
    the socket cannot be made, and what ``prepare`` raised.
    """

    def __init__(
        self,
        document: Callable[[], dict[str, Any]],
        directory: str = DEFAULT_DIRECTORY,
        prepare: Callable[[], object] = lambda: None,
        board: StatusBoard | None = None,
        note: Callable[[str | None], object] = lambda text: None,
    ) -> None:
        self._document, self._board, self._note = document, board or StatusBoard(), note
        self._failed = False
        self._worker: Worker | None = None
        self._prefix = f"{directory}/{netns_identity(None)[1]}-"
        self._names: list[str] = []
        self._stopping = threading.Event()
        os.makedirs(directory, mode=0o700, exist_ok=True)
        _remove_unheld(directory, f"{self._prefix}{STARTING}")
        first = f"{self._prefix}{STARTING}{os.urandom(6).hex()}{SOCKET}"
        self._socket = listening_socket(first, _BACKLOG)
        self._names.append(first)
        try:
            self._began: Future[None] = Future()
            serve = partial(self._serve, prepare)
            self._worker = Worker("status", serve, board=self._board, on_failure=self._fail)
            self._worker.start()
            if self._worker.alive or self._began.done():
                self._began.result()
        except BaseException:
            self.close()
            raise

    def name(self, devices: Iterable[str]) -> None:
        """Be found under the names of these devices, whose locks are held: what a process that
        is gone left there is replaced. Raises OSError."""
        wanted = [f"{self._prefix}{device}{SOCKET}" for device in devices]
        if not wanted or wanted == self._names:
            return
        old = [path for path in self._names if path not in wanted]
        for path in wanted:
            if path not in self._names:
                fresh = f"{path}.{os.getpid()}"
                os.link(self._names[0], fresh)
                os.rename(fresh, path)
                self._names.append(path)
        for path in old:
            self._remove(path)

    def _remove(self, path: str) -> None:
        self._names.remove(path)
        with suppress(OSError):
            os.unlink(path)

    def close(self) -> None:
        """Listen no more, and remove the names. Waits for a client for a second at most."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.stop()
        for path in [*self._names]:
            self._remove(path)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        if self._worker is not None:
            self._worker.join(2 * ANSWER_SECONDS)
        self._socket.close()

    def _serve(self, prepare: Callable[[], object]) -> None:
        try:
            prepare()
        except BaseException as error:
            if not self._began.done():
                self._began.set_exception(error)
            raise
        if not self._began.done():
            self._began.set_result(None)
        while not self._stopping.is_set():
            try:
                client, _ = self._socket.accept()
            except OSError as error:
                # EMFILE and its like leave the client waiting: accept would fail again at once.
                if not self._stopping.wait(_PAUSE):
                    log.debug("Cannot accept a client: %(error)s", {"error": error})
                continue
            with client:
                try:
                    self._answer(client)
                except OSError as error:  # it has gone, or does not read
                    log.debug("Cannot answer a client: %(error)s", {"error": error})
            if self._failed:  # its end: this client was answered
                self._failed = False
                self._note(None)

    def _fail(self, error: str) -> None:
        self._failed = True
        self._note(error)

    def _answer(self, client: socket.socket) -> None:
        """Send the document within ANSWER_SECONDS."""
        until = time.monotonic() + ANSWER_SECONDS
        left = memoryview(json.dumps(self._document(), separators=(",", ":")).encode() + b"\n")
        while left and not self._stopping.is_set():
            client.settimeout(max(0.001, until - time.monotonic()))
            left = left[client.send(left) :]


def _remove_unheld(directory: str, prefix: str) -> None:
    """Remove the sockets that begin so and at which no process listens."""
    for name in os.listdir(directory):
        path = f"{directory}/{name}"
        if path.startswith(prefix):
            with suppress(OSError):
                remove_unheld_socket(path)
