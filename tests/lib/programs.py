"""flannel-dp as a process of its own, forked from one that has imported everything.

``Popen`` and ``run`` take what those of subprocess take. A command that is ``python -m flannel_dp
ARGS``, also after ``ip netns exec NS``, is run by a process that was forked from a server with all
of flannel_dp in it: a process with its own process id, descriptors, signals, environment, directory
and namespaces, that begins where ``python -m flannel_dp`` would be after its imports. Those take up
to half a second of processor time, and are not what most tests are about. ``python -m
tests.lib.scenes NAME`` is run in the same way. Anything else is left to subprocess; so is
everything with FLANNEL_DP_TEST_PROCESSES=real, which coverage needs. A process whose standard
input is a terminal leads a session on it.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from tests.lib.waiting import LIMIT

_CLONE_NEWNS, _CLONE_NEWNET = 0x20000, 0x40000000
_MS_REC, _MS_SLAVE, _MNT_DETACH = 0x4000, 1 << 19, 2


_SCENES = "tests.lib.scenes"

#: What stands for a Python with bcc in processes that are forked; "": what there is.
bcc_python = ""


# ---- what tests use ----------------------------------------------------------------


def Popen(
    command: Sequence[str],
    *,
    stdin: Any = None,
    stdout: Any = None,
    stderr: Any = None,
    env: Mapping[str, str] | None = None,
    cwd: Any = None,
    **how: Any,
) -> Any:
    """Start a command: a Process where it is flannel-dp and has files, else subprocess.Popen."""
    netns, words = _flannel_dp(command)
    streams = (stdin, stdout, stderr)
    if words is None or how or subprocess.PIPE in streams or subprocess.STDOUT in streams:
        return subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=cwd, **how
        )
    files = [_descriptor(stream, number) for number, stream in enumerate(streams)]
    environment = dict(os.environ if env is None else env)
    return _server().start(words, netns, files, environment, os.fspath(cwd or os.getcwd()))


def run(
    command: Sequence[str],
    *,
    input: Any = None,
    capture_output: bool = False,
    text: bool = False,
    check: bool = False,
    timeout: float = LIMIT,
    **how: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end."""
    if _flannel_dp(command)[1] is None or not capture_output:
        return subprocess.run(
            command,
            input=input,
            capture_output=capture_output,
            text=text,
            check=check,
            timeout=timeout,
            **how,
        )
    with contextlib.ExitStack() as stack:
        stdin, stdout, stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        if input is not None:
            stdin.write(input.encode() if text else input)
            stdin.seek(0)
            how["stdin"] = stdin
        process = Popen(command, stdout=stdout, stderr=stderr, **how)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        said = []
        for file in (stdout, stderr):
            file.seek(0)
            said.append(file.read().decode() if text else file.read())
    done = subprocess.CompletedProcess[Any](list(command), code, *said)
    if check:
        done.check_returncode()
    return done


class Process:
    """A process that the server has forked; what subprocess.Popen is elsewhere."""

    def __init__(self, server: _Client, pid: int, args: list[str]) -> None:
        self._server, self.pid, self.args = server, pid, args
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs; minus the signal that ended it."""
        if self.returncode is None:
            self.returncode = self._server.ended(self.pid, 0.0)
        return self.returncode

    def wait(self, timeout: float = LIMIT) -> int:
        """Wait for its end. Raises TimeoutExpired."""
        if self.returncode is None:
            self.returncode = self._server.ended(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.wait()


def _flannel_dp(command: Sequence[str]) -> tuple[str, list[str] | None]:
    """Namespace, and module and arguments of a command that is ours; None for any other."""
    words, netns = list(command), ""
    if words[:3] == ["ip", "netns", "exec"]:
        netns, words = words[3], words[4:]
    if words[:2] != [sys.executable, "-m"] or words[2] not in ("flannel_dp", _SCENES):
        return "", None
    return ("", None) if os.environ.get("FLANNEL_DP_TEST_PROCESSES") else (netns, words[2:])


def _descriptor(stream: Any, number: int) -> int:
    if stream is None:
        return number
    if stream == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    return stream if isinstance(stream, int) else int(stream.fileno())


# ---- the tests' end of the server -----------------------------------------------------


_pair = partial(socket.socketpair, socket.AF_UNIX, socket.SOCK_SEQPACKET)


class _Origin:
    """The process that servers are forked from, which imports all once."""

    def __init__(self) -> None:
        self._socket, theirs = _pair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.lib.programs", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parents[2],
                stdin=subprocess.DEVNULL,
            )

    def server(self) -> socket.socket:
        """The end of a new server, which has the mounts of this process."""
        ours, theirs = _pair()
        with theirs:
            fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
            self._socket.sendmsg([json.dumps([os.getpid(), bcc_python]).encode()], fds)
        return ours

    def close(self) -> None:
        """Let it end when its servers have ended, and wait for that."""
        self._socket.close()
        self._process.wait()


_shared: _Origin | None = None


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Have processes that are forked meanwhile take their servers from one origin."""
    global _shared
    _shared = _Origin()
    try:
        yield
    finally:
        _shared.close()
        _shared = None


