"""Messages to MCP servers: what is read is what is sent, and a scope covers what it says and no more."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress import mcpcall as mcp
from gateway_client.egress.bodyjson import BadCall
from gateway_client.egress.decide import AgentView, Allow, GrantView, Refuse, Upstream, decide, mcp_globs
from gateway_client.egress.request import EgressRequest, Form
from gateway_client.egress.scope import includes, missing_scope, parse_scope


def call(method: str, **params: Any) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()


def request(method: str, tool: str = "", server: str = "git") -> EgressRequest:
    return EgressRequest(
        Form.MCP,
        "POST",
        "http",
        "gateway.internal",
        3128,
        f"/mcp/{server}",
        server=server,
        rpc_method=method,
        tool=tool,
    )


def judged(asked: EgressRequest, *scopes: str, uses_left: int | None = None) -> Allow | Refuse:
    grants = tuple(GrantView(f"gr_{n}", parse_scope(scope), uses_left=uses_left) for n, scope in enumerate(scopes))
    view = AgentView("ag_1", "a", "p", "RUNNING", grants=grants, mcp_servers=("git", "files"))
    verdict = decide(asked, view, now=1.0)
    assert isinstance(verdict, Allow | Refuse)
    return verdict


@pytest.mark.parametrize(
    ("body", "method", "name"),
    [
        (call("initialize", protocolVersion="2025-11-25"), "initialize", ""),
        (call("tools/list"), "tools/list", ""),
        (call("tools/call", name="read_file", arguments={"name": "other"}), "tools/call", "read_file"),
        (call("resources/read", uri="file:///a b"), "resources/read", "resources/file:///a b"),
        (call("resources/list"), "resources/list", "resources/"),
        (call("prompts/get", name="p"), "prompts/get", "prompts/p"),
        (b'{"jsonrpc":"2.0","id":"x","result":{}}', "", ""),
        (b'{"jsonrpc":"2.0","method":"notifications/initialized"}', "notifications/initialized", ""),
    ],
)
def test_messages_are_read(body: bytes, method: str, name: str) -> None:
    message = mcp.read_message(body)
    assert (message.method, message.name) == (method, name)
    assert json.loads(message.body) == json.loads(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"[%b]" % call("ping"),
        b'{"jsonrpc":"2.0","id":1,"method":"ping","method":"tools/call","params":{"name":"rm"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"ok","name":"rm"}}',
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"ok","na\\u006de":"rm"}}',
        b'{"jsonrpc":"1.0","id":1,"method":"ping"}',
        b'{"jsonrpc":"2.0","id":1.5,"method":"ping"}',
        b'{"jsonrpc":"2.0","id":true,"method":"ping"}',
        b'{"jsonrpc":"2.0","id":1}',
        b'{"jsonrpc":"2.0","id":1,"result":{},"error":{}}',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","result":{}}',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":[]}',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":NaN}}',
        call("tools/call"),
        call("tools/call", name="a b"),
        call("tools/call", name="x" * 129),
        call("resources/read", uri="a\nb"),
        call("tasks/list"),
        call("TOOLS/CALL", name="x"),
        call("unknown"),
        b"[" * 100_000,
    ],
)
def test_what_is_no_single_known_message_is_refused(body: bytes) -> None:
    with pytest.raises(BadCall):
        mcp.read_message(body)


@given(st.text(max_size=20), st.text(max_size=20))
def test_what_is_sent_names_what_was_decided(method: str, name: str) -> None:
    try:
        message = mcp.read_message(call(method, name=name, uri=name))
    except BadCall:
        return
    sent = json.loads(message.body)
    assert sent["method"] == message.method
    assert message.method in mcp.SESSION or message.shown in ("", sent["params"]["name"])


def test_mirrored_headers_say_what_was_decided_and_others_stay() -> None:
    headers = ((b"mcp-method", b"ping"), (b"mcp-name", b"harmless"), (b"authorization", b"x"), (b"accept", b"*/*"),
               (b"x-litellm-key", b"x"), (b"cookie", b"x"))  # fmt: skip
    message = mcp.read_message(call("tools/call", name="rm"))
    assert mcp.outgoing(headers, message) == [
        (b"accept", b"*/*"), (b"mcp-method", b"tools/call"), (b"mcp-name", b"rm")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("scope", "method", "tool", "allowed"),
    [
        ("mcp:git/log", "tools/call", "log", True),
        ("mcp:git/log", "tools/call", "log2", False),
        ("mcp:git/log", "tools/call", "LOG", False),
        ("mcp:git/log", "initialize", "", True),
        ("mcp:git/log", "tools/list", "", True),
        ("mcp:files/*", "initialize", "", False),
        ("mcp:git/*", "tools/call", "push", True),
        ("mcp:git/*", "resources/read", "resources/file:///etc/passwd", False),
        ("mcp:git/*", "resources/list", "resources/", False),
        ("mcp:git/*", "prompts/get", "prompts/p", False),
        ("mcp:git/resources/*", "resources/read", "resources/file:///x", True),
        ("mcp:git/resources/*", "tools/call", "log", False),
        ("mcp:git/res*", "resources/list", "resources/", False),
        ("llm:*", "initialize", "", False),
    ],
)
def test_a_scope_covers_what_it_says(scope: str, method: str, tool: str, allowed: bool) -> None:  # noqa: FBT001
    verdict = judged(request(method, tool), scope)
    assert isinstance(verdict, Allow) is allowed
    if isinstance(verdict, Allow):
        assert verdict.upstream is Upstream.MCP
        assert verdict.counted is (method not in mcp.SESSION)
    elif tool:
        assert isinstance(judged(request(method, tool), missing_scope(request(method, tool))), Allow)


def test_sessions_use_no_use_of_a_grant_and_calls_do() -> None:
    assert isinstance(judged(request("tools/list"), "mcp:git/log", uses_left=0), Allow)
    refused = judged(request("tools/call", "log"), "mcp:git/log", uses_left=0)
    assert isinstance(refused, Refuse)
    assert refused.reason_code == "grant_used_up"


def test_a_server_that_is_not_configured_is_not_there() -> None:
    refused = judged(request("initialize", server="other"), "mcp:other/*")
    assert isinstance(refused, Refuse)
    assert refused.status == 404


def test_tools_do_not_include_resources() -> None:
    assert includes(parse_scope("mcp:git/*"), parse_scope("mcp:git/log"))
    assert not includes(parse_scope("mcp:git/*"), parse_scope("mcp:git/resources/*"))
    assert includes(parse_scope("mcp:git/resources/*"), parse_scope("mcp:git/resources/a"))


def test_the_gateway_is_told_of_live_grants_on_that_server() -> None:
    grants = (
        GrantView("a", parse_scope("mcp:git/log")), GrantView("b", parse_scope("mcp:git/old"), expires_at=1.0),
        GrantView("c", parse_scope("mcp:files/*")), GrantView("d", parse_scope("mcp:git/once"), uses_left=0),
    )  # fmt: skip
    view = AgentView("ag_1", "a", "p", "RUNNING", grants=grants)
    assert mcp_globs("git", view, now=2.0) == ("log", "once")
