"""The manual pages and the completion of shells that are shipped, as man and bash use them."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from flannel_dp.command.cli import command
from tests.lib.scripts import load_script
from tests.lib.waiting import LIMIT

ROOT = Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"


def test_the_files_are_up_to_date() -> None:
    made = load_script("manual").files()
    kept = {
        str(path.relative_to(PACKAGING)): path.read_text()
        for folder in ("man", "completion")
        for path in (PACKAGING / folder).rglob("*")
        if path.is_file()
    }

    assert sorted(made) == sorted(kept)
    for name, text in made.items():
        assert kept[name] == text, f"{name}: run make man completion"


def test_pages_are_shown_without_warnings_and_have_every_flag() -> None:
    wide = ["groff", "-man", "-ww", "-Tascii", "-P-c", "-rLL=2000n"]

    done = subprocess.run(
        [*wide, *sorted((PACKAGING / "man").glob("*.1"))], capture_output=True, text=True
    )

    assert (done.returncode, done.stderr) == (0, "")
    text = re.sub(".\b", "", done.stdout)  # bold and underlined letters are struck twice
    for name, one in command.commands.items():
        parts = re.split(rf"^NAME\n +flannel-dp-{name} - ", text, maxsplit=1, flags=re.MULTILINE)
        page = parts[1].partition("\nNAME\n")[0]
        shown = [each for each in one.params if not getattr(each, "hidden", False)]
        flags = [flag for each in shown for flag in each.opts if flag.startswith("-")]
        assert [flag for flag in flags if not re.search(rf"^ +.*{flag}\b", page, re.M)] == []
        variables = {getattr(each, "envvar", None) for each in shown} - {None}
        assert [variable for variable in variables if variable not in page] == []
        assert f"       flannel-dp {name}" in page.partition("EXAMPLES")[2]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"flannel-dp {version}" in text


def test_packages_install_all_of_them() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = [one for listed in setuptools["data-files"].values() for one in listed]
    installed = {path for one in patterns for path in ROOT.glob(one)}

    files = {path for path in PACKAGING.rglob("*") if path.is_file()}
    assert installed == {
        path for path in files if {"man", "completion"} & {*path.relative_to(PACKAGING).parts}
    }


@pytest.fixture
def bash(tmp_path: Path) -> Any:
    """``bash("flannel-dp pl\\t", "flannel-dp plan ")``: type into an interactive bash, and wait."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "TERM": "dumb",
        "PS1": "$ ",
        "INPUTRC": "/dev/null",
    }
    ours, theirs = pty.openpty()
    shell = subprocess.Popen(
        ["/bin/bash", "--norc", "--noprofile", "-i"],
        env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)

    def say(words: str, until: str) -> None:
        """Type words, and wait until what the terminal shows since then has ``until`` in it."""
        os.write(ours, words.encode())
        said = ""
        while not re.search(until, said):
            assert select.select([ours], [], [], LIMIT)[0], said
            said += os.read(ours, 4096).decode()

    file = PACKAGING / "completion/bash/flannel-dp"
    say(f"source {file}; bind 'set bell-style none'; echo rea''dy\n", "ready\r\n")
    yield say
    shell.kill()
    shell.wait(LIMIT)
    os.close(ours)


def test_bash_completes_a_command_a_flag_and_a_choice(bash: Any) -> None:
    for words, rest in (("pl", "an "), ("plan --exit", "-code "), ("plan --output j", "son ")):
        bash(f"flannel-dp {words}\t", re.escape(f"flannel-dp {words}{rest}"))
        bash("\x15", "\r|\b")  # Ctrl-U: the line is empty again


def test_zsh_and_fish_are_given_what_their_files_use() -> None:
    for shell, words in (("zsh", "_flannel_dp_completion() {"), ("fish", "complete --no-files")):
        done = subprocess.run(
            [sys.executable, "-m", "flannel_dp"],
            env={**os.environ, "_FLANNEL_DP_COMPLETE": f"{shell}_source"},
            capture_output=True,
            text=True,
        )
        assert words in done.stdout
        assert "flannel-dp" in done.stdout
