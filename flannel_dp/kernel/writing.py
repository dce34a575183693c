"""What everything that writes with pyroute2 shares: a socket, and its errors as ours.

Importing pyroute2 takes longer than a sync that changes nothing. So what writes with it
(:mod:`flannel_dp.bpf.filterwriter`) imports this module, and is itself imported inside a
function, when there is something to write.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from flannel_dp.errors import kernel_error


@contextmanager
def netlink() -> Iterator[IPRoute]:
    """Open pyroute2's socket in this thread's namespace. Raises KernelError where it fails."""
    with operation("open a netlink socket"):
        made = IPRoute(ext_ack=True)
    with made:
        yield made


@contextmanager
def operation(text: str, *, benign: Collection[int] = ()) -> Iterator[None]:
    """Turn pyroute2's errors into ours, with the kernel's own words; ``text`` says what was
    tried. The errnos of ``benign`` (an entry to be removed that is gone) are no error."""
    try:
        yield
    except NetlinkError as error:
        if error.code in benign:
            return
        message = str(error.args[1]) if len(error.args) > 1 else ""
        plain = kernel_error(error.code, text)
        raise plain if message in str(plain) else kernel_error(error.code, text, message) from error
    except OSError as error:
        raise kernel_error(error.errno or errno.EIO, text) from error
