"""Worker, dialer and the embedded gateway together, each as its own process under its own user."""

from __future__ import annotations

import asyncio
import json
import pwd
from typing import TYPE_CHECKING

import pytest

from gateway_client.egress import messages
from tests.e2e.test_egress_forward import client_hello, connect
from tests.support.egress_plane import Plane, until
from tests.support.embedded_gateway import EmbeddedGateway

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    body = head.split(b"\r\n")[0]
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    await writer.drain()
    writer.close()


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    tls_server = await asyncio.start_server(echo, "127.0.0.1", 0)
    web_server = await asyncio.start_server(page, "127.0.0.1", 0)
    hosts = {
        "pinned.test": f"127.0.0.1:{tls_server.sockets[0].getsockname()[1]}",
        "web.test": f"127.0.0.1:{web_server.sockets[0].getsockname()[1]}",
    }
    models = [{"name": "scripted*", "kind": "scripted"}]
    with EmbeddedGateway(hosts=hosts, models=models, allowed_uid=pwd.getpwnam("stockade-dialer").pw_uid) as gateway:
        assert gateway.ready["ready"], gateway.ready
        running = Plane(
            configuration=messages.Configure(
                gateway="embedded", host="gateway", forward_mode=messages.ForwardMode.PREFACE
            ),
            dialer_configuration=messages.ConfigureDialer(gateway=f"unix:{gateway.socket_path}"),
        )
        try:
            await running.start()
            yield running
        finally:
            running.stop()
    tls_server.close()
    web_server.close()


async def test_models_pages_and_tunnels_pass_and_each_needs_its_scope(plane: Plane) -> None:
    plane.grant("llm:scripted", "http:GET:http://web.test/**", "tls:pinned.test:443")

    body = json.dumps(
        {"model": "scripted", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    ).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway.internal:3128\r\nConnection: close\r\n"
    call = head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    answer = await plane.exchange(call)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"data: [DONE]" in answer
    outcome = await until(lambda: plane.outcomes[0] if plane.outcomes else None)
    assert outcome.usage.model == "scripted"
    assert outcome.usage.output_tokens > 0

    answer = await plane.exchange(b"GET http://web.test/a?b=1 HTTP/1.1\r\nHost: web.test\r\nConnection: close\r\n\r\n")
    assert answer.endswith(b"\r\n\r\nGET /a?b=1 HTTP/1.1")

    reader, writer, head = await connect(plane, "pinned.test:443")
    assert head.startswith(b"HTTP/1.1 200 ")
    hello = client_hello("pinned.test")
    writer.write(hello)
    assert await asyncio.wait_for(reader.readexactly(len(hello)), 5) == hello
    writer.close()

    plane.grant("llm:other")
    for request in (
        call,
        b"GET http://web.test/a HTTP/1.1\r\nHost: web.test\r\n\r\n",
        b"CONNECT pinned.test:443 HTTP/1.1\r\nHost: pinned.test:443\r\n\r\n",
    ):
        assert (await plane.exchange(request)).startswith(b"HTTP/1.1 403 ")


async def test_a_granted_name_that_leads_to_the_host_itself_is_refused_by_the_gateway(plane: Plane) -> None:
    plane.grant("http:GET:http://localhost/**", "tls:localhost:22")
    answer = await plane.exchange(b"GET http://localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 502 ")
    assert b"loopback" in answer
    assert (await plane.exchange(b"CONNECT localhost:22 HTTP/1.1\r\nHost: localhost:22\r\n\r\n")).startswith(
        b"HTTP/1.1 502 "
    )
