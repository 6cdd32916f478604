"""Providers behind the embedded gateway: passed through in their own dialects, translated from the others.

The provider is the scripted model over TCP, so what arrives there and comes back is known to the byte.
"""

from __future__ import annotations

import http.server
import json
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from gateway_client.egress.request import Dialect
from gateway_client.gateways.usage import UsageMeter
from tests.support.conformance import CASES, check
from tests.support.embedded_gateway import EmbeddedGateway, Shim, run_conformance, scripted_upstream

if TYPE_CHECKING:
    from collections.abc import Iterator

KEY = "sk-sktest-provider"
PRICE = {"input_usd_per_mtok": 1000, "output_usd_per_mtok": 2000}
PROVIDERS = ("openai", "openai-chat-only", "anthropic")


@pytest.fixture(scope="module")
def shim() -> Iterator[Shim]:
    with scripted_upstream() as upstream:
        common = {"key": KEY, "model": "stockade-scripted", "price": PRICE}
        models = [
            {"name": "openai", "kind": "openai", "url": f"{upstream}/v1", **common},
            {"name": "openai-chat-only", "kind": "openai", "url": f"{upstream}/v1", "responses": False, **common},
            {"name": "anthropic", "kind": "anthropic", "url": upstream, **common},
        ]
        with EmbeddedGateway(models=models) as gateway, Shim(gateway) as running:
            assert gateway.ready["ready"], gateway.ready
            yield running


@pytest.fixture(scope="module")
def understood(shim: Shim) -> dict[str, dict[str, dict[str, Any]]]:
    others = ("error_openai", "error_anthropic", "count_tokens", "cost_headers")
    return {provider: run_conformance(shim.url, provider, *CASES, *others) for provider in PROVIDERS}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_sdk_understands(understood: dict[str, dict[str, dict[str, Any]]], provider: str, case: str) -> None:
    check(case, understood[provider][case])


@pytest.mark.parametrize("provider", PROVIDERS)
def test_providers_error_keeps_status_and_reason(
    understood: dict[str, dict[str, dict[str, Any]]], provider: str
) -> None:
    for sdk in ("openai", "anthropic"):
        answer = understood[provider][f"error_{sdk}"]
        assert answer["status"] == 429
        assert "slow down" in answer["message"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_cost_comes_from_the_operators_price(understood: dict[str, dict[str, dict[str, Any]]], provider: str) -> None:
    assert understood[provider]["cost_headers"] == {
        "x-stockade-cost-usd": "0.0070000000",
        "x-stockade-cost-estimated": "true",
    }


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("include_usage", [True, False])
def test_streamed_chat_says_its_usage_once_and_never_in_an_unasked_chunk(
    shim: Shim, provider: str, *, include_usage: bool
) -> None:
    body: dict[str, Any] = {
        "model": provider,
        "stream": True,
        "messages": [{"role": "user", "content": "@say hello"}],
    }
    if include_usage:
        body["stream_options"] = {"include_usage": True}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{shim.url}/v1/chat/completions", data)  # noqa: S310 - our own loopback URL
    with urllib.request.urlopen(request, timeout=20) as response:  # noqa: S310 - as above
        stream = response.read()
    meter = UsageMeter(Dialect.OPENAI_CHAT, streaming=True)
    meter.feed(stream)
    used = meter.result()
    assert used is not None
    assert (used.input_tokens, used.output_tokens) == (3, 2)
    assert used.cost_usd == pytest.approx(0.007)
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith(b"data: {")]
    assert sum(chunk.get("usage") is not None for chunk in chunks) == 1
    assert (not chunks[-1]["choices"]) == include_usage
    assert stream.endswith(b"data: [DONE]\n\n")


def test_only_the_operators_key_and_chosen_headers_reach_a_provider() -> None:
    seen: list[dict[str, str]] = []

    class Provider(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            seen.append({name.lower(): value for name, value in self.headers.items()})
            answer = b'{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.send_header("Set-Cookie", "session=1")
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Provider) as provider:
        threading.Thread(target=provider.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{provider.server_port}/base/v1"
        models = [{"name": "*", "kind": "openai", "url": url, "key": KEY}]
        with EmbeddedGateway(models=models) as gateway, Shim(gateway) as shim:
            forged = {"Authorization": "Bearer forged", "X-Api-Key": "forged", "X-Forwarded-For": "1.1.1.1",
                      "Cookie": "a=b", "OpenAI-Beta": "kept"}  # fmt: skip
            body = b'{"model":"any","messages":[{"role":"user","content":"x"}]}'
            request = urllib.request.Request(f"{shim.url}/v1/chat/completions", body, forged)  # noqa: S310 - loopback
            with urllib.request.urlopen(request, timeout=20) as response:  # noqa: S310 - as above
                assert response.headers["set-cookie"] is None
        provider.shutdown()
    assert len(seen) == 1
    assert seen[0]["authorization"] == f"Bearer {KEY}"
    assert seen[0]["openai-beta"] == "kept"
    assert seen[0].keys().isdisjoint({"x-api-key", "x-forwarded-for", "cookie"})


def test_provider_that_is_not_there_is_a_502() -> None:
    models = [{"name": "*", "kind": "anthropic", "url": "http://127.0.0.1:9", "key": KEY}]
    with EmbeddedGateway(models=models) as gateway, Shim(gateway) as shim:
        answer = run_conformance(shim.url, "any", "messages_whole_text")["messages_whole_text"]
    assert "502" in answer["error"]
    assert "cannot reach the provider" in answer["error"]
    assert KEY not in answer["error"]


def test_what_cannot_be_translated_is_refused_by_name(shim: Shim) -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    body = {"model": "openai", "max_tokens": 5, "messages": [{"role": "user", "content": [picture]}]}
    request = urllib.request.Request(f"{shim.url}/v1/messages", json.dumps(body).encode())  # noqa: S310 - loopback
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)  # noqa: S310 - as above
    assert refused.value.code == 400
    error = json.loads(refused.value.read())
    assert error["type"] == "error"
    assert "cannot send image" in error["error"]["message"]
