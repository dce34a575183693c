"""What processes have left on this host for network namespaces and devices that are gone: locks,
notes, and the pins of maps and programs.

Only what nothing can need is removed: a lock that no process holds, whatever is of a namespace
that is gone, and pins of a device that is gone while no process holds its lock. Where this process
cannot see all namespaces (in a container) only its own is cleaned.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec import Struct

from flannel_dp.bpf import pins
from flannel_dp.errors import Busy, FlannelDPError, NotPermitted, kernel_error
from flannel_dp.kernel.links import LinkReader
from flannel_dp.kernel.living import is_process, living_namespaces
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY, DeviceLock, remove_unheld
from flannel_dp.kernel.netns import NetNS, netns_identity
from flannel_dp.kernel.unix_sockets import remove_unheld_socket
from flannel_dp.resources.counters.device import is_pin
from flannel_dp.resources.forwarding.pinned import PREFIX

log = logging.getLogger(__name__)

_LOCK = re.compile(r"(\d+)-.+\.lock")
_NOTE = re.compile(r"(\d+)-[0-9a-f]{16}\.(?:lease|store)(?:\.(\d+))?")
_HISTORY = re.compile(r"(\d+)-.+\.history(?:\.1)?")
_SOCKET = re.compile(r"\d+-.+\.sock(?:\.\d+)?")
_PINS = re.compile(r"([ci]\d+)-(.+)")
_CLSACT = "clsact-"

_NO_LISTENER = "no process listens at it"
_NO_HOLDER = "no process holds it"
_NO_NAMESPACE = "its network namespace is gone"
_NO_DEVICE = "its device is gone"
_NO_PROCESS = "the process that wrote it is gone"
#: Attempts to enter namespaces whose processes end meanwhile.
_ATTEMPTS = 4
_FOREIGN = "not pinned by flannel-dp"


class Leftover(Struct, frozen=True):
    """One of them: ``kind`` is "lock", "socket", "note" or "pin"; ``reason`` says why it goes, or
    stays."""

    kind: str
    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind} {self.path}: {self.reason}"


class Sweep(Struct, frozen=True):
    """What was removed, what of it is another program's and stays, and what could not be removed
    (a path, and the error)."""

    removed: tuple[Leftover, ...] = ()
    kept: tuple[Leftover, ...] = ()
    failures: tuple[tuple[str, str], ...] = ()
    #: Whether all network namespaces were seen, so that those that are gone are known.
    complete: bool = True

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Return the document of ``clean --stale --output json``."""

        def rows(found: tuple[Leftover, ...]) -> list[dict[str, str]]:
            return [{"kind": one.kind, "path": one.path, "reason": one.reason} for one in found]

        return {
            "schema": 1,
            "ok": self.ok,
            "removed": rows(self.removed),
            "kept": rows(self.kept),
            "failures": [{"path": path, "error": error} for path, error in self.failures],
            "complete": self.complete,
        }

    def lines(self, paint: Any = lambda text, _: text, width: int = 0) -> Iterator[str]:
        """Yield what a person reads, as a plan has it."""
        for one in self.removed:
            yield paint(f"- {one}", "red")
        for one in self.kept:
            yield f"  {one}"
        for path, error in self.failures:
            yield paint(f"! {path}: {error}", "red")
        if not self.complete:
            yield "not all network namespaces can be seen from here: only this one was cleaned"
        if not (self.removed or self.failures):
            yield "nothing stale"


def sweep(run_dir: str = DEFAULT_DIRECTORY, netns: NetNS = None) -> Sweep:
    """Remove what was left on this host; ``netns`` is the namespace whose devices count.

    What cannot be removed is in ``failures``. Raises NotPermitted and KernelError where nothing can
    be listed. ``flannel-dp clean --stale``; ``rm``, where ``lsns -t net`` and
    ``ip link`` do not have what it is for.
    """
    # What is listed before namespaces are looked for cannot be of a later one.
    files = _entries(Path(run_dir))
    folders = [one for root in pins.find_roots(run_dir) for one in _entries(root / pins.FOLDER)]
    host = _Host(netns, run_dir)
    done = _Done()
    for path in files:
        if _LOCK.fullmatch(path.name):
            done.attempt("lock", path, _NO_HOLDER, remove_unheld)
        elif _SOCKET.fullmatch(path.name):
            done.attempt("socket", path, _NO_LISTENER, remove_unheld_socket)
        elif reason := host.note_is_stale(path.name):
            done.attempt("note", path, reason, _unlink)
    for folder in folders:
        for path, reason in host.stale_pins(folder):
            if reason == _FOREIGN:
                done.kept.append(Leftover("pin", str(path), reason))
            elif path != folder or not _entries(folder):
                done.attempt("pin", path, reason, _unpin)
    found = Sweep((*done.removed,), (*done.kept,), (*done.failures,), host.is_seen)
    for one in found.removed:
        log.info("Removed what was left behind: %(what)s", {"what": one})
    for failed, error in found.failures:
        log.warning(
            "Cannot remove what was left behind, %(what)s: %(error)s",
            {"what": failed, "error": error},
        )
    return found


