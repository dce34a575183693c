"""Modules that are imported when something of them is first asked for.

For annotations: a type that only callers of one method meet costs no import on the way of a sync,
and ``typing.get_type_hints`` finds it all the same.
"""

from __future__ import annotations


class Later:
    """Stands for a module of this package until an attribute of it is read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> object:
        from importlib import import_module

        return getattr(import_module(self._name), name)
