"""A full screen on a real pseudo terminal: taken, drawn, and given back whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.look.full_screen import split_keys
from tests.lib.terminals import ENTER, LEAVE, Session

#: It shows its size and what was typed, and ends by "q", "x" (an exception), or a signal.
PROGRAM = """
import fcntl, os, sys, termios
os.getsid(0) == os.getpid() and fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from flannel_dp.look.full_screen import FullScreen
typed = []
with FullScreen(1, KEYS) as screen:
    while "q" not in typed and "x" not in typed:
        width, height = screen.size()
        screen.draw([(f"{width} by {height}", "red"), (" ".join(typed), ""), ("long" * 99, "")])
        typed += [key for key in screen.wait(3600.0) if key != "redraw"]
    if "x" in typed:
        raise ValueError("as asked for")
print("goodbye", flush=True)
"""

#: In a process group beside another one of its session, as below a shell: it can be stopped.
UNDER_A_SHELL = """
import fcntl, os, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
child = os.fork()
if not child:
    os.setpgid(0, 0)
    os.tcsetpgrp(0, os.getpgrp())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    exec(PROGRAM)
    os._exit(0)
assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
os.tcsetpgrp(0, os.getpgrp())
print("stopped", termios.tcgetattr(0)[3] & termios.ECHO and "with echo", flush=True)
os.read(0, 99)
os.tcsetpgrp(0, child)
os.kill(child, signal.SIGCONT)
os.waitpid(child, 0)
"""


def session(program: str = PROGRAM, keys: int = 0, **how: Any) -> Session:
    start = partial(subprocess.Popen, start_new_session=True, cwd=Path(__file__).parents[2])
    return Session(start, [sys.executable, "-c", program.replace("KEYS", str(keys))], **how)


ENDINGS = {
    "a return": ("q", None, 0),
    "an exception": ("x", None, 1),
    "Ctrl-C": ("\x03", None, -signal.SIGINT),
    "Ctrl-backslash": ("\x1c", None, -signal.SIGQUIT),
    "SIGTERM": ("", signal.SIGTERM, -signal.SIGTERM),
    "SIGHUP": ("", signal.SIGHUP, -signal.SIGHUP),
}


@pytest.mark.parametrize("how", ENDINGS)
def test_the_terminal_is_given_back(how: str) -> None:
    keys, number, code = ENDINGS[how]
    with session() as it:
        it.until(lambda: it.shown()[:1] == ["80 by 24"])
        assert not termios.tcgetattr(it.slave)[3] & (termios.ECHO | termios.ICANON)
        it.type(keys)
        if number:
            os.kill(it.process.pid, number)

        assert it.wait() == code
        assert termios.tcgetattr(it.slave) == it.before
        screen, _, after = it.raw.rpartition(LEAVE)
        assert screen.startswith(ENTER)
        assert (b"goodbye" in after, b"as asked for" in after) == (keys == "q", keys == "x")


def test_keys_are_read_and_not_echoed_and_a_new_size_is_drawn() -> None:
    with session(env={"NO_COLOR": "1"}) as it:
        it.until(lambda: it.shown()[:1] == ["80 by 24"])
        it.type("j\x1b[B\x1b[5~")
        it.until(lambda: it.shown()[1:2] == ["j down page up"])
        assert it.shown()[2:] == ["long" * 19 + "lon…"]
        it.type("\x1b")
        it.until(lambda: it.shown()[1] == "j down page up escape")
        it.resize(40, 12)
        it.until(lambda: it.shown()[:1] == ["40 by 12"])
        assert it.shown()[2:] == ["long" * 9 + "lon…"]
        it.resize(40, 2)
        it.until(lambda: it.shown() == ["40 by 2", "long" * 9 + "lon…"])
        assert (
            b"m" not in bytes(it.raw).replace(b"\x1b[?", b"").partition(b"long")[0].split(b"H")[0]
        )
        assert b"\x1b[31m" not in it.raw
        it.type("q")
        assert it.wait() == 0


def test_keys_come_from_the_terminal_where_standard_input_is_a_file() -> None:
    with session(keys=9) as it:  # no descriptor of this number: no terminal
        it.until(lambda: it.shown()[:1] == ["80 by 24"])
        it.type("jq")
        assert it.wait() == 0


def test_it_is_stopped_and_goes_on() -> None:
    with session(UNDER_A_SHELL.replace("PROGRAM", repr(PROGRAM))) as it:
        it.until(lambda: it.shown()[:1] == ["80 by 24"])
        it.type("j")
        it.until(lambda: "j" in it.shown()[1:2])
        it.type("\x1a")  # Ctrl-Z
        it.until(lambda: b"stopped with echo" in it.raw)
        assert it.raw.count(ENTER) == it.raw.count(LEAVE) == 1

        it.type("fg\n")
        it.until(lambda: it.raw.count(ENTER) == 2 and it.raw.rpartition(ENTER)[2].count(b"80 by"))
        it.type("q")
        assert it.wait() == 0
        assert it.raw.count(LEAVE) == 2


def test_keys_by_their_bytes() -> None:
    assert split_keys("a\r\x7f/é") == ["a", "enter", "backspace", "/", "é"]
    assert split_keys("\x1b[A\x1bOB\x1b[H\x1b[4~\x1b[6~") == [
        "up", "down", "home", "end", "page down",
    ]  # fmt: skip
    assert split_keys("\x1b") == ["escape"]
    assert split_keys("\x1b[1;5Cq\x00\x1b[200~") == ["q"]
