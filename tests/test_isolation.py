"""A test run of its own, in a process that is killed: what it made is gone with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lib import isolation
from tests.lib.waiting import wait_until

ROOT = Path(__file__).resolve().parents[1]

RUN = """
import subprocess, sys, tempfile
from pathlib import Path
from tests.lib import isolation
from tests.lib.waiting import wait_until

assert isolation.isolate()
subprocess.run(["ip", "netns", "add", "left"], check=True)
(isolation.STATE / "1-flannel.1.lock").touch()
(isolation.PINS / "flannel-dp").mkdir()
(isolation.PINS / "flannel-dp" / "1-device").mkdir()
server = subprocess.Popen(["ip", "netns", "exec", "left", "sleep", "1000"])
wait_until(lambda: Path(f"/proc/{server.pid}/cmdline").read_bytes().startswith(b"sleep"))
print(server.pid, flush=True)
print(tempfile.mkstemp()[1], flush=True)
print(*isolation.remains(), sep="\\n", flush=True)
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, None], ids=["killed", "at its end"])
def test_nothing_of_a_run_is_left(end: signal.Signals | None) -> None:
    environment = {k: v for k, v in os.environ.items() if k != isolation._MARK}
    with subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdin is not None
        assert run.stdout is not None
        server, file = int(run.stdout.readline()), Path(run.stdout.readline().strip())
        assert file.exists()
        left = [line.rstrip() for line in iter(run.stdout.readline, "\n")]
        if end is not None:
            run.send_signal(end)
        run.stdin.close()

    assert left == [
        "/run/flannel-dp/1-flannel.1.lock",
        "/run/flannel-dp/bpf/flannel-dp/1-device",
        "/run/netns/left",
        f"process {server}: sleep 1000",
    ]
    wait_until(lambda: not Path(f"/proc/{server}").exists())
    wait_until(lambda: not file.parent.exists())
    assert not Path("/run/netns/left").exists()
    assert not (isolation.STATE / "1-flannel.1.lock").exists()
