"""Fixtures of the unit tests: a health server that is asked."""

from __future__ import annotations

from tests.lib.health import board_and_client_fixture, board_fixture, client_fixture

__all__ = [  # fixtures for the tests of this folder
    "board_and_client_fixture",
    "board_fixture",
    "client_fixture",
]
