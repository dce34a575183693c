"""Fixtures of the unit tests: a health server, a file that is followed, a Kubernetes API server."""

from __future__ import annotations

from tests.lib.followed_file import followed_fixture, leases_fixture
from tests.lib.health import board_and_client_fixture, board_fixture, client_fixture
from tests.lib.kube import (
    certificates_fixture,
    follow_fixture,
    make_server_fixture,
    options_fixture,
    server_certificate_fixture,
    server_fixture,
)

__all__ = [  # fixtures for the tests of this folder
    "board_and_client_fixture",
    "board_fixture",
    "certificates_fixture",
    "client_fixture",
    "follow_fixture",
    "followed_fixture",
    "leases_fixture",
    "make_server_fixture",
    "options_fixture",
    "server_certificate_fixture",
    "server_fixture",
]
