"""What the watcher tells, as entries of the action log."""

from __future__ import annotations

from supervisord.call_actions import ARGUMENT_CHARACTERS_MAX, ARGUMENTS_MAX, called_action

EXEC = {"kind": "exec", "pid": 5, "ppid": 2, "path": "/bin/x\udcff", "argc": 2, "args": ["x"], "digest": "sha256:0"}


def named(number: int) -> str:
    return {101: "ptrace"}[number]


def test_an_exec_says_who_started_it() -> None:
    own = called_action("ag_1", "ag_1", EXEC, named)
    entered = called_action("ag_1", "st_1", EXEC, named)
    assert own is not None
    assert entered is not None
    assert (own.verb, own.object, own.verdict, own.actor) == ("process.exec", "/bin/x\udcff", "allowed", "agent:ag_1")
    assert own.details["by"] == "agent"
    assert (entered.details["by"], entered.details["stream_id"]) == ("exec", "st_1")
    unread = called_action("ag_1", "ag_1", EXEC | {"path": ""}, named)
    assert unread is not None
    assert unread.reason


def test_calls_have_names_and_numbers_of_times() -> None:
    action = called_action("ag_1", "ag_1", {"kind": "refused", "call": 101, "times": 3}, named)
    assert action is not None
    assert (action.verb, action.object, action.verdict, action.details["times"]) == (
        "process.refused",
        "ptrace",
        "denied",
        3,
    )
    many = called_action("ag_1", "ag_1", {"kind": "execs", "times": 9}, named)
    assert many is not None
    assert (many.object, many.details["times"]) == ("", 9)


def test_what_is_too_long_is_cut_and_what_is_unknown_left_out() -> None:
    action = called_action("ag_1", "ag_1", EXEC | {"args": ["y" * 10_000] * 100}, named)
    assert action is not None
    args = action.details["args"]
    assert isinstance(args, list)
    assert (len(args), len(args[0])) == (ARGUMENTS_MAX, ARGUMENT_CHARACTERS_MAX)
    assert called_action("ag_1", "ag_1", {"kind": "news"}, named) is None
    assert called_action("ag_1", "ag_1", "text", named) is None


def test_a_watcher_that_was_replaced_is_said_of_each_agent_that_it_watched() -> None:
    action = called_action("ag_1", "ag_1", {"kind": "interrupted", "unread": False}, named)
    unread = called_action("ag_1", "ag_1", {"kind": "interrupted", "unread": True}, named)
    assert action is not None
    assert unread is not None
    assert (action.verb, action.actor, action.verdict) == ("process.watch", "daemon", "failed")
    assert "only counted" in unread.reason
    assert "only counted" not in action.reason


def test_what_a_watcher_that_was_taken_over_says_is_bounded() -> None:
    event = EXEC | {"path": "p" * 10**6, "digest": "d" * 10**6, "pid": 10**30, "argc": "many"}
    action = called_action("ag_1", "ag_1", event, named)
    assert action is not None
    assert len(action.object) + len(str(action.details)) < 3000
    assert (action.details["pid"], action.details["argc"]) == (-1, -1)
