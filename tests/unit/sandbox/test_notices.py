"""How much of what agents execute and are refused is told, and how fast they may ask."""

from __future__ import annotations

import pytest

from sandbox import notices
from sandbox.notices import Account, Kept

BEGIN = 1000.0


def test_execs_are_told_one_by_one_up_to_the_limit_and_then_at_its_rate() -> None:
    account = Account.opened(BEGIN)
    told = [account.executes(BEGIN) for _ in range(notices.TOLD_AT_ONCE_MAX + 1)]
    assert told == [True] * notices.TOLD_AT_ONCE_MAX + [False]
    assert account.due(BEGIN) == [], "not at once: a storm would be a line each"
    assert account.due(BEGIN + notices.SUMMARY_SECONDS_MIN) == [{"kind": "execs", "times": 1}]
    later = BEGIN + 1
    assert sum(account.executes(later) for _ in range(100)) == int(notices.TOLD_PER_SECOND)


def test_an_agent_whose_memory_is_slow_to_read_is_read_for_a_share_of_the_time() -> None:
    account = Account.opened(BEGIN)
    seconds = told = 0.0
    while seconds < 100:
        seconds += 0.25
        if account.executes(BEGIN + seconds):
            account.read.take(BEGIN + seconds, 0.25)
            told += 0.25
    share = notices.READ_SECONDS_PER_SECOND * 100
    assert share < told <= share + notices.READ_SECONDS_AT_ONCE_MAX + 0.25
    assert account.due(BEGIN + 200)[0]["kind"] == "execs", "the others are counted"


def test_nothing_is_lost_where_everything_is_asked_for() -> None:
    account = Account.opened(BEGIN)
    account.leave_out(7, BEGIN)
    account.refuses(5, BEGIN)
    assert account.due(BEGIN, everything=True) == [
        {"kind": "refused", "call": 5, "times": 1},
        {"kind": "execs", "times": 7},
    ]
    assert account.due(BEGIN, everything=True) == []


def test_a_refused_call_is_told_at_once_and_then_summed_up() -> None:
    account = Account.opened(BEGIN)
    account.refuses(101, BEGIN)
    assert account.due(BEGIN) == [{"kind": "refused", "call": 101, "times": 1}]
    for _ in range(3):
        account.refuses(101, BEGIN + 1)
    account.refuses(102, BEGIN + 1)
    assert account.due(BEGIN + 1) == [{"kind": "refused", "call": 102, "times": 1}]
    due = account.due(BEGIN + notices.SUMMARY_SECONDS_MIN)
    assert due == [{"kind": "refused", "call": 101, "times": 3}]


def test_numbers_that_an_agent_makes_up_are_bounded() -> None:
    account = Account.opened(BEGIN)
    for number in range(notices.CALLS_MAX + 50):
        account.refuses(number, BEGIN)
    assert len(account.refused) == notices.CALLS_MAX + 1
    assert {"kind": "refused", "call": -1, "times": 50} in account.due(BEGIN, everything=True)
    account.refuses(9999, BEGIN + 2 * notices.SUMMARY_SECONDS_MIN)
    assert len(account.refused) < notices.CALLS_MAX, "what was told long ago is forgotten"


def test_refused_calls_and_execs_share_one_allowance_and_each_call_has_its_turn() -> None:
    account = Account.opened(BEGIN)
    for _ in range(notices.TOLD_AT_ONCE_MAX):
        assert account.executes(BEGIN)
    for number in range(100):
        account.refuses(number, BEGIN)
    assert account.due(BEGIN) == []
    told = {event["call"] for second in range(1, 6) for event in account.due(BEGIN + second)}
    assert told == set(range(100)), f"{notices.TOLD_PER_SECOND} a second"


def test_what_nobody_listens_to_is_kept_up_to_a_limit_and_then_counted() -> None:
    kept = Kept()
    exec_, refused = {"kind": "exec", "path": "/x"}, {"kind": "refused", "call": 5, "times": 3}
    kept.add("a", "a", [exec_] * notices.KEPT_MAX)
    kept.add("a", "s", [exec_, {"kind": "execs", "times": 7}, refused])
    kept.add("b", "b", [refused, {"kind": "interrupted", "unread": False}])
    events = kept.take()
    assert len(events) == notices.KEPT_MAX + 4
    assert events[notices.KEPT_MAX :] == [
        ("b", "b", {"kind": "interrupted", "unread": False}),
        ("a", "s", {"kind": "execs", "times": 8}),
        ("a", "s", {"kind": "refused", "times": 3, "call": -1}),
        ("b", "b", {"kind": "refused", "times": 3, "call": -1}),
    ]
    assert kept.take() == []


def test_a_watcher_that_dies_again_and_again_fills_no_memory_while_nobody_listens() -> None:
    kept = Kept()
    kept.add("a", "a", [{"kind": "exec", "path": "/x"}] * notices.KEPT_MAX)
    for unread in (False, True, False) * 100:
        kept.add("a", "a", [{"kind": "interrupted", "unread": unread}])
    assert kept.take()[notices.KEPT_MAX :] == [("a", "a", {"kind": "interrupted", "unread": True})]
    assert kept.take() == []


@pytest.mark.parametrize(
    ("text", "characters_max", "seen"),
    [
        (b"/bin/x", 6, "/bin/x"),
        (b"/bin/xy", 6, r"\...xy"),
        (b"\xff\n\x1b[2J", 40, r"\xff\x0a\x1b[2J"),
        (b"\\xff", 40, r"\\xff"),
        (b"/" + b"." * 500 + b"/prog", 20, r"/...\........../prog"),
        (b"\xff" * 100, 12, r"\...\xff"),
        (b"", 4, ""),
    ],
)
def test_bytes_are_shown_as_printable_text_of_bounded_length(text: bytes, characters_max: int, seen: str) -> None:
    assert notices.shown(text, characters_max) == seen
    assert len(seen) <= characters_max
    assert seen.isascii()
    assert seen.isprintable()


def test_who_asks_too_fast_waits_and_no_longer_than_it_overdrew() -> None:
    account = Account.opened(BEGIN)
    for _ in range(notices.ASKED_AT_ONCE_MAX):
        account.asked.take(BEGIN)
    assert account.asked.wait_seconds(BEGIN) == 0
    account.asked.take(BEGIN)
    assert account.asked.wait_seconds(BEGIN) == 1 / notices.ASKED_PER_SECOND
    assert account.asked.wait_seconds(BEGIN + 1) == 0
