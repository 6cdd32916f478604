"""The bounds of a grant beside its scope: time, uses, bytes, cost (pure)."""

import math
from dataclasses import asdict, dataclass
from typing import Final, TypeVar

from gateway_client.egress.scope import FsScope, LlmScope, Scope, format_scope
from supervisord.budgets import COST_MICROUSD_MAX
from supervisord.errors import InvalidInput

TTL_SECONDS_MAX: Final = 366 * 86400
USES_MAX: Final = 10**9
BYTES_MAX: Final = 2**53

N = TypeVar("N", int, float)
JsonValue = None | bool | int | float | str


@dataclass(frozen=True, slots=True)
class Terms:
    """How far a grant goes beside its scope; None is without that bound."""

    ttl_seconds: float | None = None
    max_uses: int | None = None
    max_bytes: int | None = None
    max_cost_microusd: int | None = None

    def tightest(self, other: "Terms") -> "Terms":
        """The smaller of each bound: what both have agreed to."""
        return Terms(
            _least(self.ttl_seconds, other.ttl_seconds),
            _least(self.max_uses, other.max_uses),
            _least(self.max_bytes, other.max_bytes),
            _least(self.max_cost_microusd, other.max_cost_microusd),
        )

    def to_json(self) -> dict[str, JsonValue]:
        """The bounds that there are."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check(self, scope: Scope) -> None:
        """Raise InvalidInput where a grant of this scope cannot have these bounds."""
        self._check_ranges(scope)
        if isinstance(scope, FsScope):
            for value, what in ((self.max_uses, "uses"), (self.max_bytes, "bytes")):
                if value is not None:
                    raise InvalidInput(
                        f"cannot grant {format_scope(scope)} for {value} {what}: opening a file is not counted",
                        remedy="give it a time: --ttl 10m",
                    )
        if self.max_cost_microusd is not None and not isinstance(scope, LlmScope):
            raise InvalidInput(
                f"cannot grant {format_scope(scope)} up to a cost: only calls of models have one",
                remedy="bound it by --max-uses, --max-bytes or --ttl",
            )

    def _check_ranges(self, scope: Scope) -> None:
        ttl, named = self.ttl_seconds, format_scope(scope)
        if ttl is not None and not (math.isfinite(ttl) and 0 < ttl <= TTL_SECONDS_MAX):
            raise InvalidInput(
                f"cannot grant {named}: a time to live of {ttl} s is not between 0 and 366d",
                remedy="pass for example --ttl 10m",
            )
        for value, most, what, remedy in (
            (self.max_uses, USES_MAX, "uses", "--max-uses 1"),
            (self.max_bytes, BYTES_MAX, "bytes", "--max-bytes 10MiB"),
            (self.max_cost_microusd, COST_MICROUSD_MAX, "millionths of a dollar", "--max-cost 0.50"),
        ):
            if value is not None and not 1 <= value <= most:
                raise InvalidInput(
                    f"cannot grant {named}: {value} {what} are not between 1 and {most}",
                    remedy=f"pass for example {remedy}",
                )


NO_TERMS: Final = Terms()


def _least(one: N | None, other: N | None) -> N | None:
    given = [value for value in (one, other) if value is not None]
    return min(given, default=None)
