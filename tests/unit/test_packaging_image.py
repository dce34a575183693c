"""packaging/Dockerfile: it takes what is built with, and has what the manifest calls."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
VENV = "/opt/flannel-dp"


@dataclass
class Stage:
    """One FROM and what follows: packages of apt, commands, and what is copied to where."""

    base: str
    name: str
    packages: set[str] = field(default_factory=set)
    commands: list[list[str]] = field(default_factory=list)
    copied: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)


def stages() -> list[Stage]:
    """Read the file; an instruction that is not known here is an error."""
    text = (ROOT / "packaging/Dockerfile").read_text().replace("\\\n", " ")
    made: list[Stage] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        words = shlex.split(rest)
        match word:
            case "FROM":
                made.append(Stage(words[0], words[2] if len(words) > 1 else ""))
            case "RUN":
                for command in rest.split("&&"):
                    parts = shlex.split(command)
                    made[-1].commands.append(parts)
                    if parts[:2] == ["apt-get", "install"]:
                        made[-1].packages |= {one for one in parts[2:] if not one.startswith("-")}
            case "COPY":
                *sources, target = words
                made[-1].copied |= dict.fromkeys(sources, target)
            case "ENTRYPOINT":
                made[-1].entrypoint = json.loads(rest)
            case _:
                raise AssertionError(f"{word} is not known here")
    return made


@pytest.fixture(name="build", scope="module")
def build_fixture() -> Stage:
    return stages()[0]


@pytest.fixture(name="image", scope="module")
def image_fixture() -> Stage:
    return stages()[1]


@pytest.fixture(name="pod", scope="module")
def pod_fixture() -> dict[str, Any]:
    objects = yaml.safe_load_all((ROOT / "packaging/kubernetes.yaml").read_text())
    (found,) = [one["spec"]["template"]["spec"] for one in objects if one["kind"] == "DaemonSet"]
    assert isinstance(found, dict)
    return found


def test_bases_are_names_and_no_registry(build: Stage, image: Stage) -> None:
    assert len(stages()) == 2
    for stage in (build, image):
        assert re.fullmatch(r"[a-z]+:[a-z-]+", stage.base), stage.base
    assert build.base == image.base, "the core is linked against one C library"


def test_all_that_the_package_is_built_from_is_copied(build: Stage) -> None:
    project, tools = PROJECT["project"], PROJECT["tool"]["setuptools"]
    needed = {project["readme"], *project["license-files"], "pyproject.toml", "setup.py"}
    needed |= {*tools["package-dir"].values()}
    needed |= {pattern for patterns in tools["data-files"].values() for pattern in patterns}
    needed |= {
        one.replace(".", "/") for one in tools["packages"] if one not in tools["package-dir"]
    }
    needed |= set(re.findall(r'"((?:flannel_dp|csrc)/[^"]+)"', (ROOT / "setup.py").read_text()))

    for one in needed:
        copied = [PurePosixPath(one).is_relative_to(source) for source in build.copied]
        assert any(copied), f"{one} is not copied"
    for source, target in build.copied.items():
        assert (ROOT / source).exists()
        folder = (ROOT / source).is_dir()
        assert target == (f"/src/{source}" if folder else "/src/")


def test_the_compiler_is_that_of_the_pages(build: Stage, image: Stage) -> None:
    pages = [(ROOT / name).read_text() for name in ("README.md", "docs/install.md")]
    for page in pages:
        (line,) = re.findall(r"^apt-get install (.*)$", page, re.M)
        assert {*line.split()} <= build.packages
        assert not {*line.split()} & image.packages


def test_extras_and_programs_are_those_that_the_manifest_uses(
    build: Stage, image: Stage, pod: dict[str, Any]
) -> None:
    (container,) = pod["containers"]
    extras = {"--kube-subnet-mgr": "kube", "--healthz-port": "metrics", "--etcd-endpoints": "etcd"}
    wanted = {
        extras[word.partition("=")[0]]
        for word in container["args"]
        if word.partition("=")[0] in extras
    }
    (installed,) = [words for words in build.commands if words[0].endswith("/pip")]

    assert installed[-1] == f"/src[{','.join(sorted(wanted))}]"
    assert wanted <= {*PROJECT["project"]["optional-dependencies"]}
    # Either kind of iptables, or nft: the firewall is left at "auto".
    assert {"iptables", "nftables", "python3"} == image.packages
    assert not [word for word in container["args"] if word.startswith("--firewall")]


def test_commands_of_the_manifest_are_in_the_path(image: Stage, pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    (link,) = [words for words in image.commands if words[0] == "ln"]
    scripts = {f"{VENV}/bin/{name}" for name in PROJECT["project"]["scripts"]}

    assert image.copied == {"--from=build": VENV, VENV: VENV}
    assert link[-1] == "/usr/local/bin/"
    assert {*link[2:-1]} == scripts
    assert container["command"] == image.entrypoint
    assert f"{VENV}/bin/{container['command'][0]}" in scripts
    # The init container of the same image calls what is in every Debian.
    ours = [one for one in pod["initContainers"] if one["image"] == container["image"]]
    assert [one["command"] for one in ours] == [["cp"]]


def test_nothing_else_of_the_image_is_called(build: Stage, image: Stage) -> None:
    assert [words[0] for words in image.commands] == ["apt-get", "apt-get", "rm", "ln"]
    assert [words[0] for words in build.commands] == [
        *("apt-get", "apt-get", "python3", f"{VENV}/bin/pip"),
    ]
    assert build.commands[2] == ["python3", "-m", "venv", VENV]
