"""Credentials of a kubeconfig's ``exec`` command, in bounded time.

lightkube waits for the command for as long as it runs.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Generator
from typing import TYPE_CHECKING

from lightkube import ConfigError
from lightkube.config.client_adapter import ExecAuth

from flannel_dp.sources.limits import EXEC_SECONDS

if TYPE_CHECKING:
    import httpx2


class TimedExecAuth(ExecAuth):
    """As ExecAuth: the token is kept, and asked for again when the server rejects it."""

    def sync_auth_flow(
        self, request: httpx2.Request
    ) -> Generator[httpx2.Request, httpx2.Response, None]:
        if self._last_bearer:
            request.headers["Authorization"] = self._last_bearer
            response = yield request
            if response.status_code != 401:
                return
        self._last_bearer = f"Bearer {self._token()}"
        request.headers["Authorization"] = self._last_bearer
        yield request

    def _token(self) -> str:
        command, env = self._prepare()
        try:
            done = subprocess.run(
                command, env=env, capture_output=True, timeout=EXEC_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise ConfigError(f"{command[0]} did not end within {EXEC_SECONDS:g} s") from error
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").strip()
            raise ConfigError(f"{command[0]} ended with {done.returncode}: {said}")
        return str(json.loads(done.stdout)["status"]["token"])
