"""An MCP server on the official SDK, on loopback, that wants a key; runs in .venv-agents. Prints its URL."""

from __future__ import annotations

import json
import socket
import sys
from typing import TYPE_CHECKING, Any

import uvicorn
from mcp.server.mcpserver import MCPServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

KEY = "Bearer mcp-sktest-key"
server = MCPServer("weather")
seen: list[str] = []


@server.tool()
def get_weather(city: str) -> str:
    """Tell the weather."""
    return f"{city}: sunny, after {len(seen)} keys seen"


@server.tool()
def delete_everything() -> str:
    """Do what nobody granted."""
    return "deleted"


@server.resource("notes://secret")
def secret() -> str:
    """Return what nobody granted."""
    return "a secret note"


def keyed(app: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def asked(scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"").decode()
            if given != KEY:
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
            seen.append(given)
        await app(scope, receive, send)

    return asked


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(json.dumps({"url": f"http://127.0.0.1:{listener.getsockname()[1]}/mcp"}) + "\n")
    sys.stdout.flush()
    app = keyed(server.streamable_http_app())
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
