"""What an agent may take of the worker, what a hostile gateway can do to an agent, and that others feel neither."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys

import pytest

from gateway_client.egress import messages
from gateway_client.egress.codec import encode
from tests.support.egress_plane import AGENT, Upstream, running, until

MODELS = b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal:3128\r\nConnection: close\r\n\r\n"


def chat(body: bytes, *extra: bytes) -> bytes:
    head = [
        b"POST /v1/chat/completions HTTP/1.1",
        b"Host: gateway.internal:3128",
        b"Connection: close",
        b"Content-Length: %d" % len(body),
        *extra,
    ]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def padded(size: int) -> bytes:
    empty = b'{"model":"m","pad":""}'
    return b'{"model":"m","pad":"%s"}' % (b"x" * (size - len(empty)))


@pytest.mark.parametrize(
    "data",
    [
        b"GET /v1/models HTTP/1.1\nHost: gateway.internal\n\n",
        b"POST /v1/messages HTTP/1.1\r\nHost: gateway.internal\r\nContent-Length: 0, 0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: gateway.internal\r\nContent-Length: 5\r\nTransfer-Encoding:chunked\r\n\r\n0\r\n\r\n",
        b"GET http://a@b.example/ HTTP/1.1\r\nHost: b.example\r\n\r\n",
        b"CONNECT example.com HTTP/1.1\r\nHost: example.com\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x05\x01\x00",
        b"TRACE /v1/models HTTP/1.1\r\nHost: gateway.internal\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nHost: gateway.internal\r\nContent-Length: 2\r\n\r\n{]",
        b"GET /v1/../key/list HTTP/1.1\r\nHost: gateway.internal\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
async def test_malformed_input_is_400_with_nothing_asked_and_nothing_upstream(data: bytes) -> None:
    upstream = Upstream()
    async with running(upstream) as plane:
        plane.grant("llm:*")
        answer = await plane.exchange(data + MODELS)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.count(b"Content-Type:") == 1
        problem = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert problem["reason_code"]
        assert (plane.asks, upstream.connections) == ([], 0)
        assert await until(lambda: plane.rejected)
        assert await plane.exchange(MODELS, seconds=5)  # the worker serves on


async def test_administration_of_the_gateway_is_out_of_reach() -> None:
    upstream = Upstream()
    async with running(upstream) as plane:
        plane.grant("llm:*")
        for path in (b"/key/generate", b"/model/new", b"/v1/mcp/tools", b"/", b"/health", b"/v1/files", b"/user/info"):
            answer = await plane.exchange(MODELS.replace(b"/v1/models", path))
            assert answer.startswith(b"HTTP/1.1 403 ")
            assert b"endpoint_refused" in answer
        assert upstream.connections == 0


async def test_requests_follow_one_another_on_a_kept_connection_in_order() -> None:
    count = 0

    async def gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        await reader.readuntil(b"\r\n\r\n")
        count += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % count)

    async with running(Upstream(handler=gateway)) as plane:
        plane.grant("llm:*")
        kept = MODELS.replace(b"Connection: close\r\n", b"")
        answer = await plane.exchange(kept + kept + MODELS)
        assert [part[-1:] for part in answer.split(b"HTTP/1.1 200 OK")[1:]] == [b"1", b"2", b"3"]


async def test_a_model_body_is_bounded() -> None:
    upstream = Upstream()
    async with running(upstream, limits=messages.Limits(model_body_bytes_max=4096)) as plane:
        plane.grant("llm:*")
        assert (await plane.exchange(chat(padded(4096)))).startswith(b"HTTP/1.1 200 ")
        assert (await plane.exchange(chat(padded(4097)))).startswith(b"HTTP/1.1 413 ")
        body = padded(4097)
        chunked = chat(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        assert (await plane.exchange(chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))).startswith(
            b"HTTP/1.1 413 "
        )
        assert upstream.connections == 1


async def test_bodies_an_agent_has_in_flight_are_bounded_and_given_back() -> None:
    limits = messages.Limits(buffered_bytes_per_agent_max=10_000)
    async with running(Upstream(), limits=limits) as plane:
        plane.answer = lambda _ask: None
        held = asyncio.create_task(plane.exchange(chat(padded(6_000))))
        await until(lambda: plane.asks)
        answer = await plane.exchange(chat(padded(6_000)))
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"in flight" in answer
        plane.to_worker(messages.Answer(plane.asks[0].x, messages.Refuse(403, "no", "no")))
        assert (await held).startswith(b"HTTP/1.1 403 ")
        plane.answer = None
        plane.grant("llm:*")
        assert (await plane.exchange(chat(padded(6_000)))).startswith(b"HTTP/1.1 200 ")


async def test_a_client_that_waits_for_100_is_told_to_go_on() -> None:
    async with running(Upstream()) as plane:
        plane.grant("llm:*")
        reader, writer = await asyncio.open_connection("127.0.0.1", plane.port)
        whole = chat(b'{"model":"m"}', b"Expect: 100-continue")
        head, _, body = whole.partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        async with asyncio.timeout(5):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(body)
            assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        writer.close()


async def test_a_slow_head_is_ended_and_others_are_served_meanwhile() -> None:
    limits = messages.Limits(head_seconds_max=0.5, idle_seconds_max=1.0)
    async with running(Upstream(), limits=limits) as plane:
        plane.grant("llm:*")
        reader, writer = await asyncio.open_connection("127.0.0.1", plane.port)
        writer.write(b"GET /v1/mod")
        idle, idle_writer = await asyncio.open_connection("127.0.0.1", plane.port)
        assert (await plane.exchange(MODELS)).startswith(b"HTTP/1.1 200 ")
        async with asyncio.timeout(5):
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
            assert await idle.read() == b""
        writer.close()
        idle_writer.close()


async def test_connections_of_one_agent_are_bounded_and_another_is_served() -> None:
    async with running(Upstream(), limits=messages.Limits(connections_per_agent_max=3)) as plane:
        plane.grant("llm:*")
        other = plane.listen("ag_other")
        held = [await asyncio.open_connection("127.0.0.1", plane.port) for _ in range(3)]
        answer = await plane.exchange(b"")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b'"reason_code": "limit"' in answer
        assert (await plane.exchange(MODELS, port=other)).startswith(b"HTTP/1.1 200 ")
        for _, writer in held:
            writer.close()
            await writer.wait_closed()
        deadline = asyncio.get_running_loop().time() + 5
        answer = b""
        while not answer.startswith(b"HTTP/1.1 200 "):
            assert asyncio.get_running_loop().time() < deadline
            with contextlib.suppress(ConnectionResetError):  # turned away as it was sending
                answer = await plane.exchange(MODELS)


async def test_exchanges_of_a_worker_are_bounded() -> None:
    async with running(Upstream(), limits=messages.Limits(exchanges_per_worker_max=2)) as plane:
        plane.answer = lambda _ask: None  # a daemon that thinks
        waiting = [asyncio.create_task(plane.exchange(MODELS)) for _ in range(2)]
        await until(lambda: len(plane.asks) == 2)
        assert (await plane.exchange(MODELS)).startswith(b"HTTP/1.1 503 ")
        for ask in plane.asks:
            plane.to_worker(messages.Answer(ask.x, messages.Refuse(403, "no", "no")))
        assert {(await task)[:12] for task in waiting} == {b"HTTP/1.1 403"}


async def test_a_daemon_that_does_not_answer_is_503_and_nothing_leaves() -> None:
    upstream = Upstream()
    async with running(upstream, limits=messages.Limits(answer_seconds_max=0.3)) as plane:
        plane.answer = lambda _ask: None
        assert (await plane.exchange(MODELS)).startswith(b"HTTP/1.1 503 ")
        plane.to_worker(messages.Answer(plane.asks[0].x, messages.Allow("gr", messages.Upstream.API)))
        await until(lambda: plane.outcomes)
        assert upstream.connections == 0


async def test_an_agent_that_leaves_while_asked_about_costs_an_outcome_and_no_more() -> None:
    async with running(Upstream()) as plane:
        plane.answer = lambda _ask: None
        _, writer = await asyncio.open_connection("127.0.0.1", plane.port)
        writer.write(MODELS)
        await until(lambda: plane.asks)
        endpoint = writer.get_extra_info("socket")
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        outcome = await until(lambda: plane.outcomes[0] if plane.outcomes else None)
        assert outcome.x == plane.asks[0].x
        assert outcome.error


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    ],
)
async def test_one_request_gets_one_answer(answer: bytes) -> None:
    async with running(Upstream(answer=answer)) as plane:
        plane.grant("llm:*")
        kept = MODELS.replace(b"Connection: close\r\n", b"")
        got = await plane.exchange(kept + MODELS)
        assert got.count(b"HTTP/1.1 200 OK") == 2
        assert b"evil" not in got
        assert b"103" not in got


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * 90_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    ],
)
async def test_a_gateway_that_answers_no_http_is_502(answer: bytes) -> None:
    async with running(Upstream(answer=answer)) as plane:
        plane.grant("llm:*")
        assert (await plane.exchange(MODELS)).startswith(b"HTTP/1.1 502 ")
        assert (await until(lambda: plane.outcomes))[0].status == 502


async def test_an_answer_that_breaks_off_is_not_passed_as_whole() -> None:
    async with running(
        Upstream(answer=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
    ) as plane:
        plane.grant("llm:*")
        with pytest.raises(ConnectionResetError):
            await plane.exchange(MODELS)
        assert (await until(lambda: plane.outcomes))[0].error


async def test_the_credential_does_not_come_back() -> None:
    answer = (
        b"HTTP/1.1 401 Unauthorized\r\nX-Echo: Bearer sk-secret\r\nSet-Cookie: a=b\r\nX-LiteLLM-Key: k\r\n"
        b"Retry-After: 3\r\nTransfer-Encoding: chunked\r\n\r\n8\r\nkey: sk-\r\n8\r\nsecret!!\r\n0\r\n\r\n"
    )
    async with running(Upstream(answer=answer)) as plane:
        plane.grant("llm:*")
        got = await plane.exchange(MODELS)
        assert b"sk-secret" not in got.replace(b"\r\n", b"")
        assert b"secret" not in got
        for hidden in (b"x-echo", b"set-cookie", b"litellm"):
            assert hidden not in got.lower()
        assert b"retry-after: 3" in got.lower()


async def test_an_http_1_0_client_gets_a_body_without_chunks_and_a_close() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    async with running(Upstream(answer=answer)) as plane:
        plane.grant("llm:*")
        got = await plane.exchange(b"GET /v1/models HTTP/1.0\r\nHost: gateway.internal\r\n\r\n")
        head, _, body = got.partition(b"\r\n\r\n")
        assert body == b"{}"
        assert b"transfer-encoding" not in head.lower()


async def test_self_service_is_answered_by_the_daemon_on_a_kept_connection() -> None:
    upstream = Upstream()
    async with running(upstream) as plane:
        plane.grant("llm:m*")
        ask = b"GET /.stockade/v1/%s HTTP/1.1\r\nHost: gateway.internal:3128\r\n%s\r\n"
        got = await plane.exchange(ask % (b"whoami", b"") + ask % (b"scopes", b"Connection: close\r\n"))
        assert b'"agent_id": "%s"' % AGENT.encode() in got
        assert b'"scope": "llm:m*"' in got
        post = b"POST /.stockade/v1/requests?wait=1s HTTP/1.1\r\nHost: gateway.internal\r\nContent-Length: 9000\r\n\r\n"
        assert (await plane.exchange(post + b"x" * 9000)).startswith(b"HTTP/1.1 413 ")
        assert upstream.connections == 0


async def test_an_unknown_frame_from_the_daemon_makes_the_worker_refuse_everything() -> None:
    async with running(Upstream()) as plane:
        plane.grant("llm:*")
        plane.worker.send(b'{"m":"Nonsense"}')
        answer = await plane.exchange(MODELS)
        assert answer.startswith(b"HTTP/1.1 503 ")


async def test_a_dialer_without_a_preface_or_proxy_opens_nothing_but_the_gateway() -> None:
    upstream = Upstream()
    async with running(upstream) as plane:
        plane.answer = lambda _ask: messages.Allow("gr", messages.Upstream.TUNNEL)
        answer = await plane.exchange(b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert b"no forward proxy" in answer
        assert upstream.connections == 0


CONFINED = """
import os, socket, sys
from gateway_client.egress.confine import DIAL, STEADY, Confinement, confine
before = socket.socket()
confine(Confinement(user="stockade-egress", system_calls=STEADY, own_network=True))
for name, attempt in {
    "socket": socket.socket,
    "open": lambda: open("/etc/hostname"),
    "connect": lambda: before.connect(("127.0.0.1", 9)),
    "bind": lambda: before.bind(("127.0.0.1", 0)),
    "fork": os.fork,
    "kill": lambda: os.kill(1, 0),
    "setuid": lambda: os.setuid(0),
    "mkdir": lambda: os.mkdir("/tmp/x"),
}.items():
    try:
        attempt()
        print(name, "possible", flush=True)
    except PermissionError:
        print(name, "refused", flush=True)
