"""One writer per device and namespace: held, refused, let go, and left by a killed process."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.errors import Busy, ConfigError, KernelError
from flannel_dp.kernel.lock import DeviceLock, DeviceLocks, has_entries
from flannel_dp.kernel.netns import netns_identity

HOLD = """
import sys
from flannel_dp.kernel.lock import DeviceLock
with DeviceLock("flannel.1", None if sys.argv[1] == "-" else sys.argv[1], sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(netns: str, directory: Path) -> subprocess.Popen[str]:
    """Start another process that has the lock when this returns."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, netns, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    return holder


def test_file_is_named_after_namespace_and_device(netns: str, tmp_path: Path) -> None:
    directory = tmp_path / "made" / "here"

    with DeviceLock("flannel.1", netns, str(directory)) as lock:
        assert lock.held
        assert lock.path == f"{directory}/{netns_identity(netns)[1]}-flannel.1.lock"
        assert Path(lock.path).read_text() == f"{os.getpid()}\n"

    assert not lock.held
    assert [*directory.iterdir()] == []


def test_other_process_is_refused_with_the_pid_of_the_holder(netns: str, tmp_path: Path) -> None:
    with hold(netns, tmp_path) as holder:
        with pytest.raises(Busy, match=f"flannel.1 is held by process {holder.pid}") as caught:
            DeviceLock("flannel.1", netns, str(tmp_path)).acquire()
        assert caught.value.hint
        holder.communicate("")

    with DeviceLock("flannel.1", netns, str(tmp_path)) as lock:
        assert lock.held


def test_the_command_of_the_holder_is_named(netns: str, tmp_path: Path) -> None:
    with hold(netns, tmp_path) as holder:
        with pytest.raises(Busy) as caught:
            DeviceLock("flannel.1", netns, str(tmp_path)).acquire()
        holder.communicate("")

    assert f"is held by process {holder.pid} ({sys.executable} -c ?import sys?" in (
        caught.value.message
    )


def test_nobody_else_can_open_the_file(netns: str, tmp_path: Path) -> None:
    """Who can open it could lock it."""
    directory = tmp_path / "locks"
    with DeviceLock("flannel.1", netns, str(directory)) as lock:
        assert directory.stat().st_mode & 0o777 == 0o700
        assert Path(lock.path).stat().st_mode & 0o777 == 0o600


def test_a_file_of_an_earlier_version_is_closed_to_others(
    netns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o755)
    monkeypatch.setattr("flannel_dp.kernel.lock.DEFAULT_DIRECTORY", str(tmp_path))
    lock = DeviceLock("flannel.1", netns, str(tmp_path))
    Path(lock.path).touch(0o644)
    with lock:
        assert Path(lock.path).stat().st_mode & 0o777 == 0o600
        assert tmp_path.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_was_named_keeps_its_mode(netns: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with DeviceLock("flannel.1", netns, str(tmp_path)):
        assert tmp_path.stat().st_mode & 0o777 == 0o755


def test_a_file_that_was_removed_before_it_could_be_locked_is_not_the_lock(
    netns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and flock here one process releases the lock, and another one takes it."""
    former, third = (DeviceLock("flannel.1", netns, str(tmp_path)) for _ in range(2))
    former.acquire()
    lock = fcntl.flock

    def meanwhile(fd: int, how: int) -> None:
        monkeypatch.undo()
        former.release()
        third.acquire()
        lock(fd, how)

    monkeypatch.setattr("flannel_dp.kernel.lock.fcntl.flock", meanwhile)
    with pytest.raises(Busy):
        DeviceLock("flannel.1", netns, str(tmp_path)).acquire()

    third.release()
    with DeviceLock("flannel.1", netns, str(tmp_path)) as last:
        assert Path(last.path).read_text() == f"{os.getpid()}\n"


def test_a_forked_process_does_not_release_the_lock(netns: str, tmp_path: Path) -> None:
    with DeviceLock("flannel.1", netns, str(tmp_path)) as lock:
        if not (child := os.fork()):
            lock.release()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with pytest.raises(Busy):
            DeviceLock("flannel.1", netns, str(tmp_path)).acquire()


def test_several_devices_are_locked_together_or_not_at_all(netns: str, tmp_path: Path) -> None:
    first = DeviceLocks(netns, str(tmp_path))
    second = DeviceLocks(netns, str(tmp_path))
    first.take(["flannel-v6.1"])
    with pytest.raises(Busy, match=r"flannel-v6\.1"):
        second.take(["flannel.1", "flannel-v6.1"])
    assert second.held == ()

    first.take(["flannel.1", "flannel-v6.1"])
    assert first.held == ("flannel-v6.1", "flannel.1")
    first.release()
    second.take(["flannel.1"])
    second.release()
    assert [*tmp_path.iterdir()] == []


def test_killed_holder_leaves_no_lock(netns: str, tmp_path: Path) -> None:
    with hold(netns, tmp_path) as holder:
        holder.kill()
        holder.wait()

        with DeviceLock("flannel.1", netns, str(tmp_path)) as lock:
            assert Path(lock.path).read_text() == f"{os.getpid()}\n"


def test_two_names_of_one_namespace_are_one_lock(netns: str, tmp_path: Path) -> None:
    with DeviceLock("flannel.1", netns, str(tmp_path)), pytest.raises(Busy):
        DeviceLock("flannel.1", f"/run/netns/{netns}", str(tmp_path)).acquire()


def test_other_device_or_namespace_is_another_lock(host: Any, netns: str, tmp_path: Path) -> None:
    with (
        DeviceLock("flannel.1", netns, str(tmp_path)),
        DeviceLock("flannel-v6.1", netns, str(tmp_path)),
        DeviceLock("flannel.1", host.ns, str(tmp_path)),
        DeviceLock("flannel.1", None, str(tmp_path)) as last,
    ):
        assert last.held


def test_taking_it_twice_is_refused_and_keeps_the_first(netns: str, tmp_path: Path) -> None:
    with DeviceLock("flannel.1", netns, str(tmp_path)) as lock:
        with pytest.raises(Busy, match=str(os.getpid())):
            lock.acquire()
        assert lock.held
    lock.release()

    with lock:
        assert lock.held


def test_error_inside_lets_go(netns: str, tmp_path: Path) -> None:
    lock = DeviceLock("flannel.1", netns, str(tmp_path))
    with pytest.raises(ZeroDivisionError), lock:
        raise ZeroDivisionError

    assert not lock.held


@pytest.mark.parametrize("device", ["", ".", "..", "../etc", "a\0"])
def test_what_cannot_be_a_device_name(device: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a device name"):
        DeviceLock(device)


def test_directory_that_cannot_be_made_is_named(netns: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    directory = str(tmp_path / "file" / "below")

    with pytest.raises(KernelError, match=directory) as caught:
        DeviceLock("flannel.1", netns, directory).acquire()

    assert caught.value.errno == errno.ENOTDIR
    assert caught.value.hint


def test_read_only_directory_is_named(host: Any, tmp_path: Path) -> None:
    script = f"""
from flannel_dp.errors import KernelError
from flannel_dp.kernel.lock import DeviceLock
try:
    DeviceLock("flannel.1", None, {str(tmp_path)!r}).acquire()
except KernelError as error:
    print(error)
"""
    shell = f'mount -t tmpfs -o ro none {tmp_path} && "$@"'

    told = host.exec("unshare", "--mount", "sh", "-c", shell, "sh", sys.executable, "-c", script)

    assert "Read-only file system (EROFS)" in told
    assert str(tmp_path) in told


def test_a_full_disk_stops_no_holder(host: Any, tmp_path: Path) -> None:
    """What is in the file is a help for others."""
    script = f"""
import pathlib
from flannel_dp.errors import Busy
from flannel_dp.kernel.lock import DeviceLock
pathlib.Path({str(tmp_path)!r}, "fills").write_bytes(bytes(4096))
with DeviceLock("flannel.1", None, {str(tmp_path)!r}) as lock:
    print(lock.held, pathlib.Path(lock.path).stat().st_size)
    try:
        DeviceLock("flannel.1", None, {str(tmp_path)!r}).acquire()
    except Busy as error:
        print(error.message)
print([one.name for one in pathlib.Path({str(tmp_path)!r}).iterdir()])
"""
    shell = f'mount -t tmpfs -o size=4k none {tmp_path} && "$@"'

    told = host.exec("unshare", "--mount", "sh", "-c", shell, "sh", sys.executable, "-c", script)

    assert told.splitlines() == [
        "True 0",
        "device flannel.1 is held by another process",
        "['fills']",
    ]


def test_lock_file_is_not_followed_elsewhere(netns: str, tmp_path: Path) -> None:
    lock = DeviceLock("flannel.1", netns, str(tmp_path))
    target = tmp_path / "precious"
    target.write_text("kept")
    Path(lock.path).symlink_to(target)

    with pytest.raises(KernelError, match="open lock file"):
        lock.acquire()

    assert target.read_text() == "kept"


def test_no_descriptor_is_left(netns: str, tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with DeviceLock("flannel.1", netns, str(tmp_path)):
        for _ in range(10):
            with pytest.raises(Busy):
                DeviceLock("flannel.1", netns, str(tmp_path)).acquire()

    assert len(os.listdir("/proc/self/fd")) <= before  # those of earlier tests may be closed


def test_an_empty_folder_of_pins_makes_no_work(tmp_path: Path) -> None:
    folder = str(tmp_path / "flannel-dp")
    assert not has_entries(folder)
    (tmp_path / "flannel-dp").mkdir()
    assert not has_entries(folder)
    (tmp_path / "flannel-dp/c1-flannel%2e1").mkdir()
    assert has_entries(folder)
    assert not has_entries(f"{folder}/c1-flannel%2e1/x")
