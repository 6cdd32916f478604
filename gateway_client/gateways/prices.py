"""List prices of models, to estimate what a call cost where nobody says. Data in prices.json; contracts may differ."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKENS_PER_UNIT: Final = 1_000_000

_DATED: Final = re.compile(r"-(?:\d{8}|\d{4}-\d{2}-\d{2}|latest)$")


@dataclass(frozen=True, slots=True)
class Price:
    """USD per million tokens."""

    input_usd: float
    output_usd: float

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.input_usd + output_tokens * self.output_usd) / TOKENS_PER_UNIT


class PriceTable:
    def __init__(self, models: Mapping[str, Price]) -> None:
        self._models = dict(models)

    def find(self, model: str) -> Price | None:
        """Return the price of a model by its name, with or without `provider/` before and a date after it."""
        bare = model.rpartition("/")[2]
        return self._models.get(model) or self._models.get(bare) or self._models.get(_DATED.sub("", bare))


def load() -> PriceTable:
    """Read the table that ships with this package."""
    text = resources.files(__package__).joinpath("prices.json").read_text(encoding="utf-8")
    models = json.loads(text)["models"]
    return PriceTable({name: Price(float(price[0]), float(price[1])) for name, price in models.items()})
