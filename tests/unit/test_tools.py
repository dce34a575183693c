"""Which programs are there, and which kind of iptables each is."""

from __future__ import annotations

from pathlib import Path

import pytest

from flannel_dp.resources.firewall import programs


@pytest.fixture(name="folder")
def folder_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that programs are in."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(programs, "_SYSTEM_PATH", str(tmp_path))
    return tmp_path


def put(at: Path, text: str = "exit 1") -> Path:
    at.write_text(f"#!/bin/sh\n{text}\n")
    at.chmod(0o755)
    return at


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_the_kind_is_that_of_the_program_behind_the_link(folder: Path, kind: str) -> None:
    """As Debian's alternatives are; the program itself is not run, which would fail."""
    real = put(folder / f"xtables-{kind}-multi")
    middle = folder / "alternative"
    middle.symlink_to(real)
    for name in ("iptables", "iptables-save"):
        (folder / name).symlink_to(middle)

    assert programs.variants() == [programs.Variant("", kind)]


@pytest.mark.parametrize(
    ("said", "kind"),
    [("iptables v1.8.9 (nf_tables)", "nft"), ("iptables v1.8.9 (legacy)", "legacy"),
     ("iptables v1.4.21", "legacy")],
)  # fmt: skip
def test_otherwise_it_is_what_the_program_says(folder: Path, said: str, kind: str) -> None:
    put(folder / "iptables", f"echo '{said}'")
    put(folder / "iptables-save")

    assert programs.variants() == [programs.Variant("", kind)]


def test_a_program_is_a_file_that_may_be_run(folder: Path) -> None:
    (folder / "nft").mkdir()
    assert programs.find("nft") is None
    (folder / "nft").rmdir()
    (folder / "nft").write_text("")
    (folder / "nft").chmod(0o644)
    assert programs.find("nft") is None
    (folder / "nft").chmod(0o755)

    assert programs.find("nft") == str(folder / "nft")
