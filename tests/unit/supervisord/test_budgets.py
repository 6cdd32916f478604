"""Budgets: reserved before, settled after, never overdrawn by what was foreseen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisord.budgets import (
    Amounts,
    Budget,
    LabelBudget,
    Ledger,
    Period,
    Use,
    format_usd,
    parse_budget,
    period_start,
)
from supervisord.errors import Exhausted, InvalidInput


def test_a_budget_from_yaml_and_from_the_command_line() -> None:
    assert parse_budget({}) == Budget()
    assert parse_budget({"llm_tokens": 200000, "cost_usd": 2}) == Budget(200000, 2_000_000)
    assert parse_budget({"wall_clock": "1h30m", "cpu_seconds": "1.5s"}) == Budget(wall_ms=5_400_000, cpu_ms=1500)
    assert parse_budget({"wall_clock": 60.0, "cpu_seconds": "60"}) == Budget(wall_ms=60_000, cpu_ms=60_000)
    assert parse_budget({"egress_bytes": "1.5MiB"}) == Budget(egress_bytes=3 << 19)
    assert parse_budget({"egress_bytes": 104857600.0}) == parse_budget({"egress_bytes": "104857600"})
    assert Budget(egress_bytes=100 << 20).words() == {"egress_bytes": "100MiB"}
    assert parse_budget({"tokens": "500", "cost_usd": "0.000001", "requests": "3"}) == Budget(500, 1, 3)


@pytest.mark.parametrize(
    "values",
    [{"token": 1}, {"llm_tokens": -1},
     {"llm_tokens": 1.5}, {"llm_tokens": "x"}, {"llm_tokens": True}, {"llm_tokens": None},
     {"cost_usd": "NaN"}, {"cost_usd": "Infinity"}, {"cost_usd": 1e10}, {"requests": 10**13}, {"wall_clock": "999ms"},
     {"wall_clock": 0}, {"cpu_seconds": "x"}, {"cpu_seconds": float("inf")}, {"wall_clock": True},
     {"egress_bytes": "5 apples"}, {"egress_bytes": -1}, {"egress_bytes": 0.5}, {"egress_bytes": "1048577TiB"}],
)  # fmt: skip
def test_budgets_that_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InvalidInput) as raised:
        parse_budget(values)
    assert raised.value.remedy


def test_money_is_exact() -> None:
    ledger = Ledger(Budget(cost_microusd=1_000_000))
    for _ in range(10):
        ledger = ledger.settle(Amounts(), Amounts(cost_microusd=parse_budget({"cost_usd": 0.1}).cost_microusd or 0))
    assert ledger.left().cost_microusd == 0
    assert format_usd(ledger.spent.cost_microusd) == "1"


def test_what_is_reserved_is_not_there_for_others() -> None:
    ledger = Ledger(Budget(llm_tokens=100)).reserve(Amounts(llm_tokens=60))
    with pytest.raises(Exhausted, match="llm_tokens: 40 left"):
        ledger.reserve(Amounts(llm_tokens=41))
    assert ledger.reserve(Amounts(llm_tokens=40)).left().llm_tokens == 0
    settled = ledger.settle(Amounts(llm_tokens=60), Amounts(llm_tokens=10))
    assert settled.left().llm_tokens == 90
    assert settled.reserve(Amounts(llm_tokens=90)).left().llm_tokens == 0


def test_an_empty_budget_refuses_even_a_call_that_foresees_nothing() -> None:
    with pytest.raises(Exhausted):
        Ledger(Budget(requests=0)).reserve(Amounts())
    with pytest.raises(Exhausted):
        Ledger(Budget(cost_microusd=5), spent=Amounts(cost_microusd=9)).reserve(Amounts())
    assert Ledger(Budget()).reserve(Amounts(10**9, 10**9, 10**9)).left() == Budget()


def test_what_decide_sees() -> None:
    view = Ledger(Budget(10, 2_500_000), spent=Amounts(llm_tokens=4)).view()
    assert (view.llm_tokens_left, view.cost_usd_left, view.requests_left) == (6, 2.5, None)


def test_what_decide_sees_of_time() -> None:
    budget = Budget(wall_ms=2000, cpu_ms=2000)
    assert Ledger(budget, wall_ms=1999).view().time_over == ""
    assert Ledger(budget, wall_ms=1500).view().wall_seconds_left == 0.5
    assert Ledger(budget, wall_ms=2000).view().time_over == "wall-clock time"
    assert Ledger(budget, cpu_ms=9000).view().time_over == "CPU time"


def test_an_earlier_release_described_a_budget_with_less() -> None:
    assert Budget.from_json({"llm_tokens": 1, "cost_microusd": None, "requests": 2}) == Budget(1, None, 2)
    full = Budget(1, 2, 3, 4000, 5000)
    assert Budget.from_json(full.to_json()) == full


@pytest.mark.parametrize(
    ("spent", "limit", "near", "reached"),
    [
        (0, 0, False, False), (1, 0, True, True), (0, 1, False, False), (1, 1, True, True),
        (79, 100, False, False), (80, 100, True, False), (99, 100, True, False), (100, 100, True, True),
        (101, 100, True, True), (7, 9, False, False), (8, 9, True, False),
    ],
)  # fmt: skip
def test_when_a_bound_is_near_and_when_it_is_reached(spent: int, limit: int, near: bool, reached: bool) -> None:  # noqa: FBT001 - columns of the table above
    use = Use("requests", spent, limit)
    assert (use.near, use.reached) == (near, reached)


@given(st.integers(0, 10**15), st.integers(0, 10**15))
def test_what_is_reached_is_near_and_what_is_near_is_near_with_more(spent: int, limit: int) -> None:
    use, more = Use("llm_tokens", spent, limit), Use("llm_tokens", spent + 1, limit)
    assert use.near or not use.reached
    assert more.near or not use.near
    assert use.near == (spent > 0 and spent / 4 >= limit / 5) or abs(spent / 4 - limit / 5) < 1


def test_what_is_set_aside_is_no_reason_to_stop_an_agent() -> None:
    ledger = Ledger(Budget(requests=2, cost_microusd=3_000_000)).reserve(Amounts(requests=2))
    cost, requests = ledger.uses()
    assert (requests.spent, requests.reserved, requests.near) == (0, 2, False)
    assert str(cost) == "budget cost_usd: 0 of 3 spent"
    ended = ledger.settle(Amounts(requests=2), Amounts(requests=2, cost_microusd=2_500_000)).uses()
    assert [str(use) for use in ended] == ["budget cost_usd: 2.5 of 3 spent", "budget requests: 2 of 2 spent"]


def test_periods_begin_in_utc() -> None:
    last = 1_798_761_599.9  # 2026-12-31T23:59:59.9Z
    assert [period_start(period, last) for period in Period] == ["2026-12-31", "2026-12", ""]
    assert [period_start(period, last + 0.1) for period in Period] == ["2027-01-01", "2027-01", ""]


@given(st.sampled_from(list(Period)), st.integers(0, 4 * 10**9), st.integers(0, 4 * 10**9))
def test_a_later_time_is_of_no_earlier_period(period: Period, one: int, other: int) -> None:
    early, late = sorted((one, other))
    assert period_start(period, early) <= period_start(period, late)


def test_whom_a_label_means() -> None:
    shared = LabelBudget("team=a", Budget(requests=1))
    assert shared.means({"team": "a", "x": "y"})
    assert not shared.means({"team": "b"})
    assert not shared.means({})


budgets = st.builds(Budget, *[st.none() | st.integers(min_value=0, max_value=9)] * 5)


@given(budgets, budgets)
def test_a_child_says_what_it_says_and_inherits_the_rest(child: Budget, parent: Budget) -> None:
    pairs = zip(child.over(parent).amounts(), child.amounts(), parent.amounts(), strict=True)
    assert all(found == (theirs if own is None else own) for found, own, theirs in pairs)


@given(budgets, budgets)
def test_the_tightest_of_two_narrows_both(one: Budget, other: Budget) -> None:
    both = one.tightest(other)
    assert both.narrows(one)
    assert both.narrows(other)
    assert both == (one if one.narrows(other) else both)


@given(st.lists(st.integers(min_value=0, max_value=30), max_size=20))
def test_reservations_never_pass_the_budget(wishes: list[int]) -> None:
    ledger, held = Ledger(Budget(llm_tokens=100)), 0
    for wish in wishes:
        try:
            ledger = ledger.reserve(Amounts(llm_tokens=wish))
        except Exhausted:
            assert held + wish > 100 or held == 100
        else:
            held += wish
    assert held <= 100
