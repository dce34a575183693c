"""A program that changes the kernel's tables and lives on, as a daemon does."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest


class Rival:
    """``ip`` in the namespace of a host, which keeps its netlink socket."""

    def __init__(self, host: Any) -> None:
        command = ["ip", "-n", host.ns, "-batch", "-"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.name = f"ip (process {self.pid})"

    def does(self, words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{words}\n")
        self._process.stdin.flush()

    def ends(self) -> None:
        """Have it do all that it was told, and end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait() == 0


@pytest.fixture(name="rival")
def rival_fixture(host: Any) -> Iterator[Rival]:
    made = Rival(host)
    yield made
    made.ends()
