"""Whom a real LiteLLM proxy bills: the agent the adapter names, whatever the agent's own request says.

The calls are recorded inside the proxy by a callback, so what is asserted is LiteLLM's belief, not our headers.
"""

from __future__ import annotations

import json
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from gateway_client.egress.request import Dialect
from gateway_client.egress.upstream import Identity
from gateway_client.gateways.adapters import adapter
from gateway_client.gateways.usage import UsageMeter
from tests.support.embedded_gateway import scripted_upstream
from tests.support.litellm_proxy import MODEL, MODEL_OF_MESSAGES, Proxy, litellm_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gateway_client.egress.messages import Usage

AGENT = Identity("ag_" + "b" * 26, "log-reader", {"team": "obs,forged-tag", "env": "test"})
PATHS = {
    Dialect.OPENAI_CHAT: "/v1/chat/completions",
    Dialect.OPENAI_RESPONSES: "/v1/responses",
    Dialect.ANTHROPIC_MESSAGES: "/v1/messages",
}
RECORD_SECONDS_MAX = 15


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with scripted_upstream() as upstream, litellm_proxy(upstream) as running:
        yield running


def body_of(dialect: Dialect, *, stream: bool, text: str = "@say hello", **more: Any) -> dict[str, Any]:
    model = MODEL_OF_MESSAGES if dialect is Dialect.ANTHROPIC_MESSAGES else MODEL
    asked: dict[str, Any] = {"model": model, "stream": stream, **more}
    if dialect is Dialect.OPENAI_RESPONSES:
        return {**asked, "input": text}
    if dialect is Dialect.OPENAI_CHAT and stream:
        asked["stream_options"] = {"include_usage": True}
    return {**asked, "messages": [{"role": "user", "content": text}], "max_tokens": 100}


def call(proxy: Proxy, dialect: Dialect, body: dict[str, Any], headers: Sequence[tuple[str, str]]) -> Usage:
    """Make one call and measure it the way the worker does."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(proxy.url + PATHS[dialect], data, dict(headers))  # noqa: S310 - our own loopback URL
    request.add_header("content-type", "application/json")
    meter = UsageMeter(dialect, body["stream"], model=body["model"], request_bytes=len(data))
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - as above
        said = adapter("litellm").usage_from(list(response.headers.items()))
        while piece := response.read1(65536):
            meter.feed(piece)
    used = meter.result(cost_usd=said.cost_usd if said else None)
    assert used is not None
    return used


def recorded(proxy: Proxy, before: int) -> dict[str, Any]:
    """Return the call that the proxy noted after `before` others; it does so after it has answered."""
    deadline = time.monotonic() + RECORD_SECONDS_MAX
    while len(proxy.logged()) <= before:
        assert time.monotonic() < deadline, "the proxy recorded no call"
        time.sleep(0.05)
    return proxy.logged()[-1]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("dialect", PATHS)
def test_proxy_believes_the_adapter(proxy: Proxy, dialect: Dialect, *, stream: bool) -> None:
    before = len(proxy.logged())
    forged = body_of(dialect, stream=stream, user="somebody-else", metadata={"user_id": "somebody-else"})
    call(proxy, dialect, forged, adapter("litellm").request_headers(AGENT, proxy.key))
    noted = recorded(proxy, before)
    assert noted["end_user"] == "log-reader"
    assert noted["session"] == AGENT.agent_id
    assert {"stockade", "agent:log-reader", "label:env=test", "label:team=obs_forged-tag"} <= set(noted["tags"])
    assert "forged-tag" not in noted["tags"]


def test_without_the_adapter_the_body_is_believed(proxy: Proxy) -> None:
    before = len(proxy.logged())
    forged = body_of(Dialect.OPENAI_CHAT, stream=False, user="somebody-else")
    call(proxy, Dialect.OPENAI_CHAT, forged, [("authorization", f"Bearer {proxy.key}")])
    assert recorded(proxy, before)["end_user"] == "somebody-else"


def test_wrong_key_is_refused(proxy: Proxy) -> None:
    with pytest.raises(urllib.error.HTTPError, match=r"40[01]"):
        call(proxy, Dialect.OPENAI_CHAT, body_of(Dialect.OPENAI_CHAT, stream=False),
             adapter("litellm").request_headers(AGENT, "sk-wrong"))  # fmt: skip


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("dialect", PATHS)
def test_tokens_and_cost_are_what_the_proxy_charges(proxy: Proxy, dialect: Dialect, *, stream: bool) -> None:
    before = len(proxy.logged())
    used = call(proxy, dialect, body_of(dialect, stream=stream),
                adapter("litellm").request_headers(AGENT, proxy.key))  # fmt: skip
    assert (used.input_tokens, used.output_tokens) == (3, 2)
    charged = recorded(proxy, before)["cost"]
    assert charged == pytest.approx(0.007)
    assert used.cost_usd == pytest.approx(charged)
    assert not used.estimated
