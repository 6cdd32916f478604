"""A body that is read as a form makes a real LiteLLM run another model. Through the worker none is read so."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from gateway_client.egress import messages
from tests.support.egress_plane import Plane
from tests.support.embedded_gateway import scripted_upstream
from tests.support.litellm_proxy import MASTER_KEY, MODEL, Proxy, litellm_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

CHEAP, DEAR = MODEL, "dear"
MESSAGES = [{"role": "user", "content": "@say hello"}]
FORM = json.dumps({"model": CHEAP, "x": f"&model={DEAR}&messages=hi&prompt=hi&y="}).encode()
PLAIN = json.dumps({"model": CHEAP, "messages": MESSAGES}).encode()
FORM_TYPE = "application/x-www-form-urlencoded"
JSON_TYPE = "application/json"


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with scripted_upstream() as upstream, litellm_proxy(upstream, {DEAR: "openai"}) as running:
        yield running


def straight(proxy: Proxy, path: str, body: bytes, kind: str) -> str:
    """Call the proxy with the key, as a worker would that copied what it got."""
    request = urllib.request.Request(proxy.url + path, body)  # noqa: S310 - our own loopback URL
    request.add_header("authorization", f"Bearer {proxy.key}")
    request.add_header("content-type", kind)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - as above
            text: str = response.read().decode()
            return text
    except urllib.error.HTTPError as error:
        return error.read().decode()


CHAT = "/v1/chat/completions"
FAILS = [{"role": "user", "content": "@fail 500 no"}]
FELL_BACK = f"Fallback to {DEAR}"
# Each makes LiteLLM 1.106 itself run another model than the one that is granted.
TRICKS: dict[str, tuple[str, str]] = {
    "two models in one text": (CHAT, json.dumps({"model": f"{CHEAP},{DEAR}", "messages": MESSAGES})),
    "the query names another": (f"{CHAT}?model={DEAR}", json.dumps({"model": CHEAP, "messages": MESSAGES})),
    "the query alone names one": (f"{CHAT}?model={DEAR}", json.dumps({"messages": MESSAGES})),
    "a deployment in the path": (
        f"/openai/deployments/{DEAR}/chat/completions", json.dumps({"model": CHEAP, "messages": MESSAGES}),
    ),
    "an engine in the path": (f"/engines/{DEAR}/chat/completions", json.dumps({"model": CHEAP, "messages": MESSAGES})),
    "the key twice": (CHAT, f'{{"model":"{CHEAP}","model":"{DEAR}","messages":{json.dumps(MESSAGES)}}}'),
    "the key twice, escaped": (CHAT, f'{{"model":"{CHEAP}","\\u006dodel":"{DEAR}","messages":{json.dumps(MESSAGES)}}}'),
    "the provider before it": (CHAT, json.dumps({"model": f"openai/{DEAR}", "messages": MESSAGES})),
    "a fallback": (CHAT, json.dumps({"model": CHEAP, "fallbacks": [DEAR], "messages": FAILS})),
}  # fmt: skip


async def through(proxy: Proxy, path: str, body: bytes, kind: str) -> tuple[bytes, Plane]:
    address = proxy.url.removeprefix("http://")
    plane = Plane(
        configuration=messages.Configure(gateway="litellm", host=address, credential=MASTER_KEY),
        dialer_configuration=messages.ConfigureDialer(gateway=address),
    )
    try:
        await plane.start()
        plane.grant(f"llm:{CHEAP}")
        head = (
            f"POST {path} HTTP/1.1\r\nHost: gateway.internal:3128\r\nConnection: close\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return await plane.exchange(head.encode() + body, seconds=40), plane
    finally:
        plane.stop()


def models_run(proxy: Proxy, before: int, *, seconds: float) -> set[Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not any(
        str(each["model"]).endswith(DEAR) for each in proxy.logged()[before:]
    ):
        time.sleep(0.05)
    return {str(each["model"]).removeprefix("openai/") for each in proxy.logged()[before:]}


def test_a_form_does_not_make_the_gateway_run_a_model_that_was_not_granted(proxy: Proxy) -> None:
    path = "/v1/completions"
    before = len(proxy.logged())
    straight(proxy, path, FORM, FORM_TYPE)
    assert DEAR in models_run(proxy, before, seconds=15)  # the twin: LiteLLM itself takes the form's word
    before = len(proxy.logged())
    answer, plane = asyncio.run(through(proxy, path, FORM, FORM_TYPE))
    assert answer.startswith(b"HTTP/1.1 415 ")
    assert plane.asks == []
    asyncio.run(through(proxy, path, FORM, JSON_TYPE))  # the same bytes as what they are judged as
    assert DEAR not in models_run(proxy, before, seconds=1)
    plain, _ = asyncio.run(through(proxy, "/v1/chat/completions", PLAIN, JSON_TYPE))
    assert plain.startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("name", TRICKS)
def test_a_trick_with_its_name_does_not_make_the_gateway_run_another_model(proxy: Proxy, name: str) -> None:
    path, text = TRICKS[name]
    before = len(proxy.logged())
    told = straight(proxy, path, text.encode(), JSON_TYPE)
    # The twin: LiteLLM itself falls for it. It logs a fallback that fails by its first model alone, and tells of it.
    assert FELL_BACK in told or DEAR in models_run(proxy, before, seconds=15)
    before = len(proxy.logged())
    answer, plane = asyncio.run(through(proxy, path, text.encode(), JSON_TYPE))
    assert DEAR not in models_run(proxy, before, seconds=1)
    assert FELL_BACK.encode() not in answer
    # It was let out as the model that is granted, with the scripted answer of that, or not at all.
    let_out = [ask for ask in plane.asks if ask.request.model == CHEAP and ask.request.dialect is not None]
    assert int(answer.split(b" ")[1]) in ({200, 500} if let_out else {400, 403})