class _Done:
    """What a sweep has done so far."""

    def __init__(self) -> None:
        self.removed: list[Leftover] = []
        self.kept: list[Leftover] = []
        self.failures: list[tuple[str, str]] = []

    def attempt(self, kind: str, path: Path, reason: str, remove: Any) -> None:
        """Note what ``remove(path)`` did: it returns whether there was anything to remove."""
        try:
            if remove(path):
                self.removed.append(Leftover(kind, str(path), reason))
        except FileNotFoundError:  # another sweep was faster
            pass
        except (OSError, FlannelDPError) as error:
            self.failures.append((str(path), str(error)))


class _Host:
    """The namespaces of this host and the devices of this one, read when they are asked for."""

    def __init__(self, netns: NetNS, run_dir: str) -> None:
        self._netns, self._run_dir = netns, run_dir

    @cached_property
    def living(self) -> Mapping[int, str] | None:
        return living_namespaces()

    @property
    def is_seen(self) -> bool:
        """Whether all namespaces are known, as far as that mattered."""
        return "living" not in self.__dict__ or self.living is not None

    @cached_property
    def _keys(self) -> frozenset[str] | None:
        """The keys of all namespaces' pins, None where they are not known."""
        if self.living is None:
            return None
        keys, found = {self._key}, dict(self.living)
        for _ in range(_ATTEMPTS):
            failed = set()
            for inode, path in found.items():
                try:
                    keys |= {_key_of(path, inode), f"i{inode}"}
                except (FlannelDPError, OSError):
                    failed.add(inode)
            # Who had it has ended meanwhile, or it may not be entered.
            again = living_namespaces() if failed else {}
            if again is None:
                return None
            found = {inode: again[inode] for inode in failed if inode in again}
            if not found:
                return frozenset(keys)
        return None

    @cached_property
    def _key(self) -> str:
        return pins.namespace_key(self._netns)

    def note_is_stale(self, name: str) -> str:
        """Return why a file is of no use, "" where it may be, or is none of ours."""
        kept = _HISTORY.fullmatch(name)
        found = kept or _NOTE.fullmatch(name)
        if found is None:
            return ""
        if not kept and found[2] and not is_process(int(found[2])):
            return _NO_PROCESS
        if self.living is None or int(found[1]) in self.living:
            return ""
        return "" if int(found[1]) == netns_identity(self._netns)[1] else _NO_NAMESPACE

    def stale_pins(self, folder: Path) -> Iterator[tuple[Path, str]]:
        """Yield the pins of one device that are of no use, and why; then the folder itself, where
        all of them are."""
        found = _PINS.fullmatch(folder.name)
        if found is None:
            return
        device = found[2].replace("%2e", ".").replace("%25", "%")
        if found[1] == self._key:
            reason = _NO_DEVICE
            index = self._index(device)
            if index or self._is_held(device):
                for path in _entries(folder):
                    if path.name.startswith(_CLSACT) and path.name != f"{_CLSACT}{index}":
                        yield path, _NO_DEVICE
                return
        elif self._keys is None or found[1] in self._keys:
            return
        else:
            reason = _NO_NAMESPACE
        for path in _entries(folder):
            yield path, reason if _is_ours(path) else _FOREIGN
        yield folder, reason

    def _index(self, device: str) -> int:
        """Return the ifindex of a device of this namespace, 0 where there is none."""
        with LinkReader(self._netns) as reader:
            link = reader.link(device)
        return link.index if link else 0

    def _is_held(self, device: str) -> bool:
        """Return whether a process has the device's lock: it may have yet to make the device."""
        try:
            with DeviceLock(device, self._netns, self._run_dir):
                return False
        except Busy:
            return True


def _key_of(path: str, inode: int) -> str:
    """Return the key of the namespace at ``path``. Raises OSError where it is another one now."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_ino != inode:
            raise FileNotFoundError(errno.ENOENT, "another namespace is there now", path)
        return pins.namespace_key(fd)
    finally:
        os.close(fd)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        code, what = error.errno or errno.EACCES, f"list {folder}"
        raise NotPermitted(code, what, hint="run as root: it belongs to it") from error
    except OSError as error:
        raise kernel_error(error.errno or errno.EIO, f"list {folder}") from error


def _is_ours(path: Path) -> bool:
    name = path.name
    if name.startswith(_CLSACT):
        return path.is_dir()
    return (is_pin(name) or name.startswith(PREFIX)) and not path.is_dir()


def _unlink(path: Path) -> bool:
    path.unlink()
    return True


def _unpin(path: Path) -> bool:
    path.rmdir() if path.is_dir() else path.unlink()
    return True
