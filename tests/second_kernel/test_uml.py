"""What must hold on cgroup v2 and on another kernel, shown by running kernel tests in a User-Mode Linux guest.

The tests that run there are the host's own; what is judged here is that they ran, where, and how they ended.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from typing import TYPE_CHECKING

import pytest

from tests.second_kernel import uml
from tests.support.attempt import TALLY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [
    pytest.mark.timeout(1200),  # whichever test comes first waits for the guest
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the guest reads the host's files"),
    pytest.mark.skipif(not uml.KERNEL.exists(), reason=f"needs {uml.KERNEL} (Debian's user-mode-linux)"),
    pytest.mark.skipif(shutil.which("modprobe") is None, reason="needs modprobe (Debian's kmod)"),
]

# What the guest's kernel lacks: nftables for IPv4, hence the second layer of the network; and PSI.
WITHOUT_NFTABLES = {
    "test_binding_to_the_device_does_not_get_around_the_missing_route",
    "test_broadcast_and_multicast_datagrams_do_not_leave",
    "test_only_packets_to_the_proxy_port_are_seen_in_the_gate",
    "test_other_datagrams_do_not_arrive",
    "test_the_firewall_alone_would_hold_the_gate",
}
SKIPPED_IN_GUEST = {*WITHOUT_NFTABLES, "test_waiting_for_memory_is_told_of"}
LAUNCH = "tests/kernel/test_launch.py"
KILL = "tests/kernel/test_kill.py"
TOLD = "tests/kernel/test_told_calls.py"
SCRATCH = "tests/kernel/test_scratch.py"
CHANGES = "tests/kernel/test_changes.py"
ATTEMPTS = "tests/adversarial/test_claims.py"


def guest(directory: Path, *tests: str, seconds_max: float) -> uml.Report:
    report = uml.run(directory, *tests, seconds_max=seconds_max)
    failed = [f"{case.name}: {case.text}" for case in report.cases if case.outcome == "failed"]
    assert failed == [], "\n\n".join(failed)
    skipped = {case.name.partition("[")[0] for case in report.cases if case.outcome == "skipped"}
    assert skipped <= SKIPPED_IN_GUEST, "a skip that nobody expects hides what the run is worth"
    return report


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[uml.Report]:
    """A short life of the guest: that what bounds an agent does so there too."""
    directory = tmp_path_factory.mktemp("guest")
    yield guest(directory, "tests/kernel/test_cgroups_launch.py", seconds_max=500)
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def much(tmp_path_factory: pytest.TempPathFactory) -> Iterator[uml.Report]:
    directory = tmp_path_factory.mktemp("guest")
    yield guest(
        directory,
        "tests/kernel/test_cgroups.py",
        "tests/kernel/test_limits.py",
        f"{LAUNCH}::test_identity_and_environment_come_from_the_plan_alone",
        f"{LAUNCH}::test_one_route_and_the_proxy_only",
        f"{LAUNCH}::test_workspace_is_writable_as_the_owner_on_disk",
        f"{LAUNCH}::test_workspace_of_root_read_only_shows_as_the_agents",
        f"{KILL}::test_a_frozen_agent_stops_and_can_be_killed",
        f"{KILL}::test_killing_twice_and_what_never_was",
        f"{SCRATCH}::test_the_limit_stops_bytes_where_df_says_it_is",
        f"{SCRATCH}::test_inodes_stop_at_the_limit_and_come_back",
        f"{SCRATCH}::test_what_is_on_scratch_is_not_counted_as_memory",
        f"{SCRATCH}::test_the_end_of_an_agent_takes_image_and_device_along",
        f"{SCRATCH}::test_with_it_nothing_is_degraded",
        f"{SCRATCH}::test_a_layer_takes_what_the_agent_writes_and_the_workspace_nothing",
        f"{SCRATCH}::test_a_kept_home_is_the_next_agents_whatever_its_ids",
        f"{CHANGES}::test_a_link_that_is_swapped_in_between_diff_and_apply_leads_nowhere",
        f"{CHANGES}::test_what_is_no_file_is_shown_and_neither_opened_nor_made",
        f"{CHANGES}::test_the_worker_acts_as_the_owner_and_has_nothing_else",
        "tests/kernel/test_exec_trees.py",
        f"{TOLD}::test_who_ran_what_is_told_and_without_it_nothing",
        f"{TOLD}::test_refused_calls_are_told_with_their_number_of_times_and_answered_alike",
        f"{TOLD}::test_the_watcher_has_one_capability_and_opens_nothing_for_writing",
        "tests/kernel/test_degraded.py::test_this_very_kernel_is_judged_as_doctor_says",
        "tests/kernel/test_canaries.py::test_the_default_plan_holds",
        "tests/kernel/test_posture.py::test_examination_is_what_the_host_sees_after_exec",
        "tests/adversarial/test_unpacker.py",  # there without Landlock
        "tests/adversarial/test_images.py::test_the_same_image_unspoiled_is_taken_in_each_form",
        "tests/kernel/test_live_binds.py::test_a_kernel_that_cannot_deny_opens_is_shown_nothing",
        seconds_max=1000,
    )
    shutil.rmtree(directory)


def test_the_guest_is_another_kernel_with_controllers_on_v2(limits: uml.Report) -> None:
    assert limits.kernel != os.uname().release
    assert limits.cgroup == "cgroup2fs"
    assert {"cpu", "memory", "pids"} <= set(limits.controllers)
    assert limits.temporary == "ext2/ext3", "owners are mapped on a real file system"


@pytest.mark.parametrize("resource", ["cpu", "memory", "pids"])
def test_the_limit_holds_for_an_agent_on_v2(limits: uml.Report, resource: str) -> None:
    assert limits.outcome(f"test_{resource}_limit_holds_for_an_agent") == "passed"


@pytest.mark.parametrize(
    "name",
    [
        "test_every_limit_is_in_force_before_the_first_instruction",
        "test_swap_is_no_way_around_the_limit",
        "test_a_starter_made_ahead_has_the_limits_of_its_agent_before_exec",
        "test_out_of_memory_ends_the_agent_as_a_whole",
        "test_the_pids_limit_is_told_of_once_with_its_count",
        "test_throttling_is_told_of_and_an_idle_agent_is_not",
        "test_a_restarted_launcher_keeps_watching",
        "test_kill_leaves_nobody_and_events_tell",
        "test_kill_reaches_a_fork_storm",
        "test_freeze_stops_time_and_thaw_gives_it_back",
        "test_reconcile_takes_the_dead_and_leaves_the_living_and_the_neighbours",
        "test_a_frozen_agent_stops_and_can_be_killed",
        "test_one_route_and_the_proxy_only",
        "test_workspace_is_writable_as_the_owner_on_disk",
        "test_the_limit_stops_bytes_where_df_says_it_is",
        "test_inodes_stop_at_the_limit_and_come_back",
        "test_what_is_on_scratch_is_not_counted_as_memory",
        "test_the_end_of_an_agent_takes_image_and_device_along",
        "test_with_it_nothing_is_degraded",
        "test_a_layer_takes_what_the_agent_writes_and_the_workspace_nothing",
        "test_a_kept_home_is_the_next_agents_whatever_its_ids",
        "test_a_link_that_is_swapped_in_between_diff_and_apply_leads_nowhere",
        "test_the_worker_acts_as_the_owner_and_has_nothing_else",
        "test_an_exec_ends_with_all_its_descendants_and_nothing_else",
        "test_who_ran_what_is_told_and_without_it_nothing",
        "test_refused_calls_are_told_with_their_number_of_times_and_answered_alike",
        "test_the_watcher_has_one_capability_and_opens_nothing_for_writing",
        "test_this_very_kernel_is_judged_as_doctor_says",
        "test_the_default_plan_holds",
        "test_examination_is_what_the_host_sees_after_exec",
        "test_a_taken_over_unpacker_reaches_its_directory_and_nothing_else",
        "test_a_kernel_that_cannot_deny_opens_is_shown_nothing",  # its kernel has no permission events
    ],
)
def test_it_holds_on_v2(much: uml.Report, name: str) -> None:
    assert much.outcome(name) == "passed"


@pytest.mark.long
def test_the_attempts_to_break_out_are_refused_on_the_other_kernel(tmp_path: Path) -> None:
    """As an agent, as root inside and by exec, and found in weakened sandboxes; without Landlock, on cgroup v2."""
    report = uml.run(tmp_path, ATTEMPTS, seconds_max=450)
    failed = [f"{case.name}: {case.text}" for case in report.cases if case.outcome == "failed"]
    assert failed == [], "\n\n".join(failed)
    skipped = {case.text for case in report.cases if case.outcome == "skipped"}
    known = ("no second layer in this kernel", "int 0x80 is a native call")
    assert all(any(reason in text for reason in known) for text in skipped), skipped
    refused = [
        case for case in report.cases if case.name.startswith("test_attempt_is_refused[") and case.outcome == "passed"
    ]
    assert len(refused) > 900
    TALLY.second_kernel += len(refused)


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_networks_and_launches_work_on_the_other_kernel(tmp_path: Path) -> None:
    report = guest(
        tmp_path,
        *(
            "tests/kernel/test_network.py",
            "tests/kernel/test_transparent_network.py",
            "tests/kernel/test_doctor.py",
            "tests/kernel/test_roots.py",
            LAUNCH,
        ),
        f"--deselect={LAUNCH}::test_a_hundred_launches_leave_nothing",  # minutes, on one slow processor
        seconds_max=900,
    )
    assert report.outcome("test_without_the_second_layer_the_gate_alone_leads_nowhere") == "passed"
    assert {name: report.outcome(name) for name in WITHOUT_NFTABLES} == dict.fromkeys(WITHOUT_NFTABLES, "skipped")


def test_a_guest_that_does_not_end_is_ended_and_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(uml.GuestFailed, match="did not power off in 6 s"):
        uml.run(tmp_path, "tests/kernel/test_cgroups.py", seconds_max=6)
    deadline = time.monotonic() + 10  # those of its processes that are not our children die in their own time
    while left := subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, check=False).stdout:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_failing_test_in_the_guest_is_not_taken_for_a_passing_one(tmp_path: Path) -> None:
    """The twin of everything above: the harness can fail."""
    report = uml.run(tmp_path, "tests/kernel/test_cgroups.py::test_there_is_no_such_test", seconds_max=100)
    with pytest.raises(uml.GuestFailed, match="did not run in the guest"):
        report.outcome("test_there_is_no_such_test")
