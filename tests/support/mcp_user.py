"""An agent that uses an MCP server with the official SDK; runs in a sandbox with .venv-agents. Prints what happened."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client


async def tried(what: Any) -> str:
    try:
        result = await what
    except Exception as error:  # noqa: BLE001 - whatever it was, the test shows it
        return f"refused: {error}"
    content = getattr(result, "content", None) or getattr(result, "contents", None) or []
    return "".join(getattr(part, "text", "") for part in content)


async def main() -> None:
    url = sys.argv[1]
    async with streamable_http_client(url) as streams, ClientSession(streams[0], streams[1]) as session:
        await session.initialize()
        tools = await session.list_tools()
        told = {
            "tools": [tool.name for tool in tools.tools],
            "weather": await tried(session.call_tool("get_weather", {"city": "Oslo"})),
            "delete": await tried(session.call_tool("delete_everything", {})),
            "resource": await tried(session.read_resource("notes://secret")),
        }
        print(json.dumps(told))  # noqa: T201 - the output is the product


asyncio.run(main())
