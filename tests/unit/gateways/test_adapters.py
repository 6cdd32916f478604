"""Who the agent is goes into headers it cannot break out of; what the gateway says it cost is read with care."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress.messages import Usage
from gateway_client.egress.upstream import Identity
from gateway_client.gateways.adapters import ADAPTERS, adapter

ANY_TEXT = st.text(max_size=40)


@given(ANY_TEXT, ANY_TEXT, st.dictionaries(ANY_TEXT, ANY_TEXT, max_size=40))
def test_litellm_identity_holds_no_separator(agent_id: str, name: str, labels: dict[str, str]) -> None:
    headers = dict(adapter("litellm").request_headers(Identity(agent_id, name, labels), "sk-1"))
    for key, value in headers.items():
        assert value.isascii()
        assert value.isprintable()
        assert "," not in value or key == "x-litellm-tags"
    tags = headers["x-litellm-tags"].split(",")
    assert tags[0] == "stockade"
    assert tags[1].startswith("agent:")
    assert all(tag.startswith("label:") for tag in tags[2:])
    assert len(tags) == min(32, 2 + len(labels))


@pytest.mark.parametrize("kind", ["litellm", "openai"])
def test_credential_is_in_both_places_an_sdk_may_have_put_a_placeholder(kind: str) -> None:
    headers = adapter(kind).request_headers(Identity("ag_1", "n"), "sk-1")
    assert ("authorization", "Bearer sk-1") in headers
    assert ("x-api-key", "sk-1") in headers
    assert not [header for header in adapter(kind).request_headers(Identity("ag_1", "n"), "") if "sk" in header[1]]


@pytest.mark.parametrize(
    ("kind", "headers", "expected"),
    [
        ("litellm", [("X-LiteLLM-Response-Cost", "0.007")], Usage(cost_usd=0.007)),
        ("litellm", [("x-litellm-response-cost", "None")], None),
        ("litellm", [("x-litellm-response-cost", "nan")], None),
        ("litellm", [("x-litellm-response-cost", "inf")], None),
        ("litellm", [("x-litellm-response-cost", "-1")], None),
        ("litellm", [], None),
        ("embedded", [("x-stockade-cost-usd", "0.5"), ("x-stockade-cost-estimated", "true")],
         Usage(cost_usd=0.5, estimated=True)),
        ("embedded", [("x-stockade-cost-usd", "0.5"), ("x-stockade-cost-estimated", "false")], Usage(cost_usd=0.5)),
        ("embedded", [("x-litellm-response-cost", "0.5")], None),
        ("openai", [("x-litellm-response-cost", "0.5")], None),
    ],
)  # fmt: skip
def test_cost_is_read_from_the_gateways_own_header(
    kind: str, headers: list[tuple[str, str]], expected: Usage | None
) -> None:
    assert adapter(kind).usage_from(headers) == expected


def test_unknown_kind_names_the_known() -> None:
    with pytest.raises(LookupError, match="embedded, litellm, openai"):
        adapter("litelm")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_path_stays(kind: str) -> None:
    assert adapter(kind).map_path("/v1/messages") == "/v1/messages"


def test_guardrails_that_litellm_ran_are_read_from_its_header() -> None:
    headers = [("X-LiteLLM-Applied-Guardrails", "presidio-pii, block\tx,,")]
    assert adapter("litellm").guardrails_from(headers) == "presidio-pii,block_x"
    for kind in ("embedded", "openai"):
        assert adapter(kind).guardrails_from(headers) == ""