os.execv("/bin/true", ["true"])
"""


def test_a_confined_process_can_open_start_and_become_nothing() -> None:
    done = subprocess.run(  # the same calls work before: the daemon's own tests open, fork and connect
        [sys.executable, "-I", "-c", CONFINED], capture_output=True, text=True, check=False, timeout=30
    )
    lines = dict(line.split() for line in done.stdout.splitlines())
    assert set(lines) == {"socket", "open", "connect", "bind", "fork", "kill", "setuid", "mkdir"}
    assert set(lines.values()) == {"refused"}, done.stderr
    assert done.returncode == -31, done.stderr  # SIGSYS


@pytest.mark.parametrize("user", ["root", "no-such-user"])
def test_confining_to_root_or_nobody_known_is_refused(user: str) -> None:
    code = (
        "from gateway_client.egress.confine import *\n"
        f"confine(Confinement(user={user!r}, system_calls=STEADY, own_network=False))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 1
    assert f"cannot become {user}" in done.stderr


async def test_frames_of_a_taken_over_worker_do_not_disturb_the_dialer() -> None:
    upstream = Upstream()
    async with running(upstream) as plane:
        plane.grant("llm:*")
        plane.to_dialer(messages.Forget("ag_unknown"))
        plane.dialer.send(encode(messages.CutUpstreams("ag_unknown")))
        assert (await until(lambda: plane.cuts))[0].relays == 0
        assert (await plane.exchange(MODELS)).startswith(b"HTTP/1.1 200 ")
