"""Compiling, loading and pinning (bpf.loader), and the directories of pins (bpf.pins)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flannel_dp import ConfigError, Conflict, Unsupported
from flannel_dp._core import BpfMap, BpfProgram
from flannel_dp.bpf import helper, loader, pins
from flannel_dp.bpf._btf import Btf
from flannel_dp.bpf.loader import MapPin, ProgramPin
from tests.lib.bpf import ARRAY, HASH, SOURCE, load_small, use_source
from tests.lib.short import run

ZERO = bytes(4)


@pytest.fixture
def directory(netns: str) -> Path:
    return pins.pin_directory("flannel.1", netns, create=True)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_source(monkeypatch, tmp_path)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_loaded_programs_outlive_who_loaded_them(directory: Path) -> None:
    load_small(directory, drops=True)

    assert names(directory) == ["frames", "see", "see_drop"]
    program = BpfProgram.open(directory / "see")
    assert program.name == "see"
    assert program.maps == [BpfMap.open(directory / "frames").id]


def test_a_map_that_is_there_is_used_with_what_is_in_it(directory: Path) -> None:
    load_small(directory)
    before = BpfMap.open(directory / "frames")
    before.update(ZERO, b"\x07" + bytes(7))
    program = BpfProgram.open(directory / "see").id

    load_small(directory, room=2)

    after = BpfMap.open(directory / "frames")
    assert (after.id, after.lookup(ZERO)) == (before.id, b"\x07" + bytes(7))
    assert BpfProgram.open(directory / "see").id != program
    assert BpfProgram.open(directory / "see").maps == [before.id]


@pytest.mark.parametrize(
    ("kind", "key", "value"), [(HASH, 4, 8), (ARRAY, 4, 16)], ids=["type", "size"]
)
def test_somebody_elses_map_is_named_and_left_alone(
    directory: Path, kind: int, key: int, value: int
) -> None:
    theirs = BpfMap.create(kind, key, value, 1, name="theirs")
    theirs.pin(directory / "frames")

    with pytest.raises(Conflict, match=r"frames.*the map theirs there is of type"):
        load_small(directory)

    assert names(directory) == ["frames"]
    assert BpfMap.open(directory / "frames").id == theirs.id


def test_other_things_in_the_place_of_a_pin_are_named_and_left_alone(directory: Path) -> None:
    load_small(directory, drops=True)
    (directory / "folder").mkdir()
    expected = {
        "see": "a bpf-prog is pinned there",
        "see_drop": "a bpf-link is pinned there",
        "folder": "a directory is there",
    }
    for name, words in expected.items():
        with pytest.raises(Conflict, match=words) as caught:
            pins.open_map(directory / name, ARRAY, 4, 8)
        assert str(directory / name) in caught.value.hint

    with pytest.raises(Conflict, match="the program see is pinned there"):
        loader.load("small", maps={}, programs={"other": ProgramPin(directory / "see")})
    (directory / "see").unlink()
    os.rename(directory / "frames", directory / "see")
    with pytest.raises(Conflict, match="a bpf-map is pinned there"):
        load_small(directory)


def test_what_a_killed_helper_left_is_no_hindrance(directory: Path) -> None:
    load_small(directory)
    for name in ("see", "frames"):
        os.rename(directory / name, directory / f"{name}%new")

    load_small(directory)

    assert names(directory) == ["frames", "see"]


def test_a_program_that_the_kernel_refuses_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = SOURCE.replace("__sync_fetch_and_add(found, 1)", "found[1] = 1")
    use_source(monkeypatch, tmp_path, wrong)

    with pytest.raises(Unsupported, match=r"(?s)cannot be loaded.*invalid access to map value"):
        load_small(directory)

    assert names(directory) == []


def test_a_program_that_does_not_compile_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_source(monkeypatch, tmp_path, SOURCE.replace("bytes", "byte").replace("return -1", "retur"))

    with pytest.raises(Unsupported, match="undeclared identifier 'retur'"):
        load_small(directory)

    assert names(directory) == []


def test_missing_bcc_says_what_to_install(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # -S does without the directories where distributions put packages.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(helper, "interpreters", lambda: [str(python)])

    with pytest.raises(Unsupported, match="bcc, which compiles") as caught:
        load_small(directory)

    assert "python3-bpfcc" in caught.value.hint


def test_another_package_of_the_name_bcc_is_not_taken_for_it(
    directory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bcc.py").write_text("")
    python = tmp_path / "python"
    run_it = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_path(sys.argv[2])"
    python.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c '{run_it}' {tmp_path} \"$@\"\n".replace(
            "runpy.run_path(sys.argv[2])", 'runpy.run_path(sys.argv[2], run_name="__main__")'
        )
    )
    python.chmod(0o755)
    monkeypatch.setattr(helper, "interpreters", lambda: [str(python)])

    with pytest.raises(Unsupported, match="is not the BPF Compiler Collection"):
        load_small(directory)


def test_missing_headers_say_what_to_install() -> None:
    answer = {"refused": "no headers", "message": "neither this nor that"}

    error = helper._error(answer, "")

    assert isinstance(error, Unsupported)
    assert "linux-headers-" in error.hint


def test_missing_types_say_which_kernel_has_them(directory: Path) -> None:
    with pytest.raises(Unsupported, match=r"BTF: sk_buff\.nonesuch") as caught:
        loader.load("small", maps={}, programs={}, offsets={"NONESUCH": "sk_buff.nonesuch"})

    assert "CONFIG_DEBUG_INFO_BTF" in caught.value.hint


def test_missing_capabilities_are_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "effective", lambda: frozenset({"CAP_NET_ADMIN"}))

    with pytest.raises(Unsupported, match="takes CAP_BPF and CAP_PERFMON, which this"):
        load_small(directory)


def test_a_helper_that_dies_is_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helper, "interpreters", lambda: ["/bin/false"])

    with pytest.raises(Unsupported, match="/bin/false ended with 1"):
        load_small(directory)


def test_offsets_are_those_that_the_compiler_of_the_kernel_chose() -> None:
    types = Btf()

    assert types.offset("sk_buff.next") == 0
    assert types.offset("sk_buff.prev") == 8
    assert types.offset("sk_buff.dev") == 16  # inside a union inside a struct, both unnamed
    assert types.offset("net.ns.inum") > types.offset("net.ns")
    assert types.enumerators("bpf_map_type")["BPF_MAP_TYPE_PERCPU_HASH"] == 5
    with pytest.raises(LookupError):
        types.offset("no_such_struct.member")


def test_directories_are_of_a_device_in_a_namespace(netns: str, lab: object) -> None:
    here, there = pins.pin_directory("flannel.1", netns), pins.pin_directory("flannel.1")
    other = pins.pin_directory("flannel-v6.1", netns)

    assert len({here, there, other}) == 3
    assert "." not in here.name
    assert not here.exists()

    made = pins.pin_directory("flannel.1", f"/run/netns/{netns}", create=True)

    assert made == here
    assert (made.stat().st_mode & 0o777, made.parent.stat().st_mode & 0o777) == (0o700, 0o700)
    assert pins.remove(made) == []
    assert not made.exists()
    assert pins.remove(made) == []
    with pytest.raises(ConfigError):
        pins.pin_directory("flannel.1", "no-such-namespace")


def test_a_process_of_ip_netns_exec_finds_the_same_directory(directory: Path, netns: str) -> None:
    script = "from flannel_dp.bpf import pins; print(pins.pin_directory('flannel.1').stat().st_ino)"
    root = Path(loader.__file__).parents[2]

    done = subprocess.run(
        ["ip", "netns", "exec", netns, sys.executable, "-c", script],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )

    assert int(done.stdout) == directory.stat().st_ino


def test_a_bpffs_is_mounted_where_there_is_none() -> None:
    script = """
import sys
from pathlib import Path
from flannel_dp.bpf import pins
pins.OWN_MOUNT, pins.SYSTEM_MOUNT, pins._INIT_ROOT = sys.argv[1] + "/bpf", "/none", "/none"
directory = pins.pin_directory("flannel.1", create=True)
assert directory.is_dir() and pins.pin_directory("flannel.1", create=True) == directory
print(pins.filesystem(str(directory)) == pins.BPFFS_MAGIC, directory.is_relative_to(sys.argv[1]))
"""
    inner = f'mount -t tmpfs none /mnt && exec {sys.executable} -c "$1" /mnt'

    printed = run(
        "unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", inner, "-", script
    )

    assert printed.split() == ["True", "True"]


def test_a_map_pin_says_sizes(directory: Path) -> None:
    load_small(directory)

    with pytest.raises(Conflict, match="not of type 1 with 4 and 8"):
        loader.load("small", maps={"frames": MapPin(directory / "frames", HASH, 4, 8)}, programs={})
