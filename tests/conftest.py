"""What every test run shares: a run that must not skip anything can say so."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import settings

from tests.support import standin
from tests.support.attempt import TALLY

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_SKIPPED = 1

# A child with another uid is forked, and gRPC's handlers of fork(2) may then wait for its threads for ever. Read when
# gRPC starts; every child of ours executes something at once.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# How long an example takes is a fact about the machine, not about the code.
settings.register_profile("stockade", deadline=None)
settings.load_profile("stockade")


# Without these ./bootstrap test is over in a quarter of an hour; CI runs them too. By file, so that it is one list.
DEEP: Final = frozenset(
    {
        "test_budgets.py",
        "test_chaos.py",
        "test_egress_bytes.py",
        "test_egress_http2.py",
        "test_embedded_provider.py",
        "test_every_step.py",
        "test_exec_trees.py",
        "test_floods.py",
        "test_gateway_down.py",
        "test_image_layers.py",
        "test_images.py",
        "test_kill_hard.py",
        "test_kill_only.py",
        "test_leases.py",
        "test_litellm_bodies.py",
        "test_litellm_conformance.py",
        "test_litellm_identity.py",
        "test_mcp_egress.py",
        "test_names_over_connections.py",
        "test_openai_gateways.py",
        "test_power_cut.py",
        "test_races.py",
        "test_recovery.py",
        "test_report.py",
        "test_single_kills.py",
        "test_stress.py",
        "test_taken_back.py",
        "test_told_calls.py",
        "test_transparent.py",
        "test_uml.py",
    }
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in DEEP:
            item.add_marker("deep")


UPLINK: Final = pytest.StashKey[standin.Uplink]()


def pytest_configure(config: pytest.Config) -> None:
    if os.geteuid() == 0 and not config.option.collectonly:
        config.stash[UPLINK] = standin.enter()


@pytest.fixture(autouse=True, scope="module")
def _nothing_leaves_the_host(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a module's tests try, no frame leaves what stands for the host."""
    yield
    if UPLINK in request.config.stash:
        assert request.config.stash[UPLINK].frames() == [], "frames left the host"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail the run when a test was skipped")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if TALLY.refused or TALLY.second_kernel:
        terminalreporter.write_line(TALLY.describe())
    skipped = terminalreporter.stats.get("skipped", [])
    if config.getoption("--no-skips") and skipped:
        terminalreporter.write_line(f"--no-skips: {len(skipped)} skipped on a host that must run everything", red=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Turns a passing run with skips into a failing one (a skip hides what a claim is worth)."""
    if exitstatus != 0 or not session.config.getoption("--no-skips"):
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = EXIT_SKIPPED
