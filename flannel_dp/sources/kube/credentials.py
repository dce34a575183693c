"""Credentials that change: a token in a file, and those of an exec command, in bounded time.

lightkube reads a token again only after the server has rejected it, and waits for an exec command
for as long as it runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
from lightkube import ConfigError
from lightkube.config.client_adapter import user_auth

from flannel_dp.sources.kube.kubeconfig import Exec, Extras
from flannel_dp.sources.limits import EXEC_SECONDS

if TYPE_CHECKING:
    from lightkube.config.models import User

#: A token file is read again after so long, as client-go does: the kubelet replaces tokens before
#: they end.
_FILE_SECONDS = 60.0

_TOKEN_MOST = 1 << 20

#: The variable that tells an exec command what is asked for.
_EXEC_INFO = "KUBERNETES_EXEC_INFO"

Clock = Callable[[], float]


def auth_of(user: User | None, extras: Extras) -> httpx2.Auth | None:
    """Return what adds a user's credentials to requests."""
    if user is not None and user.token_file:
        return FileToken(user.token_file)
    if user is not None and not user.token and extras.command is not None:
        return ExecToken(extras.command, extras.cluster)
    found: httpx2.Auth | None = user_auth(user)
    return found


class _Token(httpx2.Auth, ABC):
    """A bearer token that is kept while it is ``_fresh``, and asked for again when the server
    rejects it."""

    _last = ""

    def sync_auth_flow(
        self, request: httpx2.Request
    ) -> Generator[httpx2.Request, httpx2.Response, None]:
        if self._last and self._fresh():
            request.headers["Authorization"] = f"Bearer {self._last}"
            response = yield request
            if response.status_code != 401:
                return
        self._last = self._token()
        request.headers["Authorization"] = f"Bearer {self._last}"
        yield request

    @abstractmethod
    def _fresh(self) -> bool:
        """Return whether the last token may be used again."""

    @abstractmethod
    def _token(self) -> str:
        """Return a token that was read just now. Raises ConfigError."""


class FileToken(_Token):
    """The token in a file, read again each minute."""

    def __init__(self, path: str, clock: Clock = time.monotonic) -> None:
        self._path, self._clock, self._until = path, clock, 0.0

    def _fresh(self) -> bool:
        """Where the file cannot be read just now the token is used on: it may be valid yet."""
        if self._clock() >= self._until:
            self._until = self._clock() + _FILE_SECONDS
            try:
                self._last = self._read() or self._last
            except (OSError, ValueError):
                return True
        return True

    def _token(self) -> str:
        self._until = self._clock() + _FILE_SECONDS
        try:
            return self._read()
        except FileNotFoundError as error:
            raise ConfigError(f"Token file {self._path} not found") from error

    def _read(self) -> str:
        with Path(self._path).open(encoding="ascii") as file:
            return file.read(_TOKEN_MOST).strip()


class ExecToken(_Token):
    """The token that a command prints, until it ends by what the command says."""

    def __init__(self, command: Exec, cluster: Mapping[str, Any], clock: Clock = time.time) -> None:
        self._exec, self._cluster, self._clock = command, cluster, clock
        self._until: float | None = None

    def _fresh(self) -> bool:
        return self._until is None or self._clock() < self._until

    def _token(self) -> str:
        command, name = self._command(), self._exec.command
        try:
            done = subprocess.run(
                command,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=EXEC_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"{name} did not end within {EXEC_SECONDS:g} s") from error
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()
            raise ConfigError(f"{name} ended with {done.returncode}: {said}")
        printed = json.loads(done.stdout)
        version = printed.get("apiVersion", self._exec.api_version)
        if version != self._exec.api_version:
            raise ConfigError(
                f"{name} printed apiVersion {version!r}, and exec.apiVersion is "
                f"{self._exec.api_version!r}"
            )
        told = printed["status"]
        if "token" not in told and "clientCertificateData" in told:
            raise ConfigError(f"{name} printed clientCertificateData, which is not supported")
        ends = told.get("expirationTimestamp")
        self._until = datetime.fromisoformat(ends).timestamp() if ends else None
        return str(told["token"])

    def _command(self) -> list[str]:
        """A relative path with a slash in it is one beside the kubeconfig, as for kubectl."""
        name = self._exec.command
        if "/" in name:
            name = os.path.join(self._exec.directory, name)
        return [name, *(self._exec.args or [])]

    def _environment(self) -> dict[str, str]:
        spec: dict[str, Any] = {"interactive": False}
        if self._exec.provide_cluster_info:
            spec["cluster"] = dict(self._cluster)
        info = {"apiVersion": self._exec.api_version, "kind": "ExecCredential", "spec": spec}
        given = {one.name: one.value for one in self._exec.env or ()}
        return {**os.environ, **given, _EXEC_INFO: json.dumps(info)}
