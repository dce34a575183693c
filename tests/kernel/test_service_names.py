"""``flannel-dp sync --watch`` where no name server answers: what has an address is used."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.kernel.netns import call_in_netns
from tests.lib.joined_service import Joined
from tests.lib.service import CAP_NET_ADMIN

#: Of each look-up, which no server answers, in seconds.
RESOLV_CONF = "nameserver 127.0.0.1\noptions timeout:30 attempts:5\n"


class Nameless(Joined):
    """The first etcd endpoint has a name, the second an address; the name server is silent."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        (self.folder / "resolv.conf").write_text(RESOLV_CONF)
        self.server = call_in_netns(self.host.ns, _silent_server)

    def command(self, *more: str) -> list[str]:
        plain = super().command(*more)
        at = plain.index("--etcd-endpoints") + 1
        plain[at] = f"http://etcd.example.org:2379,{plain[at]}"
        inside = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
        return ["unshare", "--mount", "sh", "-c", inside, str(self.folder / "resolv.conf"), *plain]

    def start(self, *more: str, **environment: str) -> Nameless:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command(*more), stderr=log, stdout=log, env=os.environ | environment
            )
        return self


def _silent_server() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind(("127.0.0.1", 53))
    return made


@pytest.fixture
def nameless(
    host: Any, family: int, tmp_path: Path, wait_until: Callable[..., None]
) -> Iterator[Nameless]:
    made = Nameless(host, family, tmp_path, wait_until)
    yield made
    made.close()
    made.server.close()


def test_it_starts_by_the_endpoint_that_has_an_address(nameless: Nameless) -> None:
    """Its privileges are gone also where threads still wait for the name server."""
    nameless.publish_config()
    nameless.add(1)
    nameless.start()
    nameless.await_clean()
    nameless.wait(lambda: nameless.healthz()["ready"])

    held = [capabilities(task) for task in Path(f"/proc/{nameless.pid}/task").iterdir()]
    assert nameless.server.recv(512), "it was asked"
    assert all(found <= {0, CAP_NET_ADMIN} for found in held), held
    assert nameless.end() == 0


def capabilities(task: Path) -> set[int]:
    """The sets of a thread, as masks; none when it has ended."""
    try:
        lines = (task / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return {int(fields[f"Cap{name}"], 16) for name in ("Prm", "Eff", "Inh", "Bnd")}
