"""What an agent may spend (tokens, money, requests, time, bytes): reserved before a call, settled after it (pure).

Money is counted in millionths of a US dollar, so that a million small calls add up exactly; times in milliseconds. Time
is not reserved: it is measured (budget_watch.py). Bytes are reserved a loan at a time (loans.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from enum import Enum
from typing import Final, Self

from gateway_client.egress.decide import BudgetView
from supervisord.errors import Exhausted, InvalidInput
from supervisord.ids import shown
from supervisord.sizes import (
    DURATION_SECONDS_MAX,
    SIZE_BYTES_MAX,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

MICROUSD_PER_USD: Final = 1_000_000
MS_PER_SECOND: Final = 1000
LLM_TOKENS_MAX: Final = 10**15
COST_MICROUSD_MAX: Final = 10**9 * MICROUSD_PER_USD
REQUESTS_MAX: Final = 10**12
TIME_MS_MIN: Final = MS_PER_SECOND
"""A shorter time is over before anybody has looked."""
NOTICE_PERCENT: Final = 80

BOUNDS: Final = ("llm_tokens", "cost_usd", "requests", "wall_clock", "cpu_seconds", "egress_bytes")
"""In the order of the fields of Budget."""
TIMES: Final = frozenset({"wall_clock", "cpu_seconds"})
MODEL_CALL: Final = ("llm_tokens", "cost_usd", "requests")
"""The bounds that a model call draws on; it is refused where nothing is left of any."""
OTHER_CALL: Final = ("requests",)
"""Those of whatever else leaves. Bytes are lent beside either."""


class OnExhausted(Enum):
    """What happens to an agent that has used up a bound of its budget; each does what those before it do, and more."""

    DENY = "deny"
    FREEZE = "freeze"
    KILL = "kill"


STRICTNESS: Final = (OnExhausted.DENY, OnExhausted.FREEZE, OnExhausted.KILL)


class Period(Enum):
    """How long a label's budget lasts before it begins anew, in UTC."""

    DAY = "day"
    MONTH = "month"
    NONE = "none"


def period_start(period: Period, now_s: float) -> str:
    """Gives the day or month of a Unix time as text that sorts like time; empty where there is no period."""
    when = datetime.fromtimestamp(now_s, UTC)
    match period:
        case Period.DAY:
            return when.strftime("%Y-%m-%d")
        case Period.MONTH:
            return when.strftime("%Y-%m")
        case Period.NONE:
            return ""


@dataclass(frozen=True, slots=True)
class Budget:
    """The most an agent may spend in its life; None is no limit."""

    llm_tokens: int | None = None
    cost_microusd: int | None = None
    requests: int | None = None
    wall_ms: int | None = None
    cpu_ms: int | None = None
    egress_bytes: int | None = None

    def amounts(self) -> tuple[int | None, ...]:
        return (self.llm_tokens, self.cost_microusd, self.requests, self.wall_ms, self.cpu_ms, self.egress_bytes)

    def narrows(self, other: "Budget") -> bool:
        """Tells whether everything this budget allows is allowed by the other too."""
        pairs = zip(self.amounts(), other.amounts(), strict=True)
        return all(theirs is None or (ours is not None and ours <= theirs) for ours, theirs in pairs)

    def tightest(self, other: "Budget") -> "Budget":
        """Gives the budget that both allow."""
        return Budget(*map(_least, self.amounts(), other.amounts()))

    def over(self, base: "Budget") -> "Budget":
        """Gives this budget, and the other's where this one says nothing."""
        return Budget(
            *(theirs if ours is None else ours for ours, theirs in zip(self.amounts(), base.amounts(), strict=True))
        )

    def named(self) -> dict[str, int | float]:
        """Gives the bounds that there are, in the words and units of a launch: dollars and seconds."""
        pairs = zip(BOUNDS, self.amounts(), strict=True)
        return {name: in_units(name, amount) for name, amount in pairs if amount is not None}

    def words(self) -> dict[str, int | float | str]:
        """Gives the bounds that there are, in the words of a policy."""
        return {name: _word(name, value) for name, value in self.named().items()}

    def to_json(self) -> dict[str, int | None]:
        return dict(zip(self.__slots__, self.amounts(), strict=True))

    @classmethod
    def from_json(cls, data: Mapping[str, int | None]) -> Self:
        """Gives the budget again; what an earlier release did not know is no limit."""
        return cls(**{name: data.get(name) for name in cls.__slots__})


NO_BUDGET: Final = Budget()


