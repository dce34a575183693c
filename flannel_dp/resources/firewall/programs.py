"""Runs the programs that own the firewall's formats: ``nft`` and the ``iptables`` family.

They run in the network namespace of the calling thread (a child inherits it), without a
shell, with the C locale, and never longer than a minute.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
from typing import NamedTuple

from flannel_dp.errors import ConfigError, FlannelDPError, NotPermitted, kernel_error

log = logging.getLogger(__name__)

TIMEOUT = 60.0
"""Seconds one program may take."""

#: iptables has --random-fully and the restore programs have --wait since then.
MODERN_IPTABLES = (1, 6, 2)

_SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_PACKAGES = {"nft": "nftables"}
#: Where a program was found last, by its name and the paths that were searched.
_found: dict[tuple[str, str, str], str] = {}


class Variant(NamedTuple):
    """One iptables: ``suffix`` of its programs' names ("", "-nft" or "-legacy"), and its kind.

    ``kind`` is nft or legacy: two rule sets of one kernel that do not see each other.
    """

    suffix: str
    kind: str

    def program(self, family: int, what: str = "") -> str:
        """``iptables-nft-save`` for family 4 and ``"save"``; ``ip6tables`` for family 6."""
        stem = "iptables" if family == 4 else "ip6tables"
        return f"{stem}{self.suffix}{f'-{what}' if what else ''}"

    @property
    def name(self) -> str:
        """What a person calls it: ``iptables`` or ``iptables-legacy``."""
        return f"iptables{self.suffix}"

    @property
    def is_modern(self) -> bool:
        """Whether it knows --random-fully and --wait (flannel: ``iptablesHasRandomFully``)."""
        words = _version(self.name)
        numbers = words[1].lstrip("v").split(".") if len(words) > 1 else []
        return tuple(int(n) for n in numbers if n.isdigit()) >= MODERN_IPTABLES


def find(program: str) -> str | None:
    """Return the path of a program, or None; sbin is searched where PATH leaves it out."""
    # Not shutil.which: importing shutil, and with it three compressors, takes as long as nft.
    path = os.environ.get("PATH", os.defpath)
    key = (program, path, _SYSTEM_PATH)
    if (known := _found.get(key)) and _is_program(known):
        return known
    folders = dict.fromkeys(f"{path}:{_SYSTEM_PATH}".split(":"))
    places = (os.path.join(folder, program) for folder in folders)
    found = next((at for at in places if _is_program(at)), None)
    if found:
        _found[key] = found
    return found


def _is_program(at: str) -> bool:
    return os.access(at, os.X_OK) and os.path.isfile(at)


def need(program: str) -> str:
    """Return the path of a program. Raises ConfigError naming the package that has it."""
    found = find(program)
    if found is None:
        package = _PACKAGES.get(program, "iptables")
        other = 'engine "iptables"' if program == "nft" else 'engine "nft"'
        raise ConfigError(
            f"firewall rules: the program {program} is not installed",
            hint=f"install the package {package}, or choose {other}",
        )
    return found


def run(program: str, *args: str, stdin: str | None = None) -> str:
    """Run a program and return what it printed.

    Raises ConfigError when it is not installed, NotPermitted when the kernel does not let
    us, and FlannelDPError with its own words when it fails or takes too long.
    """
    import subprocess

    command = [need(program), *args]
    shown = " ".join([program, *args])
    try:
        done = subprocess.run(
            command,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=TIMEOUT,
            env={**os.environ, "LC_ALL": "C"},
        )
    except subprocess.TimeoutExpired as late:
        hint = "see what holds the firewall's lock: 'lsof /run/xtables.lock'"
        raise FlannelDPError(f"{shown}: no end after {TIMEOUT:g} s", hint=hint) from late
    except OSError as error:
        raise kernel_error(error.errno or 0, f"run {command[0]}") from error
    if done.returncode != 0:
        raise _failure(command[0], shown, done.returncode, done.stderr)
    return done.stdout


def _failure(program: str, shown: str, code: int, stderr: str) -> FlannelDPError:
    words = " ".join(line.strip() for line in stderr.splitlines() if line.strip())[:1000]
    if "not permitted" in words or "must be root" in words or "ermission denied" in words:
        hint = "run as root or grant CAP_NET_ADMIN"
        if "legacy" in os.path.basename(os.path.realpath(need(program))):
            hint += (
                " and CAP_NET_RAW, which legacy iptables needs: an agent keeps it where rules of "
                "legacy iptables are there when it starts, so restart it"
            )
        return NotPermitted(errno.EPERM, shown, words, hint=hint)
    hint = "the rules are as they were; see whether the program works by hand"
    if "JSON support" in words:
        hint = "install an nft that was built with JSON support (libnftables with jansson)"
    return FlannelDPError(f"{shown}: exit {code}: {words or 'no message'}", hint=hint)


def variants() -> list[Variant]:
    """Return the iptables that are installed, one of each kind, the system's default first."""
    found: dict[str, Variant] = {}
    for suffix in ("", "-nft", "-legacy"):
        program = f"iptables{suffix}"
        if find(program) is None or find(f"{program}-save") is None:
            continue
        kind = suffix[1:] or _kind(program)
        found.setdefault(kind, Variant(suffix, kind))
    return list(found.values())


def _kind(program: str) -> str:
    """By the program that it is a link to (``xtables-nft-multi``), or by what it says:
    ``iptables v1.8.9 (nf_tables)``. Old ones name no kind and are legacy."""
    target = os.path.basename(os.path.realpath(need(program)))
    for kind in ("nft", "legacy"):
        if f"-{kind}-" in target:
            return kind
    return "nft" if "(nf_tables)" in _version(program) else "legacy"


def _version(program: str) -> list[str]:
    path = need(program)
    return _version_of(path, program, os.stat(path).st_mtime_ns)


@functools.lru_cache(maxsize=16)
def _version_of(_path: str, program: str, _changed: int) -> list[str]:
    """Return what it says of itself; asked again when its file changes."""
    return run(program, "--version").split()


def choose_variant(engine: str) -> Variant:
    """Return the variant that ``engine`` (iptables, iptables-nft or iptables-legacy) means.

    Raises ConfigError naming the package when it is not installed.
    """
    found = variants()
    if engine == "iptables" and found:
        return found[0]
    for variant in found:
        if engine == f"iptables-{variant.kind}":
            return variant
    raise ConfigError(
        f"firewall rules: the program {engine} is not installed",
        hint='install the package iptables, or choose engine "nft"',
    )
