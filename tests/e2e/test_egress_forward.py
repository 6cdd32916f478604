"""Absolute-form and CONNECT through the real worker and dialer, by a forward proxy or the embedded's preface."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct

import pytest

from gateway_client.egress import messages
from gateway_client.gateways import preface as preface_format
from tests.support.egress_plane import AGENT, Plane, Upstream, running, until

PROXY = messages.ForwardMode.PROXY
PREFACE = messages.ForwardMode.PREFACE


def client_hello(name: str | None) -> bytes:
    """The first flight of a real TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


async def connect(plane: Plane, target: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", plane.port)
    writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    async with asyncio.timeout(5):
        return reader, writer, await reader.readuntil(b"\r\n\r\n")


async def echo_proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A forward proxy whose every tunnel ends in an echo."""
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


async def test_absolute_form_goes_to_the_forward_proxy_in_the_normalised_spelling() -> None:
    upstream = Upstream(answer=b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n")
    async with running(upstream, forward_mode=PROXY) as plane:
        plane.grant("http:GET:http://example.com/a/**")
        answer = await plane.exchange(
            b"GET http://EXAMPLE.com.:080/a/%7euser?q=1 HTTP/1.1\r\nHost: example.com\r\nX-Forwarded-For: 1.2.3.4\r\n"
            b"Connection: close, x-drop\r\nX-Drop: 1\r\nAuthorization: mine\r\n\r\n"
        )
        assert answer.startswith(b"HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\n")
        head = upstream.received[0].lower()
        assert head.startswith(b"get http://example.com/a/~user?q=1 http/1.1\r\nhost: example.com\r\n")
        assert b"authorization: mine" in head
        assert b"x-forwarded" not in head
        assert b"x-drop" not in head
        assert b"sk-secret" not in head


async def test_an_ungranted_host_is_denied_with_the_exact_scope() -> None:
    upstream = Upstream()
    async with running(upstream, forward_mode=PROXY) as plane:
        plane.grant("http:GET:http://example.com/a/**")
        answer = await plane.exchange(
            b"POST http://example.com/b HTTP/1.1\r\nHost: example.com\r\nContent-Length: 0\r\n\r\n"
        )
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["scope"] == "http:POST:http://example.com/b"
        assert upstream.connections == 0


async def test_a_chunked_upload_passes_and_a_malformed_one_never_leaves() -> None:
    received = bytearray()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not received.endswith(b"0\r\n\r\n"):
            received.extend(await reader.read(65536))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    upstream = Upstream(handler=handler)
    async with running(upstream, forward_mode=PROXY) as plane:
        plane.grant("http:POST:http://example.com/**")
        head = b"POST http://example.com/ HTTP/1.1\r\nHost: example.com\r\nTransfer-Encoding: chunked\r\n\r\n"
        refused = await plane.exchange(head + b"5;ext=1\r\nhello\r\n0\r\n\r\n")
        assert refused.startswith(b"HTTP/1.1 400 ")
        assert upstream.connections == 0
        big = b"z" * 100_000
        answer = await plane.exchange(
            head.replace(b"Host", b"Connection: close\r\nHost")
            + b"%x\r\n%s\r\n5\r\nhello\r\n0\r\n\r\n" % (len(big), big)
        )
        assert answer.endswith(b"ok")
        assert received.count(b"z") == 100_000
        assert b"hello" in received


async def test_a_tunnel_passes_when_the_server_name_is_the_authority() -> None:
    upstream = Upstream(handler=echo_proxy)
    async with running(upstream, forward_mode=PROXY) as plane:
        plane.grant("tls:example.com:443")
        reader, writer, head = await connect(plane, "example.com:443")
        assert head.startswith(b"HTTP/1.1 200 ")
        hello = client_hello("example.com")
        for byte in hello[:7]:
            writer.write(bytes([byte]))
            await writer.drain()
        writer.write(hello[7:])
        async with asyncio.timeout(5):
            assert await reader.readexactly(len(hello)) == hello
            writer.write(b"x" * 300_000)
            assert await reader.readexactly(300_000) == b"x" * 300_000
            writer.write_eof()
            assert await reader.read() == b""
        outcome = await until(lambda: plane.outcomes[0] if plane.outcomes else None)
        assert (outcome.status, outcome.error) == (200, "")
        assert outcome.bytes_up == outcome.bytes_down == 300_000 + len(hello)
        writer.close()


@pytest.mark.parametrize(
    "first", [client_hello("evil.example"), client_hello(None), b"GET / HTTP/1.1\r\n\r\n", b"\0" * 40]
)
async def test_a_tunnel_with_another_name_or_no_tls_carries_nothing(first: bytes) -> None:
    carried = bytearray()

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        carried.extend(await reader.read())

    async with running(Upstream(handler=proxy), forward_mode=PROXY) as plane:
        plane.grant("tls:example.com:443")
        reader, writer, head = await connect(plane, "example.com:443")
        assert head.startswith(b"HTTP/1.1 200 ")
        writer.write(first)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.readexactly(1), 5)
        outcome = await until(lambda: plane.outcomes[0] if plane.outcomes else None)
        assert outcome.error in ("sni_mismatch", "not_tls")
        assert not carried
        writer.close()


async def test_plain_http_inside_connect_80_is_judged_request_by_request() -> None:
    upstream = Upstream()
    async with running(upstream, forward_mode=PROXY) as plane:
        plane.grant("http:GET:http://example.com/a")
        reader, writer, head = await connect(plane, "example.com:80")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert upstream.connections == 0
        writer.write(b"GET /a HTTP/1.1\r\nHost: example.com\r\n\r\n")
        async with asyncio.timeout(5):
            assert b" 200 " in await reader.readuntil(b"{}")
            writer.write(b"GET /b HTTP/1.1\r\nHost: example.com\r\n\r\nGET /a HTTP/1.1\r\nHost: example.com\r\n\r\n")
            rest = await reader.read()
        assert b"http:GET:http://example.com/b" in rest
        assert rest.count(b"HTTP/1.1") == 1  # what was pipelined behind the refusal is not served
        assert upstream.connections == 1
        writer.close()


@pytest.mark.parametrize(
    "inside",
    [
        b"GET /a HTTP/1.1\r\nHost: other.example\r\n\r\n",
        b"GET http://other.example/ HTTP/1.1\r\nHost: other.example\r\n\r\n",
        b"CONNECT other.example:443 HTTP/1.1\r\nHost: other.example:443\r\n\r\n",
        client_hello("example.com"),
    ],
)
async def test_nothing_else_passes_inside_connect_80(inside: bytes) -> None:
    upstream = Upstream()
    async with running(upstream, forward_mode=PROXY) as plane:
        plane.grant("http:*:http://example.com/**", "http:*:http://other.example/**", "tls:other.example:443")
        reader, writer, _ = await connect(plane, "example.com:80")
        writer.write(inside)
        async with asyncio.timeout(5):
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        assert upstream.connections == 0
        writer.close()


async def test_connect_to_the_worker_itself_reaches_the_models_and_relays_connects_under_the_same_rules() -> None:
    upstream = Upstream()
    async with running(upstream, forward_mode=PROXY) as plane:
        plane.grant("llm:*")
        reader, writer, head = await connect(plane, "gateway.internal:3128")
        assert head.startswith(b"HTTP/1.1 200 ")
        writer.write(b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal:3128\r\n\r\n")
        async with asyncio.timeout(5):
            assert b" 200 " in await reader.readuntil(b"{}")
            writer.write(b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\n\r\n")
            assert b'"scope": "tls:example.com:443"' in await reader.read()
        writer.close()


async def test_the_embedded_gateway_gets_the_preface_first_and_its_refusal_is_told() -> None:
    prefaces = []
    refuse = asyncio.Event()

    async def gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fixed = await reader.readexactly(preface_format.FIXED_BYTES)
        rest = await reader.readexactly(preface_format.length_after_fixed(fixed))
        prefaces.append(preface_format.decode_rest(rest))
        if refuse.is_set():
            text = b"cannot connect: it is loopback"
            writer.write(b"\x01" + struct.pack("!H", len(text)) + text)
            return
        if prefaces[-1].allow != preface_format.Api():
            writer.write(b"\x00")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

    async with running(Upstream(handler=gateway), forward_mode=PREFACE) as plane:
        plane.grant("http:GET:http://example.com/**", "llm:*")
        request = b"GET http://example.com/ HTTP/1.1\r\nHost: example.com\r\nConnection: close\r\n\r\n"
        assert (await plane.exchange(request)).endswith(b"ok")
        models = b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal:3128\r\nConnection: close\r\n\r\n"
        assert (await plane.exchange(models)).endswith(b"ok")
        refuse.set()
        refused = await plane.exchange(request)
        assert refused.startswith(b"HTTP/1.1 502 ")
        assert b"it is loopback" in refused
        assert [(preface.agent_id, str(preface.allow)) for preface in prefaces[::2]] == [
            (AGENT, "http://example.com:80"),
            (AGENT, "http://example.com:80"),
        ]


async def test_a_private_address_is_refused_whatever_is_granted() -> None:
    upstream = Upstream()
    async with running(upstream, forward_mode=PROXY) as plane:
        plane.grant("http:*:http://169.254.169.254/**", "tls:10.0.0.1:443")
        for request in (
            b"GET http://169.254.169.254/latest HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n",
            b"CONNECT 10.0.0.1:443 HTTP/1.1\r\nHost: 10.0.0.1:443\r\n\r\n",
        ):
            assert b"address_forbidden" in await plane.exchange(request)
        assert upstream.connections == 0


async def test_cut_resets_both_sides_and_the_dialer_cuts_without_the_worker() -> None:
    upstream = Upstream(handler=echo_proxy)
    async with running(upstream, forward_mode=PROXY) as plane:
        plane.grant("tls:example.com:443")
        hello = client_hello("example.com")
        reader, writer, _ = await connect(plane, "example.com:443")
        writer.write(hello)
        await reader.readexactly(len(hello))
        plane.to_worker(messages.Cut(agent_id=AGENT))
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.readexactly(1), 5)
        assert (await until(lambda: plane.outcomes[0] if plane.outcomes else None)).error == "cut"
        writer.close()

        reader, writer, _ = await connect(plane, "example.com:443")
        writer.write(hello)
        await reader.readexactly(len(hello))
        plane.to_dialer(messages.CutUpstreams(AGENT))
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        done = await until(lambda: plane.cuts[0] if plane.cuts else None)
        assert (done.relays, done.listeners) == (1, 1)
        assert done.ms < 100
        with pytest.raises(ConnectionError):
            await plane.exchange(b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal\r\n\r\n")
        writer.close()


async def test_cutting_one_exchange_leaves_the_others() -> None:
    async with running(Upstream(handler=echo_proxy), forward_mode=PROXY) as plane:
        plane.grant("tls:example.com:443")
        hello = client_hello("example.com")
        streams = []
        for _ in range(2):
            reader, writer, _ = await connect(plane, "example.com:443")
            writer.write(hello)
            await reader.readexactly(len(hello))
            streams.append((reader, writer))
        plane.to_worker(messages.Cut(xs=(plane.asks[0].x,)))
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(streams[0][0].readexactly(1), 5)
        streams[1][1].write(b"still here")
        assert await asyncio.wait_for(streams[1][0].readexactly(10), 5) == b"still here"
        for _, writer in streams:
            writer.close()


async def test_a_frozen_agent_gets_503_and_its_relays_stand_still_until_thaw() -> None:
    async with running(Upstream(handler=echo_proxy), forward_mode=PROXY) as plane:
        plane.grant("tls:example.com:443")
        hello = client_hello("example.com")
        reader, writer, _ = await connect(plane, "example.com:443")
        writer.write(hello)
        await reader.readexactly(len(hello))
        plane.to_worker(messages.Freeze(AGENT))
        plane.to_worker(
            messages.Listen("ag_other", "other"), fd=(other := socket.create_server(("127.0.0.1", 0))).fileno()
        )
        port = other.getsockname()[1]
        # Another agent is served, so the freeze has been read by now.
        assert b"HTTP/1.1 403" in await plane.exchange(
            b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n", port=port
        )
        for wait in (0, 0, 0.2):  # whenever its first bytes come
            late, slow = await asyncio.open_connection("127.0.0.1", plane.port)
            await asyncio.sleep(wait)
            slow.write(b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal\r\n\r\n")
            assert (await asyncio.wait_for(late.readline(), 5)).startswith(b"HTTP/1.1 503 ")
            slow.close()
        writer.write(b"ping")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(4), 0.2)
        plane.to_worker(messages.Thaw(AGENT))
        assert await asyncio.wait_for(reader.readexactly(4), 5) == b"ping"
        writer.close()
        other.close()


async def test_without_a_daemon_everything_is_503_and_open_relays_are_cut() -> None:
    async with running(Upstream(handler=echo_proxy), forward_mode=PROXY) as plane:
        plane.grant("tls:example.com:443")
        hello = client_hello("example.com")
        reader, writer, _ = await connect(plane, "example.com:443")
        writer.write(hello)
        await reader.readexactly(len(hello))
        plane.worker.close()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.readexactly(1), 5)
        answer = await plane.exchange(b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"daemon_gone" in answer
        writer.close()


async def test_nothing_is_kept_of_ended_exchanges() -> None:
    def open_files(pid: int) -> int:
        import os  # noqa: PLC0415

        return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208

    upstream = Upstream()
    async with running(upstream, forward_mode=PROXY) as plane:
        plane.grant("llm:*")
        request = b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal\r\nConnection: close\r\n\r\n"
        await plane.exchange(request)
        before = open_files(plane.worker_process.pid), open_files(plane.dialer_process.pid)
        for _ in range(50):
            await plane.exchange(request)
        await until(lambda: len(plane.outcomes) == 51)
        await until(lambda: (open_files(plane.worker_process.pid), open_files(plane.dialer_process.pid)) <= before)


async def test_a_gateway_that_refuses_connections_is_502() -> None:
    async with running(Upstream(), gateway="127.0.0.1:1") as plane:
        plane.grant("llm:*")
        answer = await plane.exchange(b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert b"Connection refused" in answer


async def test_without_a_dialer_it_is_502() -> None:
    upstream = Upstream()
    async with running(upstream) as plane:
        plane.grant("llm:*")
        plane.dialer_process.kill()
        plane.dialer_process.wait()
        answer = await plane.exchange(b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 502 ")
