"""The lock of a data plane and of an agent: taken with the first write, kept until the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import Agent, Busy, DeviceLock, KernelError
from tests.lib.agents import Script
from tests.lib.leases import DEVICE, address, lease_of, peers, plane


def test_one_instance_at_a_time_writes(host: Any, family: int, tmp_path: Path) -> None:
    leases = [lease_of(host), *peers(range(1, 4))]
    keywords: dict[str, Any] = {"run_dir": str(tmp_path)}
    program = Path("/proc/self/cmdline").read_bytes().partition(b"\0")[0].decode()
    with plane(host, family, **keywords) as first, plane(host, family, **keywords) as second:
        assert first.plan(leases).to_json() == second.plan(leases).to_json()
        assert [*tmp_path.iterdir()] == []  # reading takes no lock
        assert first.sync(leases).ok

        for write in (lambda: second.sync(leases), second.clean, second.hold):
            with pytest.raises(Busy, match=DEVICE[family]) as caught:
                write()
            assert f"held by process {os.getpid()} ({program} " in caught.value.message
        assert second.plan(leases).is_empty
        assert second.explain(address(family, 1)).to_json()

        first.close()
        assert second.sync(leases).ok
        with pytest.raises(Busy):
            first.resync()
    assert [*tmp_path.iterdir()] == []


def test_a_caller_with_a_lock_of_his_own(host: Any, family: int, tmp_path: Path) -> None:
    with (
        DeviceLock(DEVICE[family], host.ns, str(tmp_path)),
        plane(host, family, run_dir=str(tmp_path), lock=False) as dp,
    ):
        assert dp.sync([lease_of(host), *peers([1])]).ok
        assert dp.update(added=peers([2])).ok


def test_busy_writes_nothing_and_does_not_go_back(host: Any, family: int, tmp_path: Path) -> None:
    with (
        DeviceLock(DEVICE[family], host.ns, str(tmp_path)),
        plane(host, family, run_dir=str(tmp_path)) as dp,
        pytest.raises(Busy),
    ):
        dp.sync([lease_of(host)])
    assert DEVICE[family] not in host.exec("ip", "link")


def test_an_agent_holds_the_lock_from_its_start(host: Any, tmp_path: Path) -> None:
    """Before its source has delivered anything."""
    source = Script([lease_of(host)])
    with plane(host, run_dir=str(tmp_path)) as dp:
        with DeviceLock(DEVICE[6], host.ns, str(tmp_path)), pytest.raises(Busy):
            Agent(dp, source).run()
        with Agent(dp, source) as agent, plane(host, 4, run_dir=str(tmp_path)) as other:
            assert agent.wait_ready(60)
            with pytest.raises(Busy):
                other.sync([lease_of(host)])


def test_a_directory_that_cannot_be_made_is_named(host: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with plane(host, 4, run_dir=str(tmp_path / "file" / "x")) as dp:
        with pytest.raises(KernelError, match="make lock directory") as caught:
            dp.sync([lease_of(host)])
        assert "run_dir=" in caught.value.hint
