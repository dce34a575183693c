"""Pauses between attempts: they grow, they are bounded, and no two processes keep step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct, field

if TYPE_CHECKING:
    from random import Random


def _random() -> Random:
    from random import Random  # only who follows a source needs it

    return Random()


class Backoff(Struct):
    """``next()`` is the pause before the next attempt, in seconds.

    The first is about ``first``, each further one about twice as long, up to
    ``most``; every one is varied by a quarter either way. ``reset`` after a success.
    """

    first: float = 0.1
    most: float = 30.0
    random: Random = field(default_factory=_random)
    attempts: int = 0

    def next(self) -> float:
        """Return the next pause."""
        pause = min(self.most, self.first * 2.0 ** min(self.attempts, 32))
        self.attempts += 1
        return jittered(pause, 0.25, self.random)

    def reset(self) -> None:
        """It worked: the next failure is a first one again."""
        self.attempts = 0


def jittered(seconds: float, share: float, source: Random) -> float:
    """Return ``seconds``, up to ``share`` of it more or less."""
    return seconds * (1 - share + 2 * share * source.random())
