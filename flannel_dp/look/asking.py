"""Ask the agents that run on this host what they say of themselves.

An agent listens on ``RUN_DIR/INODE-DEVICE.sock``, INODE being that of its network namespace, one
socket with a name for each of its devices. Whoever connects gets one JSON document and the end of
the stream.
"""

from __future__ import annotations

import json
import os
import re
import time
from typing import Any

from flannel_dp.errors import FlannelDPError, NotPermitted
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY
from flannel_dp.kernel.netns import NetNS, netns_identity
from flannel_dp.kernel.unix_sockets import SOCKET, make_socket, short_path

#: How long an agent may take to answer, in seconds, and of how many bytes.
ASK_SECONDS, _MOST_BYTES = 5.0, 4 << 20

_NAME = re.compile(rf"(\d+)-(.+)\{SOCKET}")

_START = "start one with 'flannel-dp sync --watch'; 'flannel-dp show' reads the kernel without it"


class NoAgent(FlannelDPError):
    """No agent answers."""


def ask_agents(
    run_dir: str = DEFAULT_DIRECTORY, netns: NetNS = None, device: str = ""
) -> list[dict[str, Any]]:
    """Return the documents of the agents of one network namespace, or of the one with ``device``.

    Raises NoAgent where there is none, or where one of them does not answer, and NotPermitted
    where they may not be asked.
    """
    own, found, elsewhere = netns_identity(netns)[1], dict[str, dict[str, Any]](), set[int]()
    silent: list[str] = []
    for name in _listed(run_dir):
        parts = _NAME.fullmatch(name)
        if parts is None:
            continue
        if int(parts[1]) != own:
            elsewhere.add(int(parts[1]))
            continue
        try:
            document = ask(f"{run_dir}/{name}")
        except TimeoutError:
            if device in ("", parts[2]):
                silent.append(name)
            continue
        if document is not None and (not device or device in document.get("devices", ())):
            found[str(document.get("pid"))] = document
    where = f"of device {device} " if device else ""
    if silent:
        raise NoAgent(
            f"the agent {where}did not answer within {ASK_SECONDS:.0f} s ({run_dir}/{silent[0]})",
            hint="read its log, and restart it if it is stuck"
            + ("; --device names another agent" if found else ""),
        )
    if found:
        return [*found.values()]
    if elsewhere:
        raise NoAgent(
            f"no agent {where}answers in this network namespace; there are agents in others",
            hint="name one with --netns, as 'ip netns list' prints it",
        )
    raise NoAgent(f"no agent {where}answers in {run_dir}", hint=_START)


def ask(path: str) -> dict[str, Any] | None:
    """Return the document of the agent that listens at ``path``; None where none does.

    Raises TimeoutError and NotPermitted. ``socat - UNIX-CONNECT:PATH``.
    """
    until = time.monotonic() + ASK_SECONDS
    with make_socket() as connection:
        connection.settimeout(ASK_SECONDS)
        try:
            with short_path(path) as short:
                connection.connect(short)
            text = bytearray()
            while chunk := connection.recv(1 << 16):
                text += chunk
                connection.settimeout(max(0.001, until - time.monotonic()))
                if len(text) > _MOST_BYTES:
                    return None
        except PermissionError as error:
            code, what = error.errno or 13, f"ask the agent at {path}"
            raise NotPermitted(code, what, hint="run as root: it belongs to it") from error
        except BlockingIOError as error:  # its queue is full: it is asked by many, or stuck
            raise TimeoutError(str(error)) from error
        except TimeoutError:
            raise
        except OSError:
            return None
    try:
        document = json.loads(text)
    except ValueError:  # it ended meanwhile
        return None
    return document if isinstance(document, dict) else None


def _listed(run_dir: str) -> list[str]:
    try:
        return sorted(os.listdir(run_dir))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except PermissionError as error:
        code, what = error.errno or 13, f"list {run_dir}"
        raise NotPermitted(code, what, hint="run as root: it belongs to it") from error
