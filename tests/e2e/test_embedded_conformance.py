"""The official SDKs understand the embedded gateway: three dialects, streaming and not, text and tools, errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.conformance import CASES, check
from tests.support.embedded_gateway import EmbeddedGateway, Shim, run_conformance

if TYPE_CHECKING:
    from collections.abc import Iterator

OTHERS = ("models_openai", "models_anthropic", "count_tokens", "error_openai", "error_anthropic", "cost_headers")
MODELS = [
    {"name": "scripted-*", "kind": "scripted", "listed": ["scripted-small", "scripted-large"],
     "price": {"input_usd_per_mtok": 1000, "output_usd_per_mtok": 2000}},
]  # fmt: skip


@pytest.fixture(scope="module")
def understood() -> Iterator[dict[str, dict[str, Any]]]:
    with EmbeddedGateway(models=MODELS) as gateway, Shim(gateway) as shim:
        assert gateway.ready["ready"], gateway.ready
        yield run_conformance(shim.url, "scripted-small", *CASES, *OTHERS)


@pytest.mark.parametrize("case", CASES)
def test_sdk_understands(understood: dict[str, dict[str, Any]], case: str) -> None:
    check(case, understood[case])


@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
def test_models_are_listed(understood: dict[str, dict[str, Any]], sdk: str) -> None:
    assert understood[f"models_{sdk}"] == {"models": ["scripted-small", "scripted-large"]}


def test_tokens_are_counted(understood: dict[str, dict[str, Any]]) -> None:
    assert understood["count_tokens"] == {"input_tokens": 5}


@pytest.mark.parametrize("sdk", ["openai", "anthropic"])
def test_error_becomes_the_sdks_own_exception(understood: dict[str, dict[str, Any]], sdk: str) -> None:
    assert understood[f"error_{sdk}"]["status"] == 429
    assert "slow down" in understood[f"error_{sdk}"]["message"]


def test_cost_is_in_the_headers_and_marked(understood: dict[str, dict[str, Any]]) -> None:
    # "@say hello" is 3 tokens in, "hello" 2 out: 3 * 0.001 + 2 * 0.002.
    assert understood["cost_headers"] == {"x-stockade-cost-usd": "0.0070000000", "x-stockade-cost-estimated": "true"}