@dataclass(frozen=True, slots=True)
class LabelBudget:
    """What all agents of a label may spend together, over and over where there is a period."""

    label: str
    """`key=value`."""
    budget: Budget
    period: Period = Period.NONE

    def means(self, labels: Mapping[str, str]) -> bool:
        key, _, value = self.label.partition("=")
        return labels.get(key) == value


@dataclass(frozen=True, slots=True)
class Use:
    """How much of one bound is used; `label` and `since` say whose and since when, where it is not the agent's own."""

    bound: str
    spent: int
    limit: int
    label: str = ""
    since: str = ""
    reserved: int = 0

    @property
    def key(self) -> str:
        """What tells it from others of the agent; another one in each period."""
        return "|".join(filter(None, (self.label, self.since, self.bound)))

    @property
    def reached(self) -> bool:
        """Whether all of it is spent. A bound of 0 that nothing was taken from is a prohibition, not a budget."""
        return 0 < self.spent >= self.limit

    @property
    def near(self) -> bool:
        return self.spent > 0 and self.spent * 100 >= self.limit * NOTICE_PERCENT

    @property
    def facts(self) -> dict[str, int | float | str]:
        """What the log says of it."""
        told: dict[str, int | float | str] = {
            "bound": self.bound,
            "spent": in_units(self.bound, self.spent),
            "limit": in_units(self.bound, self.limit),
        }
        if self.label:
            told |= {"label": self.label, "since": self.since}
        return told

    def __str__(self) -> str:
        whose = f" of label {self.label}" if self.label else ""
        spent, limit = in_units(self.bound, self.spent), in_units(self.bound, self.limit)
        return f"budget {self.bound}{whose}: {spent} of {limit} spent"


def in_units(bound: str, amount: int) -> int | float:
    """Gives an amount as people and the API have it: whole tokens and requests, dollars, seconds."""
    per = MICROUSD_PER_USD if bound == "cost_usd" else MS_PER_SECOND if bound in TIMES else 1
    return amount / per if amount % per else amount // per


@dataclass(frozen=True, slots=True)
class Amounts:
    """What a call costs, or all calls together."""

    llm_tokens: int = 0
    cost_microusd: int = 0
    requests: int = 0
    egress_bytes: int = 0

    def __add__(self, other: "Amounts") -> "Amounts":
        return Amounts(
            self.llm_tokens + other.llm_tokens,
            self.cost_microusd + other.cost_microusd,
            self.requests + other.requests,
            self.egress_bytes + other.egress_bytes,
        )

    def __sub__(self, other: "Amounts") -> "Amounts":
        return Amounts(
            self.llm_tokens - other.llm_tokens,
            self.cost_microusd - other.cost_microusd,
            self.requests - other.requests,
            self.egress_bytes - other.egress_bytes,
        )

    def least(self, other: "Amounts") -> "Amounts":
        """Gives the smaller of the two, each amount by itself."""
        return Amounts(
            min(self.llm_tokens, other.llm_tokens),
            min(self.cost_microusd, other.cost_microusd),
            min(self.requests, other.requests),
            min(self.egress_bytes, other.egress_bytes),
        )

    def within(self, other: "Amounts", budget: Budget) -> bool:
        """Tells whether each amount that the budget limits is no more than the other's."""
        pairs = (
            (budget.llm_tokens, self.llm_tokens, other.llm_tokens),
            (budget.cost_microusd, self.cost_microusd, other.cost_microusd),
            (budget.requests, self.requests, other.requests),
            (budget.egress_bytes, self.egress_bytes, other.egress_bytes),
        )
        return all(limit is None or ours <= theirs for limit, ours, theirs in pairs)


