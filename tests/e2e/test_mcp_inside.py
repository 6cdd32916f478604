"""The self-service MCP server as the official SDK's client sees it from inside a sandbox, and as raw bytes meet it."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.embedded_gateway import AGENTS_PYTHON
from tests.support.instance import Instance
from tests.support.people import pending, root

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stockade.client import Stockade

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

PROGRAM = Path(__file__).parents[1] / "support" / "mcp_client.py"
SDKS = AGENTS_PYTHON.parents[1]
SCOPE = "http:GET:http://status.example/**"
TOOLS = ["my_budget", "my_scopes", "request_scope", "wait_for_request"]


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start() as instance:
        yield instance


@pytest.fixture(scope="module")
def client(stockade: Instance) -> Iterator[Stockade]:
    with root(stockade) as client:
        yield client


@pytest.mark.parametrize("mode", ["auto", "legacy"])
@pytest.mark.parametrize("answer", ["approve", "deny"])
def test_the_official_client_asks_waits_and_is_answered(
    stockade: Instance, client: Stockade, mode: str, answer: str
) -> None:
    assert AGENTS_PYTHON.exists(), "run ./bootstrap test (tests/e2e/requirements-agents.txt)"
    name = f"asker-{mode}-{answer}"

    def decide() -> None:
        request = pending(stockade, client, name)
        assert (request.scope, request.reason) == (SCOPE, "to read the status page")
        if answer == "approve":
            client.approve(request.request_id, digest=request.digest, ttl=60)
        else:
            client.deny(request.request_id, "not today")

    workspace = stockade.workspace(**{"client.py": PROGRAM.read_text()})
    human = threading.Thread(target=decide)
    human.start()
    done = stockade.run(
        f"exec /opt/agents/bin/python -I client.py $STOCKADE_GATEWAY_URL/.stockade/mcp {mode} '{SCOPE}'",
        "--name", name, "--workspace", f"{workspace}:ro", "--scope", f"fs:ro:{SDKS}=/opt/agents",
        "--budget", "tokens=1000", seconds=60,
    )  # fmt: skip
    human.join()
    assert done.code == 0, done.err[-3000:]
    steps: dict[str, Any] = {line.pop("step"): line for line in map(json.loads, done.out.splitlines())}
    assert steps["connected"] == {"version": "2025-11-25", "server": "stockade"}
    assert steps["tools"]["names"] == TOOLS
    assert "llm:*" in [each["scope"] for each in steps["scopes"]["said"]["scopes"]]
    assert steps["budget"]["said"]["llm_tokens_left"] == 1000
    assert steps["asked"]["said"]["state"] == "pending"
    waited = steps["waited"]["said"]
    if answer == "approve":
        assert (waited["state"], bool(waited["grant_id"])) == ("approved", True)
    else:
        assert (waited["state"], waited["grant_id"], waited["reason"]) == ("denied", None, "not today")
    assert steps["refused"]["error"] is True
    assert steps["refused"]["said"]["reason_code"] == "bad_request"
    created = list(client.actions(name, verb="request.create"))
    assert [step.object for step in created] == [SCOPE]


def test_what_is_no_message_is_answered_and_harms_nothing(client: Stockade) -> None:
    agent = client.launch(["sleep", "1000"], name="raw")
    post = "curl -sS -m 10 -o /dev/null -w '%{http_code} ' $STOCKADE_GATEWAY_URL/.stockade/mcp"
    script = "; ".join([
        f"{post} -X GET",
        f"{post} -X DELETE",
        f"{post} -d '{{'",
        f"{post} -d '[]'",
        f"head -c 20000 /dev/zero | tr '\\0' '[' | {post} --data-binary @-",
        f"head -c 16000 /dev/zero | tr '\\0' '[' | {post} --data-binary @-",
        f"{post} -H 'Origin: http://evil.example' -d '{{\"jsonrpc\": \"2.0\", \"id\": 1, \"method\": \"ping\"}}'",
        f"{post} -d '{{\"jsonrpc\": \"2.0\", \"id\": 1, \"method\": \"ping\"}}'",
    ])  # fmt: skip
    codes = agent.exec(["sh", "-c", script]).stdout.decode().split()
    assert codes == ["405", "405", "400", "400", "413", "400", "403", "200"]
