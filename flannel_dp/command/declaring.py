"""Flags that are declared when the command is imported, and made when it is called."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeVar

import click

#: Of a command's function: what makes its flags.
_PENDING = "__flannel_dp_flags__"

#: Of a command's function: what makes flags that it accepts without an effect.
_WITHOUT_EFFECT = "__flannel_dp_flags_without_effect__"

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


def without_effect(*groups: Callable[[_F], _F]) -> Callable[[_F], _F]:
    """Return groups of options as a decorator of a command's function: flags of another command,
    with whose command line this one is tried. It accepts those that it does not have, and does not
    show them in --help."""

    def decorate(function: _F) -> _F:
        setattr(function, _WITHOUT_EFFECT, groups)
        return function

    return decorate


def made_of(command: Callable[..., Any] | None) -> list[click.Parameter]:
    """Make the options and arguments that ``options`` has noted for a command's function."""

    def function() -> None:
        """Collect them, as click does."""

    for one in getattr(command, _PENDING, ()):
        one(function)
    found: list[click.Parameter] = getattr(function, "__click_params__", [])
    return found


def made_without_effect(
    command: Callable[..., Any] | None, own: Collection[click.Parameter]
) -> list[click.Option]:
    """Make the options of ``without_effect`` that are not among its ``own``."""

    def function() -> None:
        """Collect the groups, as a command does."""

    for group in getattr(command, _WITHOUT_EFFECT, ()):
        group(function)
    names = {one.name for one in own}
    return [
        one for one in made_of(function) if one.name not in names and isinstance(one, click.Option)
    ]
