"""Capabilities: what is left does the work, what is gone is gone, also for programs we start.

Each case is a process of its own: there is no way back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.errors import ConfigError
from flannel_dp.kernel import capabilities
from flannel_dp.kernel.capabilities import KNOWN, drop_capabilities

#: What every script may use. ``say`` prints a result; ``sets`` reads the five sets of a process.
PRELUDE = """
import ctypes, json, os, subprocess, sys
from flannel_dp.kernel import capabilities
from flannel_dp.kernel.capabilities import drop_capabilities, effective, set_undumpable

KEYS = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")

def say(**results):
    print(json.dumps(results))

def sets(text=None):
    text = text or open("/proc/self/status").read()
    fields = dict(line.split(":\\t", 1) for line in text.splitlines() if ":\\t" in line)
    return {key: int(fields[key], 16) for key in KEYS}

def of_child(*command):
    command = command or ("cat", "/proc/self/status")
    return sets(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

def attempt(*command):
    return subprocess.run(command, capture_output=True).returncode == 0

libc = ctypes.CDLL(None, use_errno=True)

def prctl(*arguments):
    assert libc.prctl(*map(ctypes.c_ulong, (*arguments, 0, 0, 0, 0)[:5])) == 0
"""

ADMIN, RAW, SETPCAP = (1 << KNOWN[f"CAP_{name}"] for name in ("NET_ADMIN", "NET_RAW", "SETPCAP"))


def result(script: str, *args: str, netns: str | None = None) -> dict[str, Any]:
    """What a script, run in a process of its own (in ``netns``), says."""
    inside = ["ip", "netns", "exec", netns] if netns else []
    done = subprocess.run(
        [*inside, sys.executable, "-c", PRELUDE + script, *args],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_is_left_does_the_work_and_nothing_else(netns: str, tmp_path: Path) -> None:
    secret = tmp_path / "of-somebody-else"
    secret.write_text("secret")
    os.chown(secret, 12345, 12345)
    secret.chmod(0o600)
    mine = tmp_path / "mine"
    mine.write_text("x")
    script = """
secret, mine, mountpoint = sys.argv[1:]
tries = {
    "link": ["ip", "link", "add", "flannel.1", "type", "vxlan", "id", "1", "dev", "lo",
             "dstport", "8472"],
    "route": ["ip", "route", "add", "10.244.7.0/24", "dev", "lo"],
    "sysctl": ["sh", "-c", "echo 0 > /proc/sys/net/ipv4/conf/lo/send_redirects"],
    "own file": ["cat", mine],
    "foreign file": ["cat", secret],
    "chown": ["chown", "12345", mine],
    "mount": ["mount", "-t", "tmpfs", "none", mountpoint],
    "new namespace": ["unshare", "--net", "true"],
    "another user": ["setpriv", "--reuid", "12345", "true"],
}
before = {name: attempt(*command) for name, command in tries.items() if name not in (
    "link", "route", "chown")}
subprocess.run(["umount", mountpoint])
left = drop_capabilities(frozenset({"CAP_NET_ADMIN"}))
after = {name: attempt(*command) for name, command in tries.items()}
try:
    open(secret).close()
    after["foreign file, by itself"] = True
except PermissionError:
    after["foreign file, by itself"] = False
say(before=before, after=after, left=sorted(left), effective=sorted(effective()))
"""

    found = result(script, str(secret), str(mine), str(tmp_path), netns=netns)

    assert all(found["before"].values()), found["before"]
    assert found["left"] == found["effective"] == ["CAP_NET_ADMIN"]
    assert {name for name, worked in found["after"].items() if worked} == {
        "link",
        "route",
        "sysctl",
        "own file",
    }


@pytest.mark.parametrize("no_new_privs", [True, False])
def test_programs_run_as_root_get_no_more(no_new_privs: bool) -> None:
    script = """
drop_capabilities({"CAP_NET_ADMIN"}, no_new_privs=sys.argv[1] == "True")
say(ours=sets(), child=of_child())
"""

    found = result(script, str(no_new_privs))

    assert found["ours"] == {
        "CapInh": 0,
        "CapPrm": ADMIN,
        "CapEff": ADMIN,
        "CapBnd": ADMIN,
        "CapAmb": 0,
        "NoNewPrivs": int(no_new_privs),
    }
    assert found["child"] == found["ours"]


def test_programs_get_no_more_where_the_bounding_set_cannot_be_cut() -> None:
    """In a container with NET_ADMIN, NET_RAW and no SETPCAP, only no_new_privs is left."""
    script = """
kept = (1 << 12) | (1 << 13)
capabilities._set(kept, kept, 0)
before = of_child()
drop_capabilities({"CAP_NET_ADMIN"})
say(before=before, ours=sets(), child=of_child())
"""

    found = result(script)

    assert found["before"]["CapPrm"] & SETPCAP, "the case does not show what it should"
    assert found["ours"]["CapBnd"] & RAW
    assert found["ours"]["CapPrm"] == found["child"]["CapPrm"] == ADMIN
    assert found["child"]["CapEff"] == ADMIN


def test_several_are_kept_and_those_that_are_missing_are_not_missed() -> None:
    script = """
capabilities._set(1 << 12, 1 << 12, 0)
left = drop_capabilities({"CAP_NET_ADMIN", "CAP_BPF"})
say(left=sorted(left), none=sorted(drop_capabilities(())))
"""

    assert result(script) == {"left": ["CAP_NET_ADMIN"], "none": []}


def test_dropping_again_is_no_error() -> None:
    script = """
first = drop_capabilities({"CAP_NET_ADMIN", "CAP_NET_RAW"})
again = drop_capabilities({"CAP_NET_ADMIN", "CAP_NET_RAW"})
say(same=first == again == effective(), number=len(first))
"""

    assert result(script) == {"same": True, "number": 2}


def test_without_any_privilege_there_is_nothing_to_drop_and_no_error() -> None:
    script = """
os.setresuid(12345, 12345, 12345)
say(left=sorted(drop_capabilities({"CAP_NET_ADMIN"})), ours=sets())
"""

    found = result(script)

    assert found["left"] == []
    assert found["ours"]["CapPrm"] == found["ours"]["CapAmb"] == 0


def test_who_is_not_root_keeps_for_its_programs_what_it_keeps_for_itself() -> None:
    """systemd's User= with AmbientCapabilities=: nft is run by the agent and needs NET_ADMIN."""
    script = """
both = (1 << 12) | (1 << 13)
capabilities._set(both | (1 << 7), both | (1 << 7), both)
prctl(8, 1)  # PR_SET_KEEPCAPS
os.setresuid(12345, 12345, 12345)
capabilities._set(both, both, both)
for number in (12, 13):
    prctl(47, 2, number)  # PR_CAP_AMBIENT, RAISE
before = of_child()
drop_capabilities({"CAP_NET_ADMIN"})
say(before=before, ours=sets(), child=of_child())
"""

    found = result(script)

    assert found["before"]["CapEff"] == ADMIN | RAW
    for sets in (found["ours"], found["child"]):
        assert {sets[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Amb")} == {ADMIN}


def test_capabilities_that_this_kernel_does_not_have() -> None:
    """KNOWN is longer than an old kernel's list, and shorter than a future one's."""
    script = """
last = int(open("/proc/sys/kernel/cap_last_cap").read())
known = dict(capabilities.KNOWN)
capabilities.KNOWN = known | {"CAP_FUTURE": 63}
kept = drop_capabilities({"CAP_NET_ADMIN", "CAP_FUTURE"})
capabilities.KNOWN = {"CAP_SETPCAP": 8, "CAP_NET_ADMIN": 12}
short = drop_capabilities({"CAP_NET_ADMIN"})
say(kept=sorted(kept), short=sorted(short), ours=sets(), last=last)
"""

    found = result(script)

    assert found["kept"] == found["short"] == ["CAP_NET_ADMIN"]
    assert found["ours"]["CapBnd"] == ADMIN
    assert found["last"] < 63


def test_names_and_numbers_are_the_kernels() -> None:
    script = """
last = int(open("/proc/sys/kernel/cap_last_cap").read())
mask = sets()["CapEff"]
say(names=sorted(effective()), mask=mask, last=last)
"""

    found = result(script)

    by_number = {number: name for name, number in KNOWN.items()}
    expected = [n for n in range(64) if found["mask"] >> n & 1]
    assert found["names"] == sorted(by_number.get(n, f"cap_{n}") for n in expected)
    assert sorted(KNOWN.values()) == list(range(len(KNOWN)))
    assert (KNOWN["CAP_NET_ADMIN"], KNOWN["CAP_SYS_ADMIN"], KNOWN["CAP_BPF"]) == (12, 21, 39)


WAITING = {
    "on a lock": "lambda: event.wait()",
    "in poll": "lambda: select.poll().poll()",
    "in read": "lambda: os.read(pipe[0], 1)",
    "in accept": "lambda: listener.accept()",
    "nowhere": "spin",
    "for a program": "wait_for_program",
}


@pytest.mark.parametrize("doing", WAITING.values(), ids=WAITING.keys())
def test_other_threads_drop_theirs_whatever_they_wait_for(doing: str) -> None:
    """And what they do goes on."""
    script = f"""
import select, socket, threading, time
event, pipe, listener = threading.Event(), os.pipe(), socket.create_server(("127.0.0.1", 0))

programs = []

def spin():
    while True:
        pass

def wait_for_program():
    programs.append(subprocess.Popen(["sleep", "3600"]))
    programs[-1].wait()

begun, failed = threading.Event(), []

def work():
    begun.set()
    try:
        ({doing})()
    except BaseException as error:
        failed.append(repr(error))

threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
begun.wait()
left = drop_capabilities({{"CAP_NET_ADMIN"}})
numbers = os.listdir("/proc/self/task")
tasks = [sets(open(f"/proc/self/task/{{number}}/status").read()) for number in numbers]
say(left=sorted(left), tasks=tasks, alive=[thread.is_alive() for thread in threads], failed=failed)
sys.stdout.flush()
for program in programs:
    os.kill(program.pid, 9)
os._exit(0)
"""

    found = result(script)

    assert found["left"] == ["CAP_NET_ADMIN"]
    assert len(found["tasks"]) == 4
    for sets in found["tasks"]:
        assert {sets[f"Cap{name}"] for name in ("Prm", "Eff", "Bnd")} == {ADMIN}
        assert (sets["CapInh"], sets["NoNewPrivs"]) == (0, 1)
    assert (found["alive"], found["failed"]) == ([True] * 3, [])


def test_threads_that_come_and_go_meanwhile_drop_theirs() -> None:
    script = """
import threading
alive, stop = [], threading.Event()

def chain(depth):
    if depth and not stop.is_set():
        thread = threading.Thread(target=chain, args=(depth - 1,))
        thread.start()
    stop.wait(0.0005)

def generations():
    for _ in range(300):
        if stop.is_set():
            return
        thread = threading.Thread(target=chain, args=(2,))
        thread.start()
        thread.join()

thread = threading.Thread(target=generations)
thread.start()
drop_capabilities({"CAP_NET_ADMIN"})
held = []
def look():
    held.append(sets(open("/proc/thread-self/status").read())["CapPrm"])
threads = [threading.Thread(target=look) for _ in range(10)]
for one in threads:
    one.start()
for one in threads:
    one.join()
of_all = [sets(open(f"/proc/self/task/{thread.native_id}/status").read())["CapPrm"]]
stop.set()
thread.join()
say(held=held + of_all)
"""

    assert set(result(script)["held"]) == {ADMIN}


def test_a_thread_that_blocks_signals_keeps_its_so_it_is_refused() -> None:
    script = """
import signal, threading
capabilities._WAIT_MS = 20
begun, stop = threading.Event(), threading.Event()

def deaf():
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, signal.NSIG))
    begun.set()
    stop.wait()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, range(1, signal.NSIG))  # and nothing happens

thread = threading.Thread(target=deaf)
thread.start()
begun.wait()
before = effective()
try:
    drop_capabilities({"CAP_NET_ADMIN"})
    said = ""
except RuntimeError as error:
    said = str(error)
after = effective()
stop.set()
thread.join()
say(said=said, same=before == after)
"""

    found = result(script)

    assert "blocks signals" in found["said"]
    assert found["same"]


def test_a_thread_alone_drops_what_the_others_keep() -> None:
    script = """
import threading
found = {}

def inner():
    found["inner"] = sets(open("/proc/thread-self/status").read())

def outer():
    drop_capabilities({"CAP_NET_ADMIN"}, thread=True)
    found["outer"] = sets(open("/proc/thread-self/status").read())
    thread = threading.Thread(target=inner)
    thread.start()
    thread.join()

thread = threading.Thread(target=outer)
thread.start()
thread.join()
say(main=sets()["CapPrm"], **found)
"""

    found = result(script)

    assert found["main"] & SETPCAP
    for sets in (found["outer"], found["inner"]):
        assert {sets[f"Cap{name}"] for name in ("Prm", "Eff", "Bnd")} == {ADMIN}
        assert (sets["CapInh"], sets["NoNewPrivs"]) == (0, 1)


@pytest.mark.parametrize("name", ["CAP_NET_ADMINISTRATOR", "cap_net_admin", ""])
def test_unknown_name_is_a_config_error_and_drops_nothing(name: str) -> None:
    before = capabilities.effective()

    with pytest.raises(ConfigError, match=repr(name)) as caught:
        drop_capabilities({"CAP_NET_ADMIN", name})

    assert "CAP_NET_ADMIN" in caught.value.hint
    assert capabilities.effective() == before


def test_undumpable_leaves_no_core_and_lets_nobody_look() -> None:
    script = """
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
owner = os.stat("/proc/self/environ").st_uid
os.setresuid(12345, 12345, 12345)
prctl(4, 1)  # dumpable: /proc/self is its own
before = os.stat("/proc/self/environ").st_uid
set_undumpable()
after = os.stat("/proc/self/environ").st_uid
say(before=before, after=after, dumpable=libc.prctl(3, 0, 0, 0, 0))
"""

    assert result(script) == {"before": 12345, "after": 0, "dumpable": 0}


def test_undumpable_and_without_rights_it_still_sees_its_own_namespace(netns: str) -> None:
    script = """
set_undumpable()
drop_capabilities({"CAP_NET_ADMIN"})
say(inode=os.stat("/proc/thread-self/ns/net").st_ino, threads=len(os.listdir("/proc/self/task")))
"""

    found = result(script, netns=netns)

    assert found == {"inode": os.stat(f"/run/netns/{netns}").st_ino, "threads": 1}
