"""What is left of namespaces and devices that are gone is removed, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from flannel_dp import locks
from flannel_dp._core import BpfMap
from flannel_dp.bpf import pins
from flannel_dp.command.cli import main
from flannel_dp.kernel import living
from flannel_dp.kernel.lock import DeviceLock
from flannel_dp.kernel.netns import netns_identity
from flannel_dp.leftovers import Sweep, sweep
from tests.lib import namespaces
from tests.lib.leases import DEVICE, lease_of, peers, plane

MARK = "0123456789abcdef"
_HASH = 1


@pytest.fixture(autouse=True)
def _all_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """These namespaces are seen in a container, too."""
    monkeypatch.setattr(living, "sees_all_processes", lambda: True)


@pytest.fixture(autouse=True)
def _pins_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tests sweep as well."""
    mount = tmp_path.with_name(f"{tmp_path.name}-bpf")
    mount.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", mount], check=True)
    for name, value in (("SYSTEM_MOUNT", mount), ("OWN_MOUNT", mount), ("_INIT_ROOT", mount)):
        monkeypatch.setattr(pins, name, str(value))
    monkeypatch.setattr(locks, "has_pins", lambda run_dir: True)
    yield
    subprocess.run(["umount", mount], check=True)


def pin(path: Path) -> None:
    with closing(BpfMap.create(_HASH, 8, 8, 1, 0, "left")) as made:
        made.pin(path)


class Left:
    """A namespace's lock, note, and pins for a device that it does not have."""

    def __init__(self, netns: str, run_dir: Path, device: str = "flannel.1") -> None:
        self.inode = netns_identity(netns)[1]
        self.lock = run_dir / f"{self.inode}-{device}.lock"
        self.note = run_dir / f"{self.inode}-{MARK}.lease"
        self.unfinished = run_dir / f"{self.inode}-{MARK}.store.{os.getpid()}"
        self.pins = pins.pin_directory(device, netns, create=True)
        run_dir.mkdir(0o700, exist_ok=True)
        self.lock.write_text("1\n")
        self.note.write_text("{}")
        self.unfinished.write_text("{}")
        for name in ("forward-peers4", "forward-peers6%old", "peers", "others"):
            pin(self.pins / name)
        (self.pins / "clsact-7").mkdir()

    @property
    def files(self) -> set[str]:
        found = (self.lock, self.note, self.unfinished)
        return {path.name for path in found if path.exists()}

    @property
    def pinned(self) -> list[str]:
        return sorted(p.name for p in self.pins.iterdir()) if self.pins.exists() else []


@pytest.fixture
def gone(tmp_path: Path) -> Iterator[Left]:
    """What a namespace left that is gone."""
    name = f"gone-{os.getpid()}"
    namespaces.Namespace(name).close()
    left = Left(name, tmp_path)
    namespaces.delete(name)
    yield left
    pins.remove(left.pins)


def removed(found: Sweep) -> set[str]:
    return {Path(one.path).name for one in found.removed}


def test_everything_of_a_namespace_that_is_gone_goes(
    gone: Left, netns: str, tmp_path: Path
) -> None:
    lives = Left(netns, tmp_path)

    found = sweep(str(tmp_path))

    assert found.ok
    assert found.complete
    assert gone.files == set()
    assert gone.pinned == []
    assert not gone.pins.exists()
    assert lives.files == {lives.note.name, lives.unfinished.name}
    assert len(lives.pinned) == 5
    assert {gone.lock.name, gone.note.name, "forward-peers6%old", "clsact-7"} <= removed(found)
    assert {one.reason for one in found.removed} == {
        "no process holds it",
        "its network namespace is gone",
    }
    assert sweep(str(tmp_path)).removed == ()


def test_a_namespace_that_only_a_descriptor_keeps_is_living(lab: Any, tmp_path: Path) -> None:
    name = f"held-{os.getpid()}"
    namespaces.Namespace(name).close()
    fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
    left = Left(name, tmp_path)
    namespaces.delete(name)
    try:
        sweep(str(tmp_path))
        assert left.note.exists()
        assert len(left.pinned) == 5
    finally:
        os.close(fd)

    sweep(str(tmp_path))
    assert not left.note.exists()
    assert left.pinned == []


def test_where_not_all_namespaces_are_seen_none_is_gone(
    gone: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(living, "sees_all_processes", lambda: False)

    found = sweep(str(tmp_path))

    assert not found.complete
    assert removed(found) == {gone.lock.name}
    assert "not all network namespaces" in "\n".join(found.lines())


def test_pins_of_a_device_that_is_gone_unless_its_lock_is_held(netns: str, tmp_path: Path) -> None:
    left = Left(netns, tmp_path)
    with DeviceLock("flannel.1", netns, str(tmp_path)):
        sweep(str(tmp_path), netns)
        assert left.pinned == ["forward-peers4", "forward-peers6%old", "others", "peers"]

    found = sweep(str(tmp_path), netns)

    assert left.pinned == []
    assert {one.reason for one in found.removed} == {"its device is gone"}
    assert left.note.exists()


def test_what_others_pinned_stays_and_is_named(gone: Left, tmp_path: Path) -> None:
    pin(gone.pins / "stranger")

    found = sweep(str(tmp_path))

    assert gone.pinned == ["stranger"]
    assert [(Path(one.path).name, one.reason) for one in found.kept] == [
        ("stranger", "not pinned by flannel-dp")
    ]


def test_files_that_are_none_of_ours_stay(gone: Left, tmp_path: Path) -> None:
    names = {"README", "12-x.lease", f"{gone.inode}-flannel.1.locked", f"x{gone.note.name}"}
    for name in names:
        (tmp_path / name).touch()

    sweep(str(tmp_path))

    assert {path.name for path in tmp_path.iterdir()} == names


def test_the_next_sync_removes_it(gone: Left, host: Any, family: int, tmp_path: Path) -> None:
    with plane(host, family, run_dir=str(tmp_path)) as dp:
        assert dp.sync([lease_of(host), *peers([1])]).ok

    assert [*tmp_path.iterdir()] == []
    assert gone.pinned == []


def test_clean_removes_it(
    gone: Left, host: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with plane(host, 4, lock=False) as dp:
        dp.sync([lease_of(host), *peers([1])])
    flags = ["--netns", host.ns, "--run-dir", str(tmp_path), "--output", "json"]

    assert main(["clean", "--stale", *flags]) == 0

    document = json.loads(capsys.readouterr().out)
    assert document["ok"]
    assert document["complete"]
    row = {"kind": "note", "path": str(gone.note), "reason": "its network namespace is gone"}
    assert row in document["removed"]
    assert DEVICE[4] in host.exec("ip", "link")  # of a living namespace
    assert main(["clean", "--stale", *flags[:4]]) == 0
    assert capsys.readouterr().out == "nothing stale\n"


def test_a_device_and_all_of_it_are_one_question(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["clean", "--stale", "--keep-device"]) == 2
    assert "--stale" in capsys.readouterr().err


def test_the_run_directory_of_a_variable(
    gone: Left, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLANNELD_RUN_DIR", str(tmp_path))

    assert main(["clean", "--stale"]) == 0

    assert gone.files == set()
