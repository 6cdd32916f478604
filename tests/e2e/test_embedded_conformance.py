"""The official SDKs understand the embedded gateway: three dialects, streaming and not, text and tools, errors."""

from __future__ import annotations

import json
import urllib.request
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


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "slowly"}]}),
        ("/v1/responses", {"input": "slowly"}),
        ("/v1/messages", {"max_tokens": 99, "messages": [{"role": "user", "content": "slowly"}]}),
    ],
)
def test_stream_is_not_held_back(path: str, body: dict[str, Any]) -> None:
    script = {"rules": [{"say": "one two three", "chunk_chars": 4, "chunk_delay_ms": 400}]}
    models = [{"name": "*", "kind": "scripted", "script": "slow"}]
    with EmbeddedGateway(models=models, scripted={"slow": script}) as gateway, Shim(gateway) as shim:
        data = json.dumps({"model": "m", "stream": True, **body}).encode()
        request = urllib.request.Request(shim.url + path, data)  # noqa: S310 - our own loopback URL
        with urllib.request.urlopen(request, timeout=20) as response:  # noqa: S310 - as above
            seen = b""
            while b"one " not in seen:
                seen += response.read1()
            assert b"thre" not in seen, "the first words came with the last"
            assert b"thre" in response.read()
