"""What an agent may spend (tokens, money, requests): reserved before a call, settled after it (pure).

Money is counted in millionths of a US dollar, so that a million small calls add up exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from typing import Final, Self

from gateway_client.egress.decide import BudgetView
from supervisord.errors import Exhausted, InvalidInput
from supervisord.ids import shown

MICROUSD_PER_USD: Final = 1_000_000
LLM_TOKENS_MAX: Final = 10**15
COST_MICROUSD_MAX: Final = 10**9 * MICROUSD_PER_USD
REQUESTS_MAX: Final = 10**12


@dataclass(frozen=True, slots=True)
class Budget:
    """The most an agent may spend in its life; None is no limit."""

    llm_tokens: int | None = None
    cost_microusd: int | None = None
    requests: int | None = None

    def narrows(self, other: "Budget") -> bool:
        """Tells whether everything this budget allows is allowed by the other too."""
        pairs = (
            (self.llm_tokens, other.llm_tokens),
            (self.cost_microusd, other.cost_microusd),
            (self.requests, other.requests),
        )
        return all(theirs is None or (ours is not None and ours <= theirs) for ours, theirs in pairs)

    def tightest(self, other: "Budget") -> "Budget":
        """Gives the budget that both allow."""
        return Budget(
            _least(self.llm_tokens, other.llm_tokens),
            _least(self.cost_microusd, other.cost_microusd),
            _least(self.requests, other.requests),
        )

    def to_json(self) -> dict[str, int | None]:
        return {"llm_tokens": self.llm_tokens, "cost_microusd": self.cost_microusd, "requests": self.requests}

    @classmethod
    def from_json(cls, data: Mapping[str, int | None]) -> Self:
        return cls(data["llm_tokens"], data["cost_microusd"], data["requests"])


NO_BUDGET: Final = Budget()


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a call costs, or all calls together."""

    llm_tokens: int = 0
    cost_microusd: int = 0
    requests: int = 0

    def __add__(self, other: "Amounts") -> "Amounts":
        return Amounts(
            self.llm_tokens + other.llm_tokens,
            self.cost_microusd + other.cost_microusd,
            self.requests + other.requests,
        )

    def __sub__(self, other: "Amounts") -> "Amounts":
        return Amounts(
            self.llm_tokens - other.llm_tokens,
            self.cost_microusd - other.cost_microusd,
            self.requests - other.requests,
        )

    def least(self, other: "Amounts") -> "Amounts":
        """Gives the smaller of the two, each amount by itself."""
        return Amounts(
            min(self.llm_tokens, other.llm_tokens),
            min(self.cost_microusd, other.cost_microusd),
            min(self.requests, other.requests),
        )

    def within(self, other: "Amounts", budget: Budget) -> bool:
        """Tells whether each amount that the budget limits is no more than the other's."""
        pairs = (
            (budget.llm_tokens, self.llm_tokens, other.llm_tokens),
            (budget.cost_microusd, self.cost_microusd, other.cost_microusd),
            (budget.requests, self.requests, other.requests),
        )
        return all(limit is None or ours <= theirs for limit, ours, theirs in pairs)


@dataclass(frozen=True, slots=True)
class Ledger:
    """One agent's spending; a value, so that `reserve` and `settle` give the next one."""

    budget: Budget
    spent: Amounts = Amounts()
    reserved: Amounts = Amounts()

    def used(self) -> Amounts:
        """Gives what is spent, and what may be by calls under way."""
        return self.spent + self.reserved

    def left(self) -> Budget:
        """Gives what is neither spent nor reserved, never below zero; None is no limit."""
        used = self.used()
        return Budget(
            _left(self.budget.llm_tokens, used.llm_tokens),
            _left(self.budget.cost_microusd, used.cost_microusd),
            _left(self.budget.requests, used.requests),
        )

    def view(self) -> BudgetView:
        """Gives what decide() sees of it."""
        left = self.left()
        cost = None if left.cost_microusd is None else left.cost_microusd / MICROUSD_PER_USD
        return BudgetView(llm_tokens_left=left.llm_tokens, cost_usd_left=cost, requests_left=left.requests)

    def reserve(self, amounts: Amounts) -> "Ledger":
        """Gives the ledger with the amounts set aside; raises Exhausted naming the first budget that is too small.

        A call whose cost nobody can foresee reserves 0 of it, and is refused only when nothing at all is left: the
        overrun is at most what the calls under way cost, and it is recorded when they settle.
        """
        left = self.left()
        wanted = (
            ("llm_tokens", left.llm_tokens, amounts.llm_tokens),
            ("cost_usd", left.cost_microusd, amounts.cost_microusd),
            ("requests", left.requests, amounts.requests),
        )
        for name, available, need in wanted:
            if available is not None and (available <= 0 or available < need):
                raise Exhausted(
                    f"cannot spend {need} of budget {name}: {available} left",
                    remedy=f"launch with a larger --budget {name}=N",
                )
        return replace(self, reserved=self.reserved + amounts)

    def settle(self, reserved: Amounts, actual: Amounts) -> "Ledger":
        """Gives the ledger after a call: what was set aside is free again and what it really cost is spent."""
        return replace(self, reserved=self.reserved - reserved, spent=self.spent + actual)


def parse_budget(values: Mapping[str, object]) -> Budget:
    """Gives the budget of `llm_tokens` (also `tokens`), `cost_usd` and `requests`; raises InvalidInput.

    Values are numbers (from YAML) or their text (from the command line).
    """
    tokens = cost = requests = None
    for name, value in values.items():
        match name:
            case "llm_tokens" | "tokens":
                tokens = _whole(name, value, LLM_TOKENS_MAX)
            case "requests":
                requests = _whole(name, value, REQUESTS_MAX)
            case "cost_usd":
                cost = _microusd(value)
            case _:
                raise InvalidInput(
                    f"cannot use budget {shown(name)}: there is no such budget",
                    remedy="known here: llm_tokens, cost_usd, requests",
                )
    return Budget(tokens, cost, requests)


def format_usd(cost_microusd: int) -> str:
    return f"{Decimal(cost_microusd) / MICROUSD_PER_USD:f}"


def _decimal(name: str, value: object) -> Decimal:
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            number = Decimal(str(value))
        except InvalidOperation:
            number = Decimal("NaN")
        if number.is_finite() and number >= 0:
            return number
    raise InvalidInput(f"cannot use budget {name}={shown(str(value))}: it is not a number", remedy="write digits")


def _whole(name: str, value: object, most: int) -> int:
    number = _decimal(name, value)
    if number != number.to_integral_value() or number > most:
        raise InvalidInput(
            f"cannot use budget {name}={shown(str(value))}: it is not a whole number up to {most}",
            remedy="correct the number",
        )
    return int(number)


def _microusd(value: object) -> int:
    number = _decimal("cost_usd", value)
    if number > COST_MICROUSD_MAX // MICROUSD_PER_USD:
        raise InvalidInput(f"cannot use budget cost_usd={shown(str(value))}: too large", remedy="correct the number")
    return int((number * MICROUSD_PER_USD).to_integral_value())


def _least(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _left(limit: int | None, used: int) -> int | None:
    return None if limit is None else max(limit - used, 0)
