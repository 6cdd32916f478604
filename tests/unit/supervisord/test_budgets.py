"""Budgets: reserved before, settled after, never overdrawn by what was foreseen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisord.budgets import Amounts, Budget, Ledger, format_usd, parse_budget
from supervisord.errors import Exhausted, InvalidInput


def test_a_budget_from_yaml_and_from_the_command_line() -> None:
    assert parse_budget({}) == Budget()
    assert parse_budget({"llm_tokens": 200000, "cost_usd": 2}) == Budget(200000, 2_000_000)
    assert parse_budget({"tokens": "500", "cost_usd": "0.000001", "requests": "3"}) == Budget(500, 1, 3)


@pytest.mark.parametrize(
    "values",
    [{"token": 1}, {"llm_tokens": -1},
     {"llm_tokens": 1.5}, {"llm_tokens": "x"}, {"llm_tokens": True}, {"llm_tokens": None},
     {"cost_usd": "NaN"}, {"cost_usd": "Infinity"}, {"cost_usd": 1e10}, {"requests": 10**13}],
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


budgets = st.builds(Budget, *[st.none() | st.integers(min_value=0, max_value=9)] * 3)


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