class _Client:
    def __init__(self) -> None:
        self._own = None if _shared else _Origin()
        origin = _shared or self._own
        assert origin is not None
        self._socket = origin.server()
        self._codes: dict[int, int] = {}

    def close(self) -> None:
        self._socket.close()
        if self._own:
            self._own.close()

    def start(
        self, words: list[str], netns: str, files: list[int], env: dict[str, str], cwd: str
    ) -> Process:
        said = json.dumps([words, netns, env, cwd]).encode()
        fds = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
        self._socket.sendmsg([said], fds)
        while True:
            pid, code = self._receive()
            if code is None:
                return Process(self, pid, words)
            self._codes[pid] = code

    def ended(self, pid: int, timeout: float) -> int | None:
        end = time.monotonic() + timeout
        while pid not in self._codes:
            left = max(0.0, end - time.monotonic())
            if not select.select([self._socket], [], [], left)[0]:
                return None
            other, code = self._receive()
            assert code is not None
            self._codes[other] = code
        return self._codes.pop(pid)

    def _receive(self) -> tuple[int, int | None]:
        said = self._socket.recv(1 << 16)
        assert said, "the server that forks flannel-dp has ended"
        pid, code = json.loads(said)
        return pid, code


_client: _Client | None = None


def _server() -> _Client:
    """The server of this process, started when it is first needed."""
    global _client
    if _client is None:
        _client = _Client()
    return _client


def close() -> None:
    """End the server."""
    global _client
    if _client is not None:
        _client.close()
        _client = None


# ---- the server -------------------------------------------------------------------------


def _serve(control: socket.socket) -> list[str] | None:
    """Fork when asked to; returns in the children, with their arguments, and at the end."""
    children: dict[int, int] = {}  # pidfd: process id
    while True:
        ready, _, _ = select.select([control, *children], [], [])
        for fd in ready:
            if fd is not control:
                pid = children.pop(fd)
                os.close(fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                control.send(json.dumps([pid, code]).encode())
        if control not in ready:
            continue
        said, ancillary, _, _ = control.recvmsg(1 << 20, 1024)
        if not said:
            return None
        files = array.array("i")
        files.frombytes(ancillary[0][2])
        pid = os.fork()
        if not pid:
            for fd in children:
                os.close(fd)
            control.close()
            return _become(*json.loads(said), files)
        children[os.pidfd_open(pid)] = pid
        for one in files:
            os.close(one)
        control.send(json.dumps([pid, None]).encode())


def _become(
    words: list[str], netns: str, env: dict[str, str], cwd: str, files: array.array[int]
) -> list[str]:
    for number, fd in enumerate(files):
        os.dup2(fd, number)
    for fd in files:
        os.close(fd)
    if os.isatty(0):  # as login(1) does: Ctrl-C and a new size become signals
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    if netns:
        _enter(netns)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    return words


def _enter(netns: str) -> None:
    """What ``ip netns exec`` does: the namespace, and a /sys that shows it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{netns}") as file:
        failed = libc.setns(file.fileno(), _CLONE_NEWNET) or libc.unshare(_CLONE_NEWNS)
    flags = ctypes.c_ulong(_MS_REC | _MS_SLAVE)
    failed = failed or libc.mount(b"", b"/", b"none", flags, None)
    libc.umount2(b"/sys", _MNT_DETACH)
    failed = failed or libc.mount(netns.encode(), b"/sys", b"sysfs", ctypes.c_ulong(0), None)
    if failed:
        raise OSError(ctypes.get_errno(), f"enter {netns}")


def _import_everything() -> None:
    import importlib
    import pkgutil

    import flannel_dp

    for module in pkgutil.walk_packages(flannel_dp.__path__, "flannel_dp."):
        if not module.name.rpartition(".")[2].startswith("_"):
            importlib.import_module(module.name)
    for name in ("pyroute2", "h2.connection", "google.protobuf", "lightkube", "httpx2"):
        importlib.import_module(name)
    for name in ("rich.console", "rich.progress", "prometheus_client"):
        importlib.import_module(name)
    import flannel_dp.__main__
    import flannel_dp.command.cli

    assert flannel_dp.command.cli
    assert flannel_dp.__main__
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"


def _load_with(python: str) -> None:
    from flannel_dp.bpf import helper
    from tests.lib import bcc_cache

    helper.interpreters = lambda: [python]
    helper._run = bcc_cache.InProcess(
        os.path.dirname(python), python, helper._run, str(helper.PACKAGE / "_compile.py")
    )


def _enter_mounts(pid: int) -> None:
    """Have the mounts of a process."""
    own, there = (os.readlink(f"/proc/{who}/ns/mnt") for who in ("self", pid))
    if own == there:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{pid}/ns/mnt") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), f"enter the mounts of process {pid}")


def _main() -> None:
    requests, servers = socket.socket(fileno=int(sys.argv[1])), list[int]()
    while True:
        said, ancillary, _, _ = requests.recvmsg(1 << 12, 1024)
        if not said:
            break
        if not servers:
            _import_everything()
            gc.collect()
            gc.freeze()  # shared with all that are forked
        (fd,) = array.array("i", ancillary[0][2])
        server = os.fork()
        if not server:
            requests.close()
            _be_server(socket.socket(fileno=fd), *json.loads(said))
        os.close(fd)
        servers.append(server)
    for server in servers:
        os.waitpid(server, 0)


def _be_server(control: socket.socket, pid: int, python: str) -> NoReturn:
    _enter_mounts(pid)
    if python:
        _load_with(python)
    words = _serve(control)
    if words is not None and words.pop(0) == _SCENES:
        from tests.lib import scenes

        scenes.main(*words)
    elif words is not None:
        from flannel_dp.__main__ import run as run_flannel_dp

        sys.argv = ["flannel-dp", *words]
        run_flannel_dp()
    os._exit(0)


if __name__ == "__main__":
    _main()
