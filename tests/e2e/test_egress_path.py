"""An agent's request through the real worker and dialer to a real server: allowed, denied, streamed, cut."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gateway_client.egress import messages
from tests.support.egress_plane import AGENT, WORKER, Upstream, running, until

if TYPE_CHECKING:
    from collections.abc import Iterator

CHAT = b'{"model":"m1","messages":[],"api_base":"http://evil","user":"root","metadata":{"tags":["a"]}}'


def post(path: str, body: bytes, *extra: str, host: str = "gateway.internal:3128") -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}", "Connection: close", *extra]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def parts(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    return int(lines[0].split(" ")[1]), headers, body


async def test_a_granted_model_call_reaches_the_gateway_with_our_credential_and_none_of_the_agents() -> None:
    upstream = Upstream()
    async with running(upstream) as plane:
        plane.grant("llm:m*")
        answer = await plane.exchange(
            post("/v1/chat/completions", CHAT, "Authorization: Bearer agent", "X-LiteLLM-Tags: a", "X-Api-Key: agent")
        )
        status, _, body = parts(answer)
        assert (status, body) == (200, b"{}")
        head, _, sent = upstream.received[0].partition(b"\r\n\r\n")
        assert b"authorization: Bearer sk-secret" in head
        assert b"agent" not in head
        assert b"litellm" not in head.lower()
        assert json.loads(sent) == {"model": "m1", "messages": []}
        outcome = await until(lambda: plane.outcomes[0] if plane.outcomes else None)
        assert (outcome.status, outcome.error) == (200, "")
        assert outcome.usage.model == "m1"


async def test_a_call_without_a_grant_is_a_problem_that_names_the_scope_and_nothing_goes_up() -> None:
    upstream = Upstream()
    async with running(upstream) as plane:
        plane.grant("llm:other")
        status, headers, body = parts(await plane.exchange(post("/v1/chat/completions", CHAT)))
        problem = json.loads(body)
        assert (status, headers["content-type"]) == (403, "application/problem+json")
        assert problem["scope"] == "llm:m1"
        assert problem["reason_code"] == "scope_missing"
        assert problem["request"] == "POST http://gateway.internal:3128/v1/chat/completions"
        assert problem["ask"]["url"].endswith("/.stockade/v1/requests")
        await until(lambda: plane.outcomes)
        assert plane.outcomes[0].status == 403
        assert upstream.connections == 0


async def test_the_worker_has_given_up_everything() -> None:
    async with running(Upstream()) as plane:
        assert plane.ready is not None
        assert plane.dialer_ready is not None
        for process in (plane.worker_process, plane.dialer_process):
            with open(f"/proc/{process.pid}/status", encoding="ascii") as file:  # noqa: ASYNC230, PTH123 - procfs
                status = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
            assert "0" not in status["Uid"].split()
            assert (int(status["CapEff"], 16), int(status["CapBnd"], 16)) == (0, 0)
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


async def test_server_sent_events_arrive_one_by_one() -> None:
    go_on = asyncio.Event()

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"8\r\ndata: 1\n\r\n")
        await go_on.wait()
        writer.write(b"8\r\ndata: 2\n\r\n0\r\n\r\n")
        await writer.drain()

    async with running(Upstream(handler=handler)) as plane:
        plane.grant("llm:*")
        reader, writer = await asyncio.open_connection("127.0.0.1", plane.port)
        writer.write(post("/v1/chat/completions", b'{"model":"m1","stream":true}'))
        async with asyncio.timeout(5):
            assert (await reader.readuntil(b"data: 1\n")).startswith(b"HTTP/1.1 200")
            go_on.set()
            assert (await reader.read(-1)).endswith(b"data: 2\n\r\n0\r\n\r\n")
        writer.close()


def sockets(pid: int) -> int:
    return sum(str(entry.readlink()).startswith("socket:") for entry in Path(f"/proc/{pid}/fd").iterdir())


async def test_a_cut_that_comes_right_behind_the_order_to_dial_leaves_no_connection() -> None:
    upstream = Upstream()
    ended = asyncio.Event()
    opened = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        opened.set()
        await reader.read()
        ended.set()

    upstream.handler = hold
    async with running(upstream) as plane:
        before = -1
        while before != sockets(plane.dialer_process.pid):  # until it has all that it is given at the start
            before = sockets(plane.dialer_process.pid)
            await asyncio.sleep(0.2)
        for x in range(1, 9):
            plane.to_dialer(messages.Dial(WORKER, x, AGENT, messages.Upstream.API))
        plane.to_dialer(messages.CutUpstreams(AGENT))
        before -= 1  # the agent's listener goes with it
        await until(lambda: plane.cuts)
        await until(lambda: len(plane.dialed) == 8)
        await until(lambda: sockets(plane.dialer_process.pid) == before)
        # The twin: the same order without the cut opens one, and a cut by exchange ends that one, worker or no worker.
        os.kill(plane.worker_process.pid, signal.SIGSTOP)
        plane.to_dialer(messages.Dial(WORKER, 20, AGENT, messages.Upstream.API))
        plane.to_dialer(messages.Dial(WORKER, 21, AGENT, messages.Upstream.API))
        await until(lambda: {dialed.x for dialed in plane.dialed if dialed.ok} >= {20, 21})
        await asyncio.wait_for(opened.wait(), 5)
        assert not ended.is_set()
        plane.to_dialer(messages.CutExchanges(WORKER, (20, 99), token=7))
        await until(lambda: plane.exchanges_cut)
        assert plane.exchanges_cut == [messages.ExchangesCut(7, relays=1)]
        await asyncio.wait_for(ended.wait(), 5)
        os.kill(plane.worker_process.pid, signal.SIGCONT)


@pytest.fixture
def shared_directory() -> Iterator[Path]:
    """One that another user can reach a socket in."""
    with tempfile.TemporaryDirectory(prefix="sktest-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


async def test_a_cut_finds_what_a_gateway_sent_before_it_hung_up(shared_directory: Path) -> None:
    sent, gone = b"x" * 40_000, asyncio.Event()

    async def send_and_go(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        writer.close()
        gone.set()

    path, upstream = shared_directory / "gateway.sock", Upstream()
    server = await asyncio.start_unix_server(upstream.serve, path)
    path.chmod(0o666)
    async with server, running(upstream, gateway=f"unix:{path}") as plane:
        plane.grant("llm:*")
        # The twin: of an exchange that is over nothing is left to cut.
        assert (await plane.exchange(post("/v1/chat/completions", CHAT))).startswith(b"HTTP/1.1 200")
        await until(lambda: plane.outcomes)
        os.kill(plane.worker_process.pid, signal.SIGSTOP)
        upstream.handler = send_and_go
        plane.to_dialer(messages.Dial(WORKER, 20, AGENT, messages.Upstream.API))
        await until(lambda: len(plane.dialed) == 2)
        await asyncio.wait_for(gone.wait(), 5)
        plane.to_dialer(messages.CutUpstreams(AGENT))
        (cut,) = await until(lambda: plane.cuts)
        assert (cut.relays, cut.bytes_waiting) == (1, len(sent))
        os.kill(plane.worker_process.pid, signal.SIGCONT)


async def test_nothing_is_sent_for_an_agent_that_was_frozen_while_it_was_asked() -> None:
    upstream, asked = Upstream(), asyncio.Event()
    async with running(upstream) as plane:
        plane.grant("llm:*")

        def judge(_ask: messages.Ask) -> messages.Verdict | None:
            asked.set()
            return None

        for frozen in (False, True):
            asked.clear()
            plane.answer = judge
            waiting = asyncio.create_task(plane.exchange(post("/v1/chat/completions", CHAT)))
            await asyncio.wait_for(asked.wait(), 5)
            if frozen:
                plane.to_worker(messages.Freeze(AGENT))
            plane.answer = None
            plane._judge(plane.asks[-1])
            answer = await waiting
            assert answer.startswith(b"HTTP/1.1 503 " if frozen else b"HTTP/1.1 200 ")
            assert len(upstream.received) == 1, "the twin alone"
        assert (await until(lambda: len(plane.outcomes) == 2 and plane.outcomes))[1].bytes_up == 0
