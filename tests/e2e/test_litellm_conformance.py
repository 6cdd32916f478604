"""The official SDKs are understood through a real LiteLLM proxy with the scripted model behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.support.conformance import CASES, check
from tests.support.embedded_gateway import run_conformance, scripted_upstream
from tests.support.litellm_proxy import MODEL, MODEL_OF_MESSAGES, Proxy, litellm_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with scripted_upstream() as upstream, litellm_proxy(upstream) as running:
        yield running


@pytest.fixture(scope="module")
def understood(proxy: Proxy) -> dict[str, dict[str, Any]]:
    messages = [case for case in CASES if case.startswith("messages")]
    others = [case for case in CASES if case not in messages]
    return {
        **run_conformance(proxy.url, MODEL, *others, "models_openai", "error_openai", "cost_headers", key=proxy.key),
        **run_conformance(proxy.url, MODEL_OF_MESSAGES, *messages, "error_anthropic", key=proxy.key),
    }


@pytest.mark.parametrize("case", CASES)
def test_sdk_understands(understood: dict[str, dict[str, Any]], case: str) -> None:
    check(case, understood[case])
