"""Real coding agents finish a job inside, as they are shipped, through the embedded gateway and a real LiteLLM.

The model is scripted (it stands at the far end, where a provider would), the agents are not: each reads a file, runs a
shell and writes a file by its own tools. Exit code 0 proves nothing of an agent, so what counts is what it wrote.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from tests.support.embedded_gateway import AGENTS_PYTHON, scripted_upstream
from tests.support.instance import OWNER, Instance
from tests.support.litellm_proxy import MASTER_KEY, litellm_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

NPM: Final = Path(__file__).resolve().parents[2] / ".node-agents" / "node_modules"
TASK: Final = "Read input.txt and write result.md."
SHELL: Final = "(cat input.txt; id -u) > seen.txt"
SDK_AGENT: Final = f"""
import asyncio, pathlib, subprocess
from agents import Agent, Runner, function_tool
@function_tool
def shell(command: str) -> str:
    "Run a command."
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=False).stdout
@function_tool
def write(name: str, text: str) -> str:
    "Write a file."
    pathlib.Path(name).write_text(text)
    return "written"
agent = Agent(name="worker", model="gpt-5-sdk", instructions="Use the tools.", tools=[shell, write])
print(asyncio.run(Runner.run(agent, {TASK!r})).final_output)
"""


@dataclass(frozen=True, slots=True)
class Job:
    """How one agent is started, with what the scripted model answers to it, by the tools that it offers."""

    policy: str
    mounts: str
    command: tuple[str, ...]
    model: str
    vendor: str
    tools: tuple[str, ...]
    calls: tuple[dict[str, Any], ...]
    phones: tuple[str, ...]  # where it calls besides the model, whatever it is told


WRITTEN: Final = "# The result\n"
WRITE_BY_SHELL: Final = "printf '# The result\\n' > result.md"
JOBS: Final = {
    "claude-code": Job(
        policy="claude-code",
        mounts=f"fs:ro:{NPM}/@anthropic-ai/claude-code-linux-x64=/opt/agent",
        command=("/opt/agent/claude", "-p", TASK, "--dangerously-skip-permissions", "--model", "claude-sonnet-4-5"),
        model="claude-sonnet-4-5",
        vendor="anthropic",
        tools=("Bash", "Write"),
        calls=(
            {"name": "Bash", "arguments": {"command": SHELL, "description": "look"}},
            {"name": "Write", "arguments": {"file_path": "/workspace/result.md", "content": WRITTEN}},
        ),
        phones=(),
    ),
    "codex": Job(
        policy="codex",
        mounts=f"fs:ro:{NPM}/@openai/codex-linux-x64/vendor/x86_64-unknown-linux-musl=/opt/agent",
        command=("/opt/agent/bin/codex", "exec", "--skip-git-repo-check", "-m", "gpt-5-codex", TASK),
        model="gpt-5-codex",
        vendor="openai",
        tools=("exec_command",),
        calls=(
            {"name": "exec_command", "arguments": {"cmd": SHELL}},
            {"name": "exec_command", "arguments": {"cmd": WRITE_BY_SHELL}},
        ),
        phones=("github.com:443", "chatgpt.com:443"),
    ),
    "agents-sdk": Job(
        policy="python-agent",
        mounts=f"fs:ro:{AGENTS_PYTHON.parents[1]}=/opt/agent",
        command=("/opt/agent/bin/python", "-c", SDK_AGENT),
        model="gpt-5-sdk",
        vendor="openai",
        tools=("shell", "write"),
        calls=(
            {"name": "shell", "arguments": {"command": SHELL}},
            {"name": "write", "arguments": {"name": "result.md", "text": WRITTEN}},
        ),
        phones=("api.openai.com:443",),  # traces of its runs, unless they are switched off
    ),
}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rules: list[dict[str, Any]] = [
        {
            "when": {"tools": list(job.tools), "model": job.model},
            "steps": [*({"call": [call]} for call in job.calls), {"say": "All done."}],
        }
        for job in JOBS.values()
    ]
    path = tmp_path_factory.mktemp("script") / "script.json"
    path.write_text(json.dumps({"rules": [*rules, {"steps": [{"say": "A title"}]}]}))
    for directory in (path, *path.parents[:3]):
        directory.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def embedded(script: Path) -> Iterator[Instance]:
    model = f'[[gateway.models]]\nname = "*"\nkind = "scripted"\nscript = "{script}"\n'
    with Instance.start(f'[gateway]\nkind = "embedded"\n{model}') as instance:
        yield instance


@pytest.fixture(scope="module")
def litellm(script: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    key = tmp_path_factory.mktemp("gateway") / "gateway.key"
    key.write_text(f"{MASTER_KEY}\n")
    key.chmod(0o600)
    names = {job.model: job.vendor for job in JOBS.values()}
    with scripted_upstream("--script", str(script)) as upstream, litellm_proxy(upstream, names) as proxy:
        text = f'[gateway]\nkind = "litellm"\nurl = "{proxy.url}"\ncredential_file = "{key}"\n'
        with Instance.start(text) as instance:
            yield instance


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("gateway", ["embedded", "litellm"])
def test_a_real_agent_finishes_its_job(name: str, gateway: str, request: pytest.FixtureRequest) -> None:
    stockade: Instance = request.getfixturevalue(gateway)
    job = JOBS[name]
    assert Path(job.mounts.removeprefix("fs:ro:").partition("=")[0]).exists(), "run ./bootstrap test"
    workspace = stockade.workspace(input__txt="what it has to read\n")
    done = stockade.ctl(
        "run", "--name", name, "--policy", job.policy, "--workspace", f"{workspace}:rw", "--scope", job.mounts,
        "--", *job.command, seconds=100,
    )  # fmt: skip
    told = f"{done.out}\n{done.err}\n{stockade.actions(name)}"
    assert (workspace / "result.md").exists(), told
    assert (workspace / "result.md").read_text() == WRITTEN
    assert (workspace / "seen.txt").read_text() == "what it has to read\n1000\n"
    assert {path.stat().st_uid for path in workspace.iterdir()} == {OWNER}
    assert done.code == 0, told
    assert "All done." in done.out

    asked = [entry for entry in stockade.actions(name) if entry["verb"] == "egress.request"]
    calls = [entry for entry in asked if entry["verdict"] == "allowed"]
    assert len([entry for entry in calls if entry["details"]["model"] == job.model]) >= len(job.calls) + 1
    assert {entry["object"].partition("/v1/")[0] for entry in calls} == {"POST http://gateway.internal:3128"}
    # What it phoned elsewhere was denied, and `actions --verdict denied` lists it.
    denied = {entry["object"] for entry in stockade.actions(name, "--verdict", "denied")}
    assert {f"CONNECT {host}" for host in job.phones} <= denied
