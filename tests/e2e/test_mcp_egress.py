"""MCP servers behind the gateway: the official SDK on both ends, and what an agent cannot do to them."""

from __future__ import annotations

import http.client
import json
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gateway_client.gateways import preface as prefaces
from tests.support.embedded_gateway import AGENTS_PYTHON, EmbeddedGateway
from tests.support.instance import Instance

if TYPE_CHECKING:
    from collections.abc import Iterator

SUPPORT = Path(__file__).parents[1] / "support"
KEY = "mcp-sktest-key"
SDKS = AGENTS_PYTHON.parents[1]
NO_MODELS = {"no-models.yaml": "kind: Policy\nname: no-models\nversion: 1\nextends: default\nscopes: []\n"}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Run the server; yields its URL."""
    process = subprocess.Popen(
        [AGENTS_PYTHON, "-I", SUPPORT / "mcp_server.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def stockade(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    key = tmp_path_factory.mktemp("mcp") / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    toml = f'[[gateway.mcp]]\nname = "weather"\nurl = "{server}"\ncredential_file = "{key}"\n'
    with Instance.start(toml, policies=NO_MODELS) as running:
        yield running


def used(stockade: Instance, name: str, *scopes: str) -> dict[str, Any]:
    """Run the SDK's client in a sandbox."""
    workspace = stockade.workspace(**{"client.py": (SUPPORT / "mcp_user.py").read_text()})
    given = [word for scope in (f"fs:ro:{SDKS}=/opt/agents", *scopes) for word in ("--scope", scope)]
    done = stockade.run(
        "exec /opt/agents/bin/python -I client.py $STOCKADE_GATEWAY_URL/mcp/weather",
        "--name", name, "--workspace", f"{workspace}:ro", "--policy", "no-models", *given, seconds=60,
    )  # fmt: skip
    assert done.code == 0, done.err + done.out
    told: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    return told


def test_an_agent_calls_the_tools_it_was_granted_and_sees_no_others(stockade: Instance) -> None:
    told = used(stockade, "mcp-one", "mcp:weather/get_*")
    assert told["tools"] == ["get_weather"]
    assert told["weather"].startswith("Oslo: sunny")
    assert told["delete"].startswith("refused")
    assert told["resource"].startswith("refused")
    entries = stockade.actions("mcp-one", "--verb", "egress.request")
    judged = {each["object"]: each["verdict"] for each in entries}
    assert judged["POST mcp:weather tools/call get_weather"] == "allowed"
    assert judged["POST mcp:weather tools/call delete_everything"] == "denied"
    denied = next(each for each in entries if each["verdict"] == "denied")
    assert denied["details"]["scope"] == "mcp:weather/delete_everything"
    assert KEY not in json.dumps(stockade.actions("mcp-one"))


def test_all_of_it_with_the_scopes_for_all_of_it(stockade: Instance) -> None:
    told = used(stockade, "mcp-all", "mcp:weather/*", "mcp:weather/resources/*")
    assert told["tools"] == ["get_weather", "delete_everything"]
    assert (told["delete"], told["resource"]) == ("deleted", "a secret note")


# --- the gateway by itself: what a worker that was taken over would meet


@pytest.fixture(scope="module")
def gateway(server: str) -> Iterator[EmbeddedGateway]:
    with EmbeddedGateway(mcp=[{"name": "weather", "url": server, "key": KEY}]) as running:
        assert running.ready["ready"], running.ready
        yield running


def ask(
    gateway: EmbeddedGateway, agent: str, method: str, *, tools: str = "get_*", session: str = "", **params: Any
) -> tuple[int, str, str]:
    """Send one message straight to the gateway with a preface; give status, session and body."""
    allow = prefaces.parse_allow(f"mcp:weather:{tools}")
    first = prefaces.encode(prefaces.Preface("ag_" + agent * 26, agent, 1, allow))
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
    connection = http.client.HTTPConnection("gateway.internal")
    connection.sock = gateway.connect(preface=first)
    headers = {"content-type": "application/json", "accept": "application/json, text/event-stream"}
    if session:
        headers |= {"mcp-session-id": session, "mcp-protocol-version": "2025-11-25"}
    connection.request("POST", "/mcp/weather", body, headers)
    answer = connection.getresponse()
    said = answer.status, answer.headers.get("mcp-session-id", ""), answer.read().decode()
    connection.close()
    return said


def begin(gateway: EmbeddedGateway, agent: str) -> str:
    client = {"name": "t", "version": "1"}
    status, session, text = ask(
        gateway, agent, "initialize", protocolVersion="2025-11-25", capabilities={}, clientInfo=client
    )
    assert status == 200, text
    assert session, "the server keeps sessions"
    ask(gateway, agent, "notifications/initialized", session=session)
    return session


def test_a_session_is_its_agents_alone(gateway: EmbeddedGateway) -> None:
    session = begin(gateway, "a")
    assert ask(gateway, "a", "tools/list", session=session)[0] == 200
    assert ask(gateway, "b", "tools/list", session=session)[0] == 404
    assert ask(gateway, "a", "tools/list", session="guessed")[0] == 404


def test_the_gateway_holds_to_the_tools_of_the_preface(gateway: EmbeddedGateway) -> None:
    session = begin(gateway, "a")
    status, _, text = ask(gateway, "a", "tools/call", session=session, name="get_weather", arguments={"city": "Rome"})
    assert (status, "Rome: sunny" in text) == (200, True)
    status, _, text = ask(gateway, "a", "tools/call", session=session, name="delete_everything", arguments={})
    assert (status, "deleted" in text) == (403, False)
    _, _, text = ask(gateway, "a", "tools/list", session=session)
    assert "get_weather" in text
    assert "delete_everything" not in text
    assert KEY not in text
