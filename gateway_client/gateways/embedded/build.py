"""From configuration to a working API: the one place that makes models."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from gateway_client.gateways import prices
from gateway_client.gateways.embedded.api import Api
from gateway_client.gateways.embedded.models.local import LocalModel
from gateway_client.gateways.embedded.models.provider import ProviderModel
from gateway_client.gateways.embedded.models.scripted import ScriptedModel
from gateway_client.gateways.embedded.routes import FREE, Route, Routes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gateway_client.gateways.embedded.api import TellDaemon
    from gateway_client.gateways.embedded.config import ModelConfig
    from gateway_client.gateways.embedded.conversation import Model
    from gateway_client.gateways.embedded.models.script import Script
    from gateway_client.gateways.guardrails.rules import Rules
    from gateway_client.gateways.prices import Price


def build_api(
    models: Iterable[ModelConfig],
    scripts: Mapping[str, Script],
    *,
    says_cost: bool = True,
    rules: Rules | None = None,
    tell: TellDaemon | None = None,
) -> Api:
    """Return the API with a route for each model; opens files of local models, so call it before dropping the uid.

    Without `says_cost` no answer names a cost: another gateway in front would believe it.
    """
    table = prices.load() if says_cost else prices.PriceTable({})
    routes = [
        Route(model.name, make(model, scripts), _price(model) if says_cost else None, model.listed) for model in models
    ]
    return Api(Routes(routes, table), now=time.time, rules=rules, tell=tell)


def _price(config: ModelConfig) -> Price | None:
    return config.price or (FREE if config.kind in ("scripted", "local") else None)


def make(config: ModelConfig, scripts: Mapping[str, Script]) -> Model:
    match config.kind:
        case "scripted":
            return ScriptedModel(scripts.get(config.script))
        case "local":
            return LocalModel.load(config.path, context_tokens=config.context_tokens)
        case "openai" | "anthropic" as kind:
            if config.url is None:
                raise ValueError(f"cannot use model {config.name}: it has no url")
            return ProviderModel(kind, config.url, config.key, config.model, config.responses)
