"""An agent that finds out why a shop's checkout fails: OpenAI Agents SDK, four tools, nothing about its sandbox in it.

It reads the logs in its workspace, asks the model what they mean, looks at the payment provider's status page, and
writes REPORT.md. Where it may not reach the page it says what it lacks, and tries again until somebody grants it.
"""

import asyncio
import json
import time
import urllib.error
import urllib.request
from pathlib import Path

from agents import Agent, Runner, function_tool, set_tracing_disabled

WORKSPACE = Path("/workspace")
LOG_BYTES_MAX = 64 * 1024
WAIT_SECONDS = 60


@function_tool
def list_logs() -> str:
    """List the log files."""
    return "\n".join(sorted(path.name for path in WORKSPACE.glob("*.log")))


@function_tool
def read_log(name: str) -> str:
    """Read one log file."""
    return (WORKSPACE / Path(name).name).read_text()[:LOG_BYTES_MAX]


@function_tool
def check_status(url: str) -> str:
    """Fetch a status page."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 - the sandbox decides where it may go
                return str(answer.read(LOG_BYTES_MAX).decode())
        except urllib.error.HTTPError as error:
            missing = json.loads(error.read() or b"{}").get("scope", "")
            print(f"denied ({error.code}): I would need {missing}", flush=True)
            if time.monotonic() > deadline:
                return f"not reachable: the scope {missing} was not granted"
            time.sleep(0.5)


@function_tool
def write_report(text: str) -> str:
    """Write the report."""
    (WORKSPACE / "REPORT.md").write_text(text)
    return "written to REPORT.md"


async def main() -> None:
    """Do the job, then stay as a service would."""
    set_tracing_disabled(disabled=True)
    agent = Agent(
        name="log-triage",
        model="triage-model",
        instructions="Find the cause of the failing checkouts. Use the tools, then write a short report.",
        tools=[list_logs, read_log, check_status, write_report],
    )
    result = await Runner.run(agent, "Why do checkouts fail since 09:40?")
    print(result.final_output, flush=True)
    await asyncio.sleep(3600)


asyncio.run(main())
