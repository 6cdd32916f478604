"""An agent on the OpenAI Agents SDK works its tools through the embedded gateway, over both of its APIs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.support.embedded_gateway import AGENTS_PYTHON, EmbeddedGateway, Shim

CLIENT = Path(__file__).parents[1] / "support" / "agents_sdk_client.py"


@pytest.mark.parametrize("api", ["responses", "chat"])
def test_agent_calls_its_tool_and_answers(api: str) -> None:
    with EmbeddedGateway() as gateway, Shim(gateway) as shim:
        command = [str(AGENTS_PYTHON), "-I", str(CLIENT), shim.url, "any-model", api]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["calls"] == [{"word": "a", "depth": 3}, {"word": "b", "depth": 1}]
    assert said["answer"].startswith("[scripted model] 2 tool results")
