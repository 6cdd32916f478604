"""Runs inside a sandbox: the official `mcp` SDK's client against the self-service server; prints a JSON line a step."""

from __future__ import annotations

import asyncio
import json
import sys

from mcp import Client

SCOPE = sys.argv[3]


def say(step: str, **facts: object) -> None:
    sys.stdout.write(json.dumps({"step": step, **facts}) + "\n")
    sys.stdout.flush()


async def main(url: str, mode: str) -> None:
    async with Client(url, mode=mode) as client:
        say("connected", version=client.protocol_version, server=client.server_info.name)
        tools = await client.list_tools()
        say("tools", names=sorted(tool.name for tool in tools.tools))
        scopes = await client.call_tool("my_scopes", {})
        say("scopes", error=scopes.is_error, said=scopes.structured_content)
        budget = await client.call_tool("my_budget", {})
        say("budget", error=budget.is_error, said=budget.structured_content)
        asked = await client.call_tool("request_scope", {"scope": SCOPE, "reason": "to read the status page"})
        say("asked", error=asked.is_error, said=asked.structured_content)
        request_id = asked.structured_content["request_id"]
        waited = await client.call_tool("wait_for_request", {"request_id": request_id, "wait_seconds": 30})
        say("waited", error=waited.is_error, said=waited.structured_content)
        bad = await client.call_tool("request_scope", {"scope": "nonsense", "reason": "x"})
        say("refused", error=bad.is_error, said=bad.structured_content)


asyncio.run(main(sys.argv[1], sys.argv[2]))
