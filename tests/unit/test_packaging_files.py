"""packaging/: the unit, the supervisor section and the drop-in say what they are meant to."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path

import pytest

from flannel_dp.cluster.subnet_env import DEFAULT_PATH
from flannel_dp.command.failing import NOT_PERMITTED, USAGE
from flannel_dp.kernel.lock import DEFAULT_DIRECTORY

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"


def parsed(name: str, *, prefix: str = "#") -> configparser.ConfigParser:
    """An INI file; a key that is there twice is an error, and keys keep their case."""
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes=(prefix,))
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string((PACKAGING / name).read_text())
    return parser


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    return parsed("flannel-dp.service")


@pytest.fixture(scope="module")
def service(unit: configparser.ConfigParser) -> configparser.SectionProxy:
    return unit["Service"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("EnvironmentFile", "-/etc/default/flannel-dp"),
        ("ExecStart", "flannel-dp sync --watch $FLANNEL_DP_OPTS"),
        ("ExecReload", "kill -HUP $MAINPID"),
        ("KillSignal", "SIGTERM"),
        ("Restart", "on-failure"),
        ("CapabilityBoundingSet", "CAP_NET_ADMIN CAP_NET_RAW"),
        ("AmbientCapabilities", "CAP_NET_ADMIN CAP_NET_RAW"),
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateTmp", "yes"),
        ("PrivateDevices", "yes"),
        ("ProtectKernelModules", "yes"),
        ("ProtectKernelLogs", "yes"),
        ("ProtectControlGroups", "yes"),
        ("ProtectClock", "yes"),
        ("ProtectHostname", "yes"),
        ("LockPersonality", "yes"),
        ("MemoryDenyWriteExecute", "yes"),
        ("RestrictRealtime", "yes"),
        ("RestrictNamespaces", "yes"),
        ("RestrictSUIDSGID", "yes"),
        ("RuntimeDirectoryPreserve", "yes"),
        ("SystemCallArchitectures", "native"),
        ("SystemCallFilter", "@system-service"),
        ("LimitCORE", "0"),
    ],
)
def test_unit_is_hardened(service: configparser.SectionProxy, key: str, value: str) -> None:
    assert service[key] == value


def test_unit_gives_up_only_where_trying_again_cannot_help(
    unit: configparser.ConfigParser, service: configparser.SectionProxy
) -> None:
    final = {int(code) for code in service["RestartPreventExitStatus"].split()}

    assert final == {USAGE, NOT_PERMITTED}
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    # A source that is down at the start only delays being ready.
    assert service["TimeoutStartSec"] == "infinity"


def test_unit_may_write_where_files_are_written_and_they_outlive_it(
    service: configparser.SectionProxy,
) -> None:
    wanted = {str(Path(DEFAULT_PATH).parent), DEFAULT_DIRECTORY}

    assert {f"/run/{name}" for name in service["RuntimeDirectory"].split()} == wanted
    assert wanted < set(service["ReadWritePaths"].split())


def test_unit_does_not_stop_the_writing_of_net_sysctls(
    service: configparser.SectionProxy,
) -> None:
    closed = [path.lstrip("-") for path in service["ReadOnlyPaths"].split()]

    assert service["ProtectKernelTunables"] == "no"
    assert "ProcSubset" not in service  # "pid" would hide /proc/sys
    assert not [path for path in closed if "/proc/sys/net".startswith(path)]
    assert {"/sys", "/proc/sys/kernel", "/proc/sysrq-trigger"} <= set(closed)


def test_unit_allows_the_sockets_that_are_used(service: configparser.SectionProxy) -> None:
    families = set(service["RestrictAddressFamilies"].split())

    assert families == {"AF_NETLINK", "AF_INET", "AF_INET6", "AF_UNIX"}


def test_watchdog_needs_no_wakeups_of_its_own(service: configparser.SectionProxy) -> None:
    """Fed at half its time at the latest, which the audit every 60 s (and a tenth) is under."""
    assert int(service["WatchdogSec"]) / 2 > 60 * 1.1


def test_unit_does_not_run_beside_flanneld(unit: configparser.ConfigParser) -> None:
    assert "flanneld.service" in unit["Unit"]["Conflicts"].split()
    assert "flanneld.service" in unit["Unit"]["After"].split()
    assert "network-online.target" in unit["Unit"]["Wants"].split()
    assert unit["Install"]["WantedBy"] == "multi-user.target"


def test_supervisor_section() -> None:
    section = parsed("supervisor.conf", prefix=";")["program:flannel-dp"]

    assert shlex.split(section["command"])[:3] == ["flannel-dp", "sync", "--watch"]
    assert "%" not in section["command"]  # supervisor would expand it
    assert (
        dict(section).items()
        >= {
            "autostart": "true",
            "autorestart": "true",
            "startsecs": "30",
            "startretries": "1000000",  # a node without an agent waits for a person
            "exitcodes": "0,2",
            "stopsignal": "QUIT",
            "stopwaitsecs": "10",
            "user": "root",
            "redirect_stderr": "true",
            "stdout_logfile_maxbytes": "64MB",
            "stdout_logfile_backups": "4",
        }.items()
    )
    assert section["stdout_logfile"].startswith("/")
    assert section["directory"].startswith("/")


def test_networkd_leaves_our_routes_alone() -> None:
    section = parsed("networkd-flannel-dp.conf")["Network"]

    assert dict(section) == {"ManageForeignRoutes": "no", "ManageForeignNextHops": "no"}


def test_readme_tells_of_every_file() -> None:
    readme = (PACKAGING / "README.md").read_text()

    for file in PACKAGING.iterdir():
        assert file.name == "README.md" or f"`{file.name}`" in readme, file.name
