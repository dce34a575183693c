"""Programs that end soon, such as ``ip``: hundreds of thousands are started in a run.

What they print goes to memory and not through pipes, and a program that works in a namespace is
started by a thread that is there at that moment: ``ip -n`` makes a mount namespace each time.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Final

_CLONE_NEWNET: Final = 0x40000000
_OWN: Final = "/proc/thread-self/ns/net"

#: Python ignores them, and what is started would too.
_TO_DEFAULT: Final = (signal.SIGPIPE, signal.SIGXFSZ)

#: Programs that look at no variable; to hand on all of them takes long.
_PLAIN: Final = ("ip", "bridge", "tc")

_libc = ctypes.CDLL(None, use_errno=True)


def run(
    *command: str, stdin: str | None = None, env: dict[str, str] | None = None, netns: str = ""
) -> str:
    """Run a command, in a namespace if one is named, and return its standard output; a failure
    carries all it printed."""
    done = end_of(command, stdin=stdin, env=env, netns=netns)
    if done.returncode != 0:
        raise AssertionError(
            f"{netns} {' '.join(command)}: exit {done.returncode}\n"
            f"{stdin or ''}{done.stdout}{done.stderr}"
        )
    return done.stdout


def end_of(
    command: Sequence[str],
    *,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    netns: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; what ``subprocess.run`` returns with captured text."""
    files = [os.memfd_create("out"), os.memfd_create("err")]
    try:
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(files, 1)]
        if stdin is not None:
            files.append(os.memfd_create("in"))
            os.write(files[2], stdin.encode())
            os.lseek(files[2], 0, os.SEEK_SET)
            actions.append((os.POSIX_SPAWN_DUP2, files[2], 0))
        if env is None:
            env = {"PATH": os.environ["PATH"]} if command[0] in _PLAIN else os.environ
        pid = _spawned(command, env, actions, netns)
        try:
            _, status = os.waitpid(pid, 0)
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise
        code = os.waitstatus_to_exitcode(status)
        return subprocess.CompletedProcess(command, code, *(_text(fd) for fd in files[:2]))
    finally:
        for fd in files:
            os.close(fd)


def _spawned(
    command: Sequence[str],
    env: Mapping[str, str],
    actions: Sequence[tuple[int, int, int]],
    netns: str,
) -> int:
    if not netns:
        path = _path(command[0], os.environ["PATH"])
        return os.posix_spawn(path, command, env, file_actions=actions, setsigdef=_TO_DEFAULT)
    own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = os.open(f"/run/netns/{netns}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(there)
        finally:
            os.close(there)
        try:
            return _spawned(command, env, actions, "")
        finally:
            _enter(own)
    finally:
        os.close(own)


@cache
def _path(program: str, places: str) -> str:
    found = shutil.which(program, path=places)
    assert found is not None, f"{program} is not installed"
    return found


def _enter(fd: int) -> None:
    if _libc.setns(fd, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")


def _text(fd: int) -> str:
    size = os.lseek(fd, 0, os.SEEK_END)
    return os.pread(fd, size, 0).decode() if size else ""
