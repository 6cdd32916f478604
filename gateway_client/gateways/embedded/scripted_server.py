"""The scripted model alone, over TCP: an OpenAI- and Anthropic-compatible upstream for trying other gateways offline.

    python -m gateway_client.gateways.embedded.scripted_server [--listen 127.0.0.1:0] [--script FILE]

Prints `{"url": "http://127.0.0.1:PORT"}` once it listens. It serves scripted models only, so that no key and no
destination is ever reachable without the checks of the unix socket.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import sys
from ipaddress import ip_address
from pathlib import Path

from gateway_client.gateways.embedded.api import malformed
from gateway_client.gateways.embedded.build import build_api
from gateway_client.gateways.embedded.config import DEFAULT_MODELS, ModelConfig
from gateway_client.gateways.embedded.http import READ_BYTES, Connection, Limits
from gateway_client.gateways.embedded.models import script as scripts


async def serve(listener: socket.socket, script: scripts.Script | None) -> None:
    models = DEFAULT_MODELS if script is None else tuple(
        ModelConfig(model.name, model.kind, script="file") for model in DEFAULT_MODELS
    )  # fmt: skip
    api = build_api(models, {} if script is None else {"file": script}, says_cost=False)

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await Connection(reader, writer, Limits()).serve(api.handle, malformed)
        except (OSError, TimeoutError):
            pass  # the client went away, which it may
        finally:
            writer.close()

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await asyncio.start_server(accepted, sock=listener, limit=READ_BYTES * 4)
    host, port = listener.getsockname()[:2]
    sys.stdout.write(json.dumps({"url": f"http://{host}:{port}"}) + "\n")
    sys.stdout.flush()
    await stop.wait()
    server.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripted_server", description=__doc__.splitlines()[0])
    parser.add_argument("--listen", default="127.0.0.1:0", help="loopback address and port (0: any free)")
    parser.add_argument("--script", type=Path, help="JSON file with a script; see models/script.py")
    options = parser.parse_args()
    host, _, port = options.listen.rpartition(":")
    try:
        if not ip_address(host).is_loopback:
            raise ValueError(f"{host} is no loopback address")
        script = scripts.parse(json.loads(options.script.read_text()), options.script.name) if options.script else None
        listener = socket.create_server((host, int(port)))
    except (OSError, ValueError) as error:
        sys.stderr.write(f"cannot start the scripted server: {error}\n")
        return 2
    asyncio.run(serve(listener, script))
    return 0


if __name__ == "__main__":
    sys.exit(main())
