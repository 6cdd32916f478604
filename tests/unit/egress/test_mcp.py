"""The MCP server's reader: what becomes a typed self-service request, what is answered, and what neither grants."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway_client.egress import mcp
from gateway_client.egress.decide import Refuse, Reply


def read(message: object, *, version: str | None = None, origin: str | None = None) -> mcp.Answered | mcp.Call:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    return mcp.read(body, version=version, origin=origin)


def request(method: str, params: dict[str, Any] | None = None, message_id: object = 1) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": message_id, "method": method, **({} if params is None else {"params": params})}


def tool(name: str, arguments: object = None) -> mcp.Answered | mcp.Call:
    return read(request("tools/call", {"name": name, **({} if arguments is None else {"arguments": arguments})}))


def error(answer: mcp.Answered | mcp.Call) -> tuple[int, int]:
    assert isinstance(answer, mcp.Answered)
    return answer.status, json.loads(answer.body)["error"]["code"]


@pytest.mark.parametrize("wanted", [*mcp.VERSIONS, "2024-11-05", "2026-07-28", 7, None])
def test_the_greeting_agrees_on_a_version_it_knows(wanted: object) -> None:
    answer = read(request("initialize", {"protocolVersion": wanted}))
    assert isinstance(answer, mcp.Answered)
    result = json.loads(answer.body)["result"]
    assert result["protocolVersion"] == (wanted if wanted in mcp.VERSIONS else mcp.VERSIONS[0])
    assert result["capabilities"] == {"tools": {"listChanged": False}}


def test_no_tool_grants() -> None:
    answer = read(request("tools/list"))
    assert isinstance(answer, mcp.Answered)
    tools = json.loads(answer.body)["result"]["tools"]
    assert {each["name"] for each in tools} == {"my_scopes", "request_scope", "wait_for_request", "my_budget"}
    assert all(each["inputSchema"]["additionalProperties"] is False for each in tools)
    for name in ("approve", "grant", "approve_request", "deny", "request_scope ", "", None):
        assert error(read(request("tools/call", {"name": name}))) == (200, mcp.INVALID_PARAMS)


def test_each_tool_is_one_typed_request() -> None:
    calls = [
        tool("my_scopes"),
        tool("my_scopes", {"after": "gr_1&x=y"}),
        tool("my_budget", {}),
        tool("request_scope", {"scope": "llm:*", "reason": "w\ud800hy"}),
        tool("wait_for_request", {"request_id": "rq_1"}),
        tool("wait_for_request", {"request_id": "rq_1", "wait_seconds": 5}),
    ]
    assert all(isinstance(call, mcp.Call) for call in calls)
    said = [(c.method, c.path, c.query, c.body) for c in calls if isinstance(c, mcp.Call)]
    assert said == [
        ("GET", "/.stockade/v1/scopes", "", ""),
        ("GET", "/.stockade/v1/scopes", "after=gr_1%26x%3Dy", ""),
        ("GET", "/.stockade/v1/budget", "", ""),
        ("POST", "/.stockade/v1/requests", "", '{"scope": "llm:*", "reason": "w\\ud800hy"}'),
        ("GET", "/.stockade/v1/requests/rq_1", "wait=30s", ""),
        ("GET", "/.stockade/v1/requests/rq_1", "wait=5s", ""),
    ]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("my_budget", {"more": 1}),
        ("my_budget", []),
        ("my_scopes", {"after": 7}),
        ("my_scopes", {"after": "x" * 65}),
        ("request_scope", {"scope": "llm:*"}),
        ("request_scope", {"scope": "", "reason": "x"}),
        ("request_scope", {"scope": ["llm:*"], "reason": "x"}),
        ("request_scope", {"scope": "x" * 2049, "reason": "x"}),
        ("request_scope", {"scope": "llm:*", "reason": "x" * 501}),
        ("request_scope", {"scope": "llm:*", "reason": "x", "ttl": 1}),
        ("wait_for_request", {"request_id": "../scopes"}),
        ("wait_for_request", {"request_id": "rq_1/approve"}),
        ("wait_for_request", {"request_id": "rq_1", "wait_seconds": 61}),
        ("wait_for_request", {"request_id": "rq_1", "wait_seconds": -1}),
        ("wait_for_request", {"request_id": "rq_1", "wait_seconds": True}),
        ("wait_for_request", {"request_id": "rq_1", "wait_seconds": 1.5}),
    ],
)
def test_arguments_are_exactly_these(name: str, arguments: object) -> None:
    assert error(tool(name, arguments)) == (200, mcp.INVALID_PARAMS)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", mcp.PARSE_ERROR),
        (b"{", mcp.PARSE_ERROR),
        (b"\xff", mcp.PARSE_ERROR),
        (b"[" * 16000, mcp.PARSE_ERROR),
        (b'{"jsonrpc": "2.0", "id": NaN, "method": "ping"}', mcp.PARSE_ERROR),
        (b'{"jsonrpc": "2.0", "id": 1, "id": 2, "method": "ping"}', mcp.PARSE_ERROR),
        (b"[]", mcp.INVALID_REQUEST),
        (b'[{"jsonrpc": "2.0", "id": 1, "method": "ping"}]', mcp.INVALID_REQUEST),
        (b'{"id": 1, "method": "ping"}', mcp.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": null, "method": "ping"}', mcp.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": true, "method": "ping"}', mcp.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": {}, "method": "ping"}', mcp.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": 1, "method": 2}', mcp.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": []}', mcp.INVALID_REQUEST),
        (b'{"jsonrpc": "2.0", "id": 1}', mcp.INVALID_REQUEST),
        (json.dumps(request("ping", message_id="x" * 129)).encode(), mcp.INVALID_REQUEST),
        (json.dumps(request("ping", message_id=1 << 63)).encode(), mcp.INVALID_REQUEST),
    ],
)
def test_what_is_no_message_is_400(body: bytes, code: int) -> None:
    assert error(read(body)) == (400, code)


def test_notifications_and_answers_want_none() -> None:
    for message in (
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 1, "result": {}},
        {"jsonrpc": "2.0", "method": "tools/call", "params": {"name": "request_scope"}},
    ):
        assert read(message) == mcp.Answered(202)


def test_unknown_methods_versions_and_origins() -> None:
    assert error(read(request("server/discover"))) == (200, mcp.METHOD_NOT_FOUND)
    assert error(read(request("ping"), version="2026-07-28")) == (400, mcp.UNSUPPORTED_VERSION)
    assert error(read(request("ping"), origin="http://evil.example")) == (403, mcp.INVALID_REQUEST)
    good = read(request("ping", message_id="a"), version=mcp.VERSIONS[1], origin=mcp.ORIGINS[0])
    assert good == mcp.Answered(200, b'{"jsonrpc": "2.0", "id": "a", "result": {}}')


def test_what_the_daemon_says_is_the_result_and_a_refusal_the_tools_error() -> None:
    call = tool("my_budget")
    assert isinstance(call, mcp.Call)
    good = json.loads(call.answer(Reply(200, {"requests_left": 3})).body)["result"]
    assert (good["isError"], good["structuredContent"]) == (False, {"requests_left": 3})
    assert json.loads(good["content"][0]["text"]) == {"requests_left": 3}
    bad = json.loads(call.answer(Refuse(429, "limit", "too many")).body)["result"]
    assert (bad["isError"], bad["structuredContent"]) == (True, {"reason_code": "limit", "detail": "too many"})
