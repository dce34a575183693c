"""``flannel-dp sync --watch`` as a process, behind a garbled etcd."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lib.etcd_garbler import noise
from tests.lib.joined_service import Joined
from tests.lib.waiting import wait_until


@pytest.fixture
def joined(
    host: Any, family: int, tmp_path: Path, wait_until: Callable[..., None]
) -> Iterator[Joined]:
    made = Joined(host, family, tmp_path, wait_until)
    yield made
    made.close()


def test_unreadable_answers_end_nothing(joined: Joined) -> None:
    joined.publish_config()
    joined.start("--audit-interval", "1")
    joined.add(1)
    joined.await_clean()
    joined.await_problems()

    # Two watches: the leases' and this node's own.
    joined.garbler.fail("Watch", *[noise] * 6)
    joined.add(2)
    joined.await_clean()
    wait_until(lambda: not joined.garbler.left("Watch"))
    joined.await_problems()

    joined.garbler.fail("Range", *[noise] * 8)
    os.kill(joined.pid, signal.SIGHUP)
    wait_until(lambda: joined.said("The new configuration is rejected"))
    wait_until(lambda: not joined.garbler.left("Range"))
    joined.add(3)
    joined.await_clean()
    joined.await_problems()  # the configuration was read again by itself
    assert joined.healthz()["status"] == "ok"
    assert joined.healthz()["ended"] == {}
    assert not joined.said("Traceback"), joined.log.read_text()
    assert joined.end() == 0


def test_peers_outlive_an_etcd_that_came_back_empty_and_a_restart(joined: Joined) -> None:
    """Nothing but this node's own lease is in it, which the agent itself has published."""
    joined.publish_config()
    for number in (1, 2, 3):
        joined.add(number)
    joined.start()
    joined.await_clean()
    joined.end(signal.SIGKILL)
    joined.etcd.kill()
    shutil.rmtree(joined.etcd.directory / joined.etcd.name)
    joined.etcd.start().await_ready()
    joined.publish_config()

    joined.start()

    wait_until(lambda: joined.said("its revision is"))
    wait_until(lambda: joined.said("no peer is removed before"))
    assert len(joined.etcd.leases()) == 1
    assert joined.clean()
    assert joined.end() == 0
