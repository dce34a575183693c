"""Former names of parameters: accepted, with a DeprecationWarning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def renamed(**names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Return a decorator that accepts parameters by former names: ``renamed(former="name")``.

    A call with a former name warns (DeprecationWarning). Raises TypeError, as for any parameter
    that is given twice, where a call has both names.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for former, name in names.items():
                if former not in kwargs:
                    continue
                where = function.__qualname__
                if name in kwargs:
                    raise TypeError(f"{where}() got both {name}= and {former}=, its former name")
                warnings.warn(
                    f"{where}(): the parameter {former} is named {name} now",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[name] = kwargs.pop(former)
            return function(*args, **kwargs)

        return call

    return decorate