@dataclass(frozen=True, slots=True)
class Ledger:
    """One agent's spending, or a label's; a value, so that `reserve` and `settle` give the next one."""

    budget: Budget
    spent: Amounts = Amounts()
    reserved: Amounts = Amounts()
    wall_ms: int = 0
    cpu_ms: int = 0
    label: str = ""
    since: str = ""

    def used(self) -> Amounts:
        """Gives what is spent, and what may be by calls under way."""
        return self.spent + self.reserved

    def left(self) -> Budget:
        """Gives what is neither spent nor reserved, never below zero; None is no limit."""
        used = self.used()
        taken = (used.llm_tokens, used.cost_microusd, used.requests, self.wall_ms, self.cpu_ms, used.egress_bytes)
        return Budget(*map(_left, self.budget.amounts(), taken))

    def uses(self) -> tuple[Use, ...]:
        """Gives every bound there is and what is spent of it."""
        sums, held_of = self.spent, self.reserved
        times = (self.wall_ms, self.cpu_ms)
        spent = (sums.llm_tokens, sums.cost_microusd, sums.requests, *times, sums.egress_bytes)
        reserved = (held_of.llm_tokens, held_of.cost_microusd, held_of.requests, 0, 0, held_of.egress_bytes)
        rows = zip(BOUNDS, self.budget.amounts(), spent, reserved, strict=True)
        return tuple(
            Use(name, used, limit, self.label, self.since, held)
            for name, limit, used, held in rows
            if limit is not None
        )

    def view(self) -> BudgetView:
        """Gives what decide() sees of it."""
        return budget_view(self.left())

    def reserve(self, amounts: Amounts, bounds: Sequence[str] = MODEL_CALL) -> "Ledger":
        """Gives the ledger with the amounts set aside; raises Exhausted naming the first of `bounds` that is too small.

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
            if name in bounds and available is not None and (available <= 0 or available < need):
                whose = f" of label {self.label}" if self.label else ""
                raise Exhausted(
                    f"cannot spend {need} of budget {name}{whose}: {available} left",
                    remedy="raise it under [[budgets]]" if self.label else f"launch with a larger --budget {name}=N",
                )
        return replace(self, reserved=self.reserved + amounts)

    def settle(self, reserved: Amounts, actual: Amounts) -> "Ledger":
        """Gives the ledger after a call: what was set aside is free again and what it really cost is spent."""
        return replace(self, reserved=self.reserved - reserved, spent=self.spent + actual)


def budget_view(left: Budget) -> BudgetView:
    """Gives what decide() sees of what is left."""
    cost = None if left.cost_microusd is None else left.cost_microusd / MICROUSD_PER_USD
    wall, cpu = (None if time is None else time / MS_PER_SECOND for time in (left.wall_ms, left.cpu_ms))
    return BudgetView(
        llm_tokens_left=left.llm_tokens,
        cost_usd_left=cost,
        requests_left=left.requests,
        wall_seconds_left=wall,
        cpu_seconds_left=cpu,
        egress_bytes_left=left.egress_bytes,
    )


def parse_budget(values: Mapping[str, object]) -> Budget:
    """Gives the budget of BOUNDS (`tokens` is `llm_tokens`); raises InvalidInput.

    Values are numbers (from YAML) or their text (from the command line); times are durations or numbers of seconds,
    bytes are sizes or numbers.
    """
    tokens = cost = requests = wall = cpu = egress = None
    for name, value in values.items():
        match name:
            case "llm_tokens" | "tokens":
                tokens = _whole(name, value, LLM_TOKENS_MAX)
            case "requests":
                requests = _whole(name, value, REQUESTS_MAX)
            case "cost_usd":
                cost = _microusd(value)
            case "wall_clock":
                wall = _milliseconds(name, value)
            case "cpu_seconds":
                cpu = _milliseconds(name, value)
            case "egress_bytes":
                egress = _bytes(name, value)
            case _:
                raise InvalidInput(
                    f"cannot use budget {shown(name)}: there is no such budget",
                    remedy=f"known here: {', '.join(BOUNDS)}",
                )
    return Budget(tokens, cost, requests, wall, cpu, egress)


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


def _bytes(name: str, value: object) -> int:
    if isinstance(value, str) and not value.replace(".", "", 1).isdecimal():
        return parse_size(value)
    return _whole(name, value, SIZE_BYTES_MAX)


def _word(name: str, value: float) -> int | float | str:
    if name == "egress_bytes":
        return format_size(int(value))
    return format_duration(value) if name in TIMES else value


def _microusd(value: object) -> int:
    number = _decimal("cost_usd", value)
    if number > COST_MICROUSD_MAX // MICROUSD_PER_USD:
        raise InvalidInput(f"cannot use budget cost_usd={shown(str(value))}: too large", remedy="correct the number")
    return int((number * MICROUSD_PER_USD).to_integral_value())


def _milliseconds(name: str, value: object) -> int:
    if isinstance(value, str) and not value.isdecimal():
        seconds = Decimal(str(parse_duration(value)))
    else:
        seconds = _decimal(name, value)
    if not TIME_MS_MIN <= seconds * MS_PER_SECOND <= DURATION_SECONDS_MAX * MS_PER_SECOND:
        least, most = format_duration(TIME_MS_MIN / MS_PER_SECOND), format_duration(DURATION_SECONDS_MAX)
        raise InvalidInput(
            f"cannot use budget {name}={shown(str(value))}: it is not from {least} to {most}",
            remedy="write for example 90s or 2h",
        )
    return int(seconds * MS_PER_SECOND)


def _least(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _left(limit: int | None, used: int) -> int | None:
    return None if limit is None else max(limit - used, 0)
