"""Flags that are declared when the command is imported, and made when it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

#: Of a command's function: what makes its flags.
_PENDING = "__flannel_dp_flags__"

_F = TypeVar("_F", bound=Callable[..., Any])


def options(*given: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Return click options and arguments as one decorator of a command's function.

    They are made when the command is called (``made_of``), and listed in --help in this order.
    """

    def decorate(function: _F) -> _F:
        setattr(function, _PENDING, (*given, *getattr(function, _PENDING, ())))
        return function

    return decorate


def option(*names: str, **settings: Any) -> Callable[[_F], _F]:
    """Return one click option as ``options`` does."""
    return options(click.option(*names, **settings))


def argument(name: str, **settings: Any) -> Callable[[_F], _F]:
    """Return one click argument as ``options`` does."""
    return options(click.argument(name, **settings))


def made_of(command: Callable[..., Any] | None) -> list[click.Parameter]:
    """Make the options and arguments that ``options`` has noted for a command's function."""

    def function() -> None:
        """Collect them, as click does."""

    for one in getattr(command, _PENDING, ()):
        one(function)
    found: list[click.Parameter] = getattr(function, "__click_params__", [])
    return found
