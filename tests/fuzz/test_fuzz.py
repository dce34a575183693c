"""The C sources alone, under AddressSanitizer and UBSan, fed with broken and hostile input.

``FLANNEL_DP_FUZZ_RUNS=10000000 pytest tests/fuzz`` runs each harness that many
times; without it the whole takes some seconds. To repeat a failure, write the
bytes it printed to a file and run ``build/fuzz_NAME 0 FILE``.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from flannel_dp._core import ADD, REMOVE, REPLACE, Table
from flannel_dp.tables.entries import Entry, Fdb, Neighbour, Nexthop, Route
from flannel_dp.tables.forms import is_of_any_form
from tests.lib import workers

HERE = Path(__file__).parent

RUNS = {
    "decode": 200_000,
    "text": 100_000,
    "admit": 20_000,
    "diff": 15_000,
    "events": 100_000,
    "probe": 50_000,
}

ENTRIES: list[Entry] = [
    Neighbour(7, "10.244.7.0", "02:00:00:00:00:07"),
    Neighbour(7, "fd00:10:244:7::", "02:00:00:00:00:07", 0x40),
    Fdb(7, "02:00:00:00:00:07", "192.0.2.7"),
    Fdb(7, "02:00:00:00:00:07", "2001:db8::7", vni=9, port=8472, via=3),
    Fdb(7, "02:00:00:00:00:07", "", nexthop=1002),
    Fdb(7, "00:00:00:00:00:00", "192.0.2.7", vni=9, src_vni=8),
    Fdb(7, "01:00:5e:00:00:01", "2001:db8::7", flags="extern_learn,router", port=4789),
    Fdb(7, "00:00:00:00:00:00", nexthop=1002, flags="sticky"),
    Fdb(7, "02:00:00:00:00:07", state=0x40, vlan=10, master=3),
    Nexthop(7, "10.244.7.0", 7),
    Nexthop(9, "fd00:10:244:7::", 7, False, 4),
    Route("10.244.7.0/24", nexthop=7),
    Route("10.244.7.0/24", gateway="10.244.7.0", device=7, onlink=True, metric=50, tos=4),
    Route("10.244.7.0/24", gateway="192.0.2.7", device=2, table=1000),
    Route("fd00:10:244:7::/64", gateway="fd00:10:244:7::", device=7, onlink=True),
    Route("fd00:10:244:7::/64", nexthop=7),
]

TEXTS = [
    "10.244.7.0", "10.244.7.0/24", "0.0.0.0/0", "255.255.255.255/32", "fd00:10:244:7::",
    "fd00:10:244:7::/64", "::/0", "::ffff:192.0.2.7/128", "2001:db8::192.0.2.7", "10.0.0.0/032",
    "02:00:00:00:00:07", "0A-bC-De-F0-12-34", "10.244.7.0/", "/24",
]  # fmt: skip

NLMSG_ERROR, NLMSG_DONE, NLM_F_MULTI, NLM_F_DUMP_INTR = 2, 3, 0x2, 0x10
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200


def _encoded(entry: Entry, op: int) -> bytes:
    kind = type(entry).__name__.lower()
    table = Table("fdb_any" if isinstance(entry, Fdb) and is_of_any_form(entry) else kind)
    table.add(entry)
    return table.encode(0, op)


def _message(kind: int, flags: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0) + body


def _pages() -> Iterator[bytes]:
    for entry in ENTRIES:
        yield _encoded(entry, ADD)
        yield _encoded(entry, REPLACE) * 2
        yield _encoded(entry, ADD) + _encoded(entry, REMOVE)
    echoed = _message(24, 1, bytes(28))
    words = struct.pack("=HH", 4 + 22, 1) + b"Nexthop does not exist" + bytes(2)
    where = struct.pack("=HHI", 8, 2, 16)
    yield _message(NLMSG_ERROR, NLM_F_ACK_TLVS, struct.pack("=i", -22) + echoed + words + where)
    yield _message(
        NLMSG_ERROR, NLM_F_ACK_TLVS | NLM_F_CAPPED, struct.pack("=i", -22) + echoed[:16] + words
    )
    yield _encoded(ENTRIES[0], ADD) + _message(NLMSG_DONE, NLM_F_MULTI | NLM_F_DUMP_INTR, bytes(4))
    yield _message(NLMSG_DONE, NLM_F_MULTI, struct.pack("=i", -95))
    group = struct.pack("=BBBxI", 0, 0, 138, 0) + struct.pack("=HHI", 8, 1, 9)
    yield _message(104, 0, group + struct.pack("=HHIBBH", 12, 2, 7, 0, 0, 0))
    master = struct.pack("=HHIHHI", 8, 9, 3, 8, 15, 2) + struct.pack("=HHHHBxxx", 12, 14, 5, 1, 3)
    bridged = struct.pack("=BxxxIHBB", 7, 7, 0x40, 0x20, 0)
    bridged += struct.pack("=HH6sxxHHHxx", 10, 2, bytes((2, 0, 0, 0, 0, 7)), 6, 5, 10)
    yield _message(28, NLM_F_MULTI, bridged + master)
    several = struct.pack("=HH", 4 + 8 + 8, 9) + struct.pack("=HBBiHBBi", 8, 0, 0, 7, 8, 0, 0, 9)
    for family in (2, 10):
        route = struct.pack("=BBBBBBBBI", family, 0, 0, 0, 254, 3, 0, 1, 0)
        yield _message(24, NLM_F_MULTI, route + several)
        yield _message(24, NLM_F_MULTI, route + struct.pack("=HHI", 8, 30, 902))


def _probes() -> Iterator[bytes]:
    """Answers: a frame, an IP packet with a TTL of 1, UDP, and a payload; or an ICMP echo reply."""
    payload = struct.pack("=IHHQQ", 1, 1, 0, 1000, 7)
    ip4 = b"\x45" + bytes(7) + b"\x01\x11" + bytes(10)
    ip6 = b"\x60" + bytes(6) + b"\x01" + bytes(32)
    for sign in (0, 4):
        yield bytes([sign]) + bytes(14) + ip4 + bytes(8) + payload
        yield bytes([sign | 2]) + bytes(14) + ip6 + bytes(8) + payload
        yield bytes([sign | 1]) + ip4 + bytes(8) + payload
        yield bytes([sign | 3]) + b"\x81" + bytes(7) + payload


def _seeds(name: str) -> list[bytes]:
    if name == "probe":
        return [*_probes()]
    if name == "text":
        return [text.encode() for text in TEXTS]
    if name in ("decode", "events"):
        return [bytes([choice]) + page for page in _pages() for choice in (0, 1, 2, 0x7F)]
    return []  # every input means something: the driver makes up its own


@pytest.fixture(scope="module")
def built(run_folder: Path) -> Path:
    """The harnesses, which are built once in a run."""
    compiler = os.environ.get("CC", "gcc")
    assert shutil.which(compiler), f"{compiler} is needed to build the harnesses"

    def build(directory: Path) -> None:
        command = ["sh", str(HERE / "build.sh"), str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    return workers.once(run_folder / "fuzz", build)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", sorted(RUNS))
def test_harness(name: str, built: Path) -> None:
    paths = []
    for number, seed in enumerate(_seeds(name)):
        path = built / f"{name}-{number}"
        path.write_bytes(seed)
        paths.append(str(path))
    runs = os.environ.get("FLANNEL_DP_FUZZ_RUNS", str(RUNS[name]))

    done = subprocess.run(
        [str(built / f"fuzz_{name}"), runs, *paths], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{runs} runs from ")


def test_a_failure_names_its_input(built: Path, tmp_path: Path) -> None:
    """The driver hands the input on that made a harness stop, byte by byte."""
    harness = tmp_path / "fuzz_bad.c"
    harness.write_text(
        '#include "fuzz.h"\n'
        "int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)\n"
        "{\n    CHECK(size < 3 || data[2] != 'c');\n    return 0;\n}\n"
    )
    seed = tmp_path / "seed"
    seed.write_bytes(b"abcd")
    program = str(tmp_path / "fuzz_bad")
    subprocess.run(
        [os.environ.get("CC", "gcc"), "-std=c11", "-D_GNU_SOURCE", f"-I{HERE}", str(harness),
         str(HERE / "driver.c"), "-o", program],
        check=True,
    )  # fmt: skip

    done = subprocess.run([program, "0", str(seed)], capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert b"abc".hex() in done.stderr
