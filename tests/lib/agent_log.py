"""What an agent logs, as it is logged."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from flannel_dp.agent.logs import fields_of
from tests.lib.waiting import wait_until


class Log(logging.Handler):
    """What was logged so far, sentence by sentence."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def said(self, *parts: str) -> list[logging.LogRecord]:
        """The records whose sentences contain all parts."""
        found = [*self.records]
        return [one for one in found if all(part in one.getMessage() for part in parts)]

    def one(self, *parts: str) -> dict[str, str]:
        """Wait for the one record with these parts, and return its fields."""
        wait_until(lambda: bool(self.said(*parts)))
        (record,) = self.said(*parts)
        return fields_of(record)


@pytest.fixture(name="log")
def log_fixture() -> Iterator[Log]:
    """The log from the start of the agent on: pytest's own has one for each phase."""
    logger, made = logging.getLogger("flannel_dp"), Log()
    before = logger.level
    logger.addHandler(made)
    logger.setLevel(logging.INFO)
    yield made
    logger.removeHandler(made)
    logger.setLevel(before)
