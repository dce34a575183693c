"""Deprecation of public names and parameters: a warning for one minor version, then removal.

A name that is to go is marked with the version that first warned. It works, and warns, in every
release of that minor version, and is removed in the next one: deprecated in 0.2, it is there in
all of 0.2.x and gone in 0.3. tests/unit/test_deprecation.py fails once one is overdue.
"""

from __future__ import annotations

import warnings


def warn_deprecated(old: str, new: str, *, since: str, stacklevel: int = 3) -> None:
    """Warn that ``old`` goes in the next minor version after ``since``, and name what replaces it.

    ``DeprecationWarning`` of the line that called our caller; ``python -W error`` makes it an
    exception. ``since`` is a version as "0.2". Standard: PEP 565.
    """
    warnings.warn(
        f"{old} is deprecated since flannel-dp {since} and is removed in {successor(since)}; "
        f"use {new}",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def successor(version: str) -> str:
    """Return the minor version after ``version``: "0.3" for "0.2" and for "0.2.7"."""
    major, minor = version.split(".")[:2]
    return f"{major}.{int(minor) + 1}"
