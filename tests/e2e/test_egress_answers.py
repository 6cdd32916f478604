"""What a hostile destination answers never becomes two answers, and what an answer used is not taken for nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

import pytest

from gateway_client.egress import messages
from gateway_client.egress.passing import informational_max
from tests.support.egress_plane import Plane, Upstream, running, until

PAGE = b"%s http://evil.example/a HTTP/1.1\r\nHost: evil.example\r\n\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal:3128\r\nConnection: close\r\n\r\n"
FORGED = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nFORGED"
BEHIND = b"HELLO" + FORGED


def chat(**fields: object) -> bytes:
    body = json.dumps({"model": "m", "messages": [], **fields}).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway.internal:3128\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    )


async def then(plane: Plane, method: bytes = b"GET") -> bytes:
    """Give all that one connection gets for a request to a hostile place and one to the gateway behind it."""
    try:
        return await plane.exchange(PAGE % method + MODELS.replace(b"GET", method))
    except ConnectionResetError:
        return b"RESET"


AMBIGUOUS = {
    "CL and TE": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BEHIND), BEHIND),
    "TE and CL": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"
    + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BEHIND), BEHIND),
    "two CLs": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 99\r\n\r\n" + BEHIND,
    "the same CL twice": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\ncontent-length: 5\r\n\r\n" + BEHIND,
    "a list of CLs": b"HTTP/1.1 200 OK\r\nContent-Length: 5, 5\r\n\r\n" + BEHIND,
    "signed CL": b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n" + BEHIND,
    "CL and TE behind hints": b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n5\r\nHELLO\r\n0\r\n\r\n",
    "the same CL twice behind hints": b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n"
    b"Content-Length: 5\r\n\r\nHELLO",
    "TE in 1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nHELLO\r\n0\r\n\r\n" + FORGED,
    "other TE": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n5\r\nHELLO\r\n0\r\n\r\n" + FORGED,
    "HTTP/0.9": b"<html>" + FORGED,
    "HTTP/2": b"HTTP/2.0 200 OK\r\nContent-Length: 5\r\n\r\n" + BEHIND,
    "101 unasked": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + FORGED,
    "flood of 1xx": b"HTTP/1.1 103 Early Hints\r\n\r\n" * (informational_max + 1) + FORGED,
}


@pytest.mark.parametrize("name", AMBIGUOUS)
async def test_an_answer_that_could_be_two_is_502_and_the_connection_ends(name: str) -> None:
    async with running(Upstream(answer=AMBIGUOUS[name]), forward_mode=messages.ForwardMode.PROXY) as plane:
        plane.grant("http:*:http://evil.example/**", "llm:*")
        got = await then(plane)
        assert got.startswith(b"HTTP/1.1 502 ")
        assert got.count(b"HTTP/1.1 ") == 1
        assert b"FORGED" not in got
        assert b"HELLO" not in got


CLEAN = {
    "trailing bytes": (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + BEHIND, b"HELLO"),
    "chunks with more behind": (
        b"GET",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nHELLO\r\n0\r\n\r\n" + FORGED,
        b"HELLO",
    ),
    "HEAD with a body": (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 47\r\n\r\n" + FORGED, b""),
    "204 with a body": (b"GET", b"HTTP/1.1 204 No\r\nContent-Length: 47\r\n\r\n" + FORGED, b""),
    "304 with a body": (b"GET", b"HTTP/1.1 304 No\r\nContent-Length: 47\r\n\r\n" + FORGED, b""),
    "a few 1xx": (b"GET", b"HTTP/1.1 103 Hints\r\n\r\n" * 3 + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi"),
}


@pytest.mark.parametrize("name", CLEAN)
async def test_what_is_no_part_of_an_answer_is_dropped_and_the_next_request_gets_its_own(name: str) -> None:
    method, answer, body = CLEAN[name]
    async with running(Upstream(answer=answer), forward_mode=messages.ForwardMode.PROXY) as plane:
        plane.grant("http:*:http://evil.example/**", "llm:*")
        got = await then(plane, method)
        assert got.count(b"HTTP/1.1 ") == 2  # the same upstream answers both
        assert b"FORGED" not in got
        assert body in got
        if name.startswith(("204", "304")):
            assert b"content-length" not in got.lower()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nHELLO\r\nzz\r\n",
    ],
)
async def test_an_answer_that_is_not_as_it_said_resets_the_agent(answer: bytes) -> None:
    async with running(Upstream(answer=answer), forward_mode=messages.ForwardMode.PROXY) as plane:
        plane.grant("http:*:http://evil.example/**", "llm:*")
        assert await then(plane) == b"RESET"


# --- what was used


async def test_a_form_is_415_and_json_is_sent_as_json() -> None:
    upstream = Upstream()
    async with running(upstream) as plane:
        plane.grant("llm:m")
        form = chat().replace(b"application/json", b"application/x-www-form-urlencoded")
        assert (await plane.exchange(form)).startswith(b"HTTP/1.1 415 ")
        assert (plane.asks, upstream.connections) == ([], 0)
        for head in (b"Content-Type: application/json; charset=utf-8\r\n", b""):
            bare = chat().replace(b"Content-Type: application/json\r\n", head)
            assert (await plane.exchange(bare)).startswith(b"HTTP/1.1 200 ")
        for received in upstream.received:
            assert received.lower().count(b"content-type: application/json\r\n") == 1


async def test_the_ask_says_what_a_call_may_use_and_what_was_taken_out() -> None:
    upstream = Upstream()
    async with running(upstream) as plane:
        plane.grant("llm:m")
        call = chat(max_tokens=5, max_completion_tokens=100, n=3, router_settings_override={}, tools=[{"type": "mcp"}])
        assert (await plane.exchange(call)).startswith(b"HTTP/1.1 200 ")
        request = plane.asks[0].request
        assert (request.max_tokens, request.choices) == (300, 3)
        assert request.input_tokens > 0
        assert set(request.dropped) == {"router_settings_override", "tool:mcp"}
        assert b"router" not in upstream.received[0]
        assert b"mcp" not in upstream.received[0]


async def test_usage_of_an_answer_that_was_cut_is_unknown_and_of_a_whole_one_is_told() -> None:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7}}\n\ndata: [DONE]\n\n'
    begun = b'data: {"choices":[{"delta":{"content":"hello"}}]}\n\n'
    go_on = asyncio.Event()

    async def gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        # All of it: closing with a body unread would reset the connection, and the answer could be lost.
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + begun)
        await writer.drain()
        await go_on.wait()
        writer.write(usage)
        await writer.drain()

    async with running(Upstream(handler=gateway)) as plane:
        plane.grant("llm:m")
        reader, writer = await asyncio.open_connection("127.0.0.1", plane.port)
        writer.write(chat(stream=True))
        async with asyncio.timeout(5):
            await reader.readuntil(b"hello")
        endpoint = writer.get_extra_info("socket")
        endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        cut = (await until(lambda: plane.outcomes))[0]
        assert cut.bytes_up > 0
        assert cut.usage is None
        go_on.set()
        assert b"[DONE]" in await plane.exchange(chat(stream=True))
        await until(lambda: len(plane.outcomes) == 2)
        used = plane.outcomes[1].usage
        assert used is not None
        assert (used.input_tokens, used.output_tokens, used.estimated) == (11, 7, False)


async def test_a_whole_answer_that_says_nothing_of_its_usage_counts_as_what_was_set_aside() -> None:
    stream = b'data: {"choices":[{"delta":{"content":"hello"}}]}\n\ndata: [DONE]\n\n'
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + stream
    async with running(Upstream(answer=answer)) as plane:
        plane.grant("llm:m")
        assert b"[DONE]" in await plane.exchange(chat(stream=True, max_tokens=500, n=2))
        used = (await until(lambda: plane.outcomes))[0].usage
        assert used is not None
        assert (used.output_tokens, used.estimated) == (1000, True)


async def test_a_gateway_that_breaks_off_leaves_the_usage_unknown() -> None:
    broken = b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices":[]'
    async with running(Upstream(answer=broken)) as plane:
        plane.grant("llm:m")
        with pytest.raises(ConnectionResetError):
            await plane.exchange(chat())
        assert (await until(lambda: plane.outcomes))[0].usage is None


async def test_an_array_of_events_is_metered() -> None:
    events = [{"candidates": [{"content": {"parts": [{"text": "hi"}]}}]}] * 2
    body = json.dumps([*events, {"usageMetadata": {"promptTokenCount": 11, "candidatesTokenCount": 7}}]).encode()
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    async with running(Upstream(answer=answer)) as plane:
        plane.grant("llm:*")
        call = chat().replace(b"/v1/chat/completions", b"/v1beta/models/g:streamGenerateContent")
        assert body in await plane.exchange(call)
        used = (await until(lambda: plane.outcomes))[0].usage
        assert used is not None
        assert (used.input_tokens, used.output_tokens, used.estimated) == (11, 7, False)
