"""Which model answers to which name, and what its words cost."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from gateway_client.gateways.embedded.conversation import Model, RequestError, Usage
from gateway_client.gateways.prices import Price

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.gateways.prices import PriceTable

FREE: Final = Price(0.0, 0.0)
"""Of models on this machine: not an estimate."""

_GLOB: Final = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class Route:
    """`name` is a glob; `listed` are the names `/v1/models` shows for it (a name without a glob shows itself)."""

    name: str
    model: Model
    price: Price | None = None
    listed: tuple[str, ...] = ()

    @property
    def shown(self) -> tuple[str, ...]:
        return self.listed or (() if _GLOB & set(self.name) else (self.name,))


@dataclass(frozen=True, slots=True)
class Routes:
    routes: Sequence[Route]
    prices: PriceTable = field(repr=False)

    def find(self, name: str) -> Route:
        """Return the first route whose glob matches; RequestError 404 where none does."""
        for route in self.routes:
            if fnmatchcase(name, route.name):
                return route
        raise RequestError(
            f"cannot find model {name}: this gateway has no such model; GET /v1/models lists them",
            status=404,
            code="model_not_found",
            param="model",
        )

    def names(self) -> list[str]:
        return list(dict.fromkeys(name for route in self.routes for name in route.shown))

    def priced(self, usage: Usage, route: Route, model: str) -> Usage:
        """Return the usage with its cost: by the operator's price, else by the table, else as it was."""
        price = route.price or self.prices.find(model)
        if price is None:
            return usage
        cost = price.cost(usage.input_tokens, usage.output_tokens)
        return replace(usage, cost_usd=cost, cost_estimated=price != FREE)
