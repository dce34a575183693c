"""Fixtures of all tests: networks of hosts (tests/lib/hosts.py), and a run that leaves nothing
behind (tests/lib/isolation.py)."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from flannel_dp.bpf import helper
from flannel_dp.kernel.netns import call_in_netns
from tests.lib import bcc_cache, isolation, namespaces, programs, workers
from tests.lib.hosts import Host, Lab
from tests.lib.namespaces import Namespace
from tests.lib.waiting import wait_until

# A test's verdict is the same on every machine and in every run: no deadlines, no complaint
# that examples take long, and the same examples each time. "make test-random" explores.
settings.register_profile(
    "same", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile(
    "random", settings.get_profile("same"), derandomize=False, database=None, print_blob=True
)
settings.load_profile("same")

#: Examples of a property in a run that tries the same ones each time. What they find they find in
#: the first run; "make test-random" tries as many new ones as a test asks for.
EXAMPLES = 30

#: Tests of eight seconds and more, most of which they wait: with --workers they come first.
SLOW = (
    "test_no_memory_ends_it_in_one_line",
    "test_wheel_is_for_the_stable_abi",
    "test_the_side_at_fault_is_named",
    "test_hundreds_of_syncs",
    "test_fr13_a_newcomer_leaves",
    "test_harness",
    "test_random_hostile_edits",
    "test_unreadable_answers_end_nothing",
    "test_two_nodes_race_for_a_subnet",
    "test_a_change_killed_at_any_step",
    "test_a_node_without_its_pod_cidrs",
    "test_failover",
    "test_it_starts_by_the_endpoint",
    "test_one_of_two_equal_paths_is_dead",
    "test_hundreds_of_passes",
)


_ISOLATED = isolation.isolate()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-each", action="store_true", help="of each file that is no unit test, the first test"
    )
    parser.addoption(
        "--write-screens", action="store_true", help="write docs/screens anew (make screens)"
    )
    parser.addoption(
        "--workers", type=int, default=0, metavar="N", help="run the tests in N processes"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Few examples of a property, but for another profile than "same". With --one-each: unit tests,
    and the first test of every other file, for either family."""
    one_each = config.getoption("--one-each")
    if config.getoption("--hypothesis-profile") in (None, "same"):
        _limit_examples(items, 15 if one_each else EXAMPLES)
    if not one_each:
        return
    unit = Path(__file__).parent / "unit"
    functions: dict[Path, str] = {}
    seen: set[tuple[Path, str]] = set()
    kept, left_out = [], []
    for item in items:
        name, _, form = item.name.partition("[")
        family = next((word for word in ("ipv4", "ipv6") if word in form), "")
        first = functions.setdefault(item.path, name) == name and (item.path, family) not in seen
        seen.add((item.path, family))
        (kept if first or unit in item.path.parents else left_out).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def _limit_examples(items: list[pytest.Item], most: int) -> None:
    for item in items:
        test = getattr(item, "obj", None)
        if given := getattr(test, "_hypothesis_internal_use_settings", None):
            few = settings(given, max_examples=min(given.max_examples, most))
            test._hypothesis_internal_use_settings = few


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With --workers the tests are run by processes that are forked (tests/lib/workers.py)."""
    count = session.config.getoption("--workers")
    if not count or session.testsfailed or session.config.getoption("--collect-only"):
        return None
    workers.run(session, count, SLOW)
    return True


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """A run that left something behind has failed."""
    yield
    if not _ISOLATED:
        return
    with suppress(AssertionError):  # workers and servers may be ending yet
        wait_until(lambda: not isolation.remains(), 10.0)
    if left := isolation.remains():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line("the tests have left behind:", red=True)
        for one in left:
            reporter.write_line(f"  {one}", red=True)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    folder = tmp_path_factory.getbasetemp()
    return folder if workers.number() is None else folder.parent


@pytest.fixture(scope="session", autouse=True)
def _programs_are_compiled_once(run_folder: Path) -> Iterator[None]:
    """eBPF programs are compiled by bcc when first met in a run, here and in processes that were
    forked (tests/lib/programs.py)."""
    remembered = run_folder / "bcc"
    remembered.mkdir(exist_ok=True)
    python = remembered / f"python-{os.getpid()}"
    target = str(helper.PACKAGE / "_compile.py")
    program = Path(__file__).with_name("lib") / "bcc_cache.py"
    python.write_text(f'#!/bin/sh\nexec /usr/bin/python3 -I {program} {remembered} "$@"\n')
    python.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(helper, "interpreters", lambda: [str(python)])
        loads = bcc_cache.InProcess(str(remembered), str(python), helper._run, target)
        patch.setattr(helper, "_run", loads)
        patch.setattr(programs, "bcc_python", str(python))
        yield
        programs.close()


@pytest.fixture(scope="session", autouse=True)
def _signals_arrive() -> Iterator[None]:
    """Processes that tests start get the signals that tests send them.

    A shell without job control starts ``make test &`` with SIGINT and SIGQUIT ignored, and nohup
    with SIGHUP ignored; every program below inherits that.
    """
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_IGN:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test logged can hold half of a character, and is sent from one process to another."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def ports() -> Iterator[Namespace]:
    """The other ends of hosts' links, of one test after the other. They send nothing themselves."""
    made = Namespace(f"fdp-{os.getpid()}-ports")
    off = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text
    call_in_netns(made.name, off, "1")
    yield made
    made.close()
    namespaces.delete(made.name)


@pytest.fixture
def lab(ports: Namespace) -> Iterator[Lab]:
    """Makes namespaces and hosts on one network: ``lab.namespace()``, ``lab.host(mtu=1500)``."""
    with Lab(ports) as made:
        yield made


@pytest.fixture
def netns(lab: Lab) -> str:
    """The name of a fresh namespace with ``lo`` up and nothing else."""
    return lab.namespace()


@pytest.fixture
def make_host(lab: Lab) -> Callable[..., Host]:
    """``make_host(mtu=1500)`` makes one more host on the test's network."""
    return lab.host


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    """A host on the test's network."""
    return make_host()


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> int:
    """4, then 6: a test that takes this runs for both families."""
    return int(request.param)


@pytest.fixture(name="wait_until")
def _wait_until() -> Callable[..., None]:
    """``wait_until(predicate)``, for tests that cannot import it."""
    return wait_until
