"""Run ``_compile.py`` in a process of its own, under an interpreter that has what it takes.

The process lives for one request: it has bcc, and with it a compiler, or enters another
mount namespace, which whole processes do. It must not share any import with this package.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flannel_dp.errors import FlannelDPError, KernelError, Unsupported, kernel_error

PACKAGE = Path(__file__).resolve().parent

#: A helper that runs longer than this is ended and counts as failed.
SECONDS = 120.0

_LOG_LINES = 12


def interpreters() -> list[str]:
    """Return the Pythons that may have bcc: this one, the distribution's, the first on the path."""
    found = [sys.executable, "/usr/bin/python3", shutil.which("python3") or ""]
    return [path for path in dict.fromkeys(found) if path and os.access(path, os.X_OK)]


def call_helper(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run ``request`` in a helper, under each interpreter until one has the modules.

    Returns its answer. Raises Unsupported, Conflict, NotPermitted, KernelError.
    """
    without = []
    for interpreter in interpreters():
        answer, log = _run(interpreter, request)
        if "refused" not in answer:
            return answer
        if answer["refused"] != "no bcc":
            raise _error(answer, log)
        without.append(f"{interpreter}: {answer['message']}")
    raise _error({"refused": "no bcc", "message": "; ".join(without)}, "")


def _run(interpreter: str, request: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return one helper's answer, and what it printed to standard error."""
    command = [interpreter, "-I", str(PACKAGE / "_compile.py")]
    text = json.dumps({**request, "path": str(PACKAGE.parents[1])})
    kept = ("BCC_KERNEL_SOURCE", "LANG", "PATH", "TMPDIR")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    try:
        done = subprocess.run(
            command,
            input=text.encode(),
            capture_output=True,
            env=environment,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(
            errno.ETIMEDOUT, f"load eBPF programs with {interpreter}", f"over {SECONDS:.0f} s"
        ) from error
    except OSError as error:
        raise kernel_error(error.errno or errno.EIO, f"run {interpreter}") from error
    log = done.stderr.decode("utf-8", "replace")
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        ended = f"{interpreter} ended with {done.returncode} while loading eBPF programs"
        answer = {"refused": "crash", "message": ended}
    return answer, log


def _error(answer: Mapping[str, Any], log: str) -> FlannelDPError:
    """Return the typed error for what a helper could not do."""
    kind, message, code = answer["refused"], answer["message"], answer.get("errno") or 0
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    advice = {
        "no bcc": (
            f"bcc, which compiles eBPF programs, is missing: {message}",
            "install python3-bpfcc (Debian, Ubuntu) or python3-bcc (Fedora); PyPI's package named "
            "bcc is something else",
        ),
        "no headers": (
            f"the kernel headers that bcc wants are missing: {message}",
            f"install linux-headers-$(uname -r), or linux-headers-{machine}: any kernel's will do",
        ),
        "no BTF": (
            f"the kernel does not describe its types: {message}",
            "this takes a kernel with CONFIG_DEBUG_INFO_BTF (/sys/kernel/btf/vmlinux)",
        ),
    }
    if kind in advice:
        return Unsupported(advice[kind][0], hint=advice[kind][1])
    lines = [line for line in log.splitlines() if line.strip()][-_LOG_LINES:]
    told = message + (f" ({os.strerror(code)})" if code else "")
    told += "".join(f"\n  {line}" for line in lines)
    if kind == "load" and code == errno.EPERM:
        hint = "grant CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN, or see kernel lockdown in dmesg"
        return Unsupported(f"the kernel rejects eBPF programs: {told}", hint=hint)
    if kind in ("compile", "load", "attach", "crash"):
        hint = "report this with the output of 'uname -r' and the version of bcc"
        return Unsupported(f"eBPF programs cannot be loaded: {told}", hint=hint)
    return kernel_error(code or errno.EIO, "pin eBPF programs", message)
