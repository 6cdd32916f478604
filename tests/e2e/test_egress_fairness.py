"""One agent's bytes, however dear to parse, cost the others of its worker next to nothing; nor do its descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway_client.egress import messages
from gateway_client.egress.bodyjson import values_max
from tests.support.egress_plane import Plane, Upstream, running, until

MODELS = b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal:3128\r\nConnection: close\r\n\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway.internal:3128\r\n"
rss_bytes_max = 160 * 1024 * 1024
slack_seconds = 0.01  # the median is 2 to 5 ms alone; without shares it is seconds
worst_seconds_max = 0.25
rounds_max = 5

ATTACKER = """
import socket, sys, threading, time
port, kind, count, end = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), time.time() + float(sys.argv[4])
POST = b"POST /v1/chat/completions HTTP/1.1\\r\\nHost: gateway.internal:3128\\r\\n"
def body(data):
    return POST + b"Connection: close\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(data) + data
ONCE = {
    "lists": body(b'{"model":"m","messages":[' + b"[]," * 5_592_000 + b"[]]}"),
    "allowed": body(b'{"model":"m","messages":[' + b'"",' * VALUES + b"0]}"),
    "heads": b"GET /v1/nothing HTTP/1.1\\r\\nHost: gateway.internal:3128\\r\\n"
        + b"".join(b"a%d: b\\r\\n" % n for n in range(120)) + b"\\r\\n",
}
CONNECT = b"CONNECT t.example:443 HTTP/1.1\\r\\nHost: t.example:443\\r\\n\\r\\n"
HELLO = b"\\x01" + (60000).to_bytes(3, "big") + b"\\x03\\x03" + b"r" * 32
RECORD = b"\\x16\\x03\\x01\\x00\\x01"
def attack():
    while time.time() < end:
        try:
            with socket.create_connection(("127.0.0.1", port)) as s:
                if kind in ONCE:
                    s.sendall(ONCE[kind])
                    while s.recv(65536): pass
                elif kind == "chunks":
                    s.sendall(POST + b"Transfer-Encoding: chunked\\r\\n\\r\\n")
                    while time.time() < end: s.sendall(b"1\\r\\nx\\r\\n" * 20000)
                else:
                    s.setsockopt(6, 1, 1)
                    s.sendall(CONNECT); s.recv(100)
                    s.sendall(b"".join(RECORD + HELLO[n:n + 1] for n in range(4)) + (RECORD + b"r") * 40000)
                    while time.time() < end: s.sendall(RECORD + b"r"); time.sleep(0.0005)
        except OSError: pass
for n in range(count): threading.Thread(target=attack, daemon=True).start()
print("ready", flush=True)
time.sleep(max(0, end - time.time()))
""".replace("VALUES", str(values_max - 100))


async def latencies(plane: Plane, seconds: float) -> list[float]:
    found = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.monotonic()
        assert (await plane.exchange(MODELS, seconds=20)).startswith(b"HTTP/1.1 200 ")
        found.append(time.monotonic() - begun)
        await asyncio.sleep(0.02)
    return found


def peak_bytes(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(("kind", "count"), [("chunks", 20), ("lists", 4), ("allowed", 4), ("heads", 20), ("tls", 20)])
async def test_a_flood_of_one_agent_is_not_felt_by_another(kind: str, count: int) -> None:
    async def gateway(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"CONNECT"):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            await reader.read()
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            await writer.drain()

    async with running(Upstream(handler=gateway), forward_mode=messages.ForwardMode.PROXY) as plane:
        plane.grant("llm:*", "tls:t.example:443")
        port = plane.listen("ag_evil")
        quiet = statistics.median(await latencies(plane, 0.5))
        felt = []
        for _ in range(
            rounds_max
        ):  # another load on the host may be felt now and then: what the worker does is, always
            loud = await under_attack(plane, port, kind, count)
            felt.append((statistics.median(loud), max(loud)))
            if felt[-1][0] < 3 * quiet + slack_seconds and felt[-1][1] < worst_seconds_max:
                break
        else:
            pytest.fail(f"quiet {quiet}; under attack, median and worst: {felt}")
        assert peak_bytes(plane.worker_process.pid) < rss_bytes_max


async def under_attack(plane: Plane, port: int, kind: str, count: int) -> list[float]:
    attacker = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ATTACKER, str(port), kind, str(count), "3", stdout=subprocess.PIPE
    )
    try:
        assert attacker.stdout is not None
        await attacker.stdout.readline()
        return await latencies(plane, 1.5)
    finally:
        attacker.kill()
        await attacker.wait()


async def test_crumbs_and_bombs_are_refused_and_ordinary_bodies_are_not() -> None:
    async with running(Upstream()) as plane:
        plane.grant("llm:*")
        head = POST + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        body = b'{"model":"m","messages":[{"content":"' + b"x" * 6000 + b'"}]}'
        crumbs = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
        got = await plane.exchange(head + crumbs)
        assert got.startswith(b"HTTP/1.1 400 ")
        assert b"chunks_too_small" in got
        pieces = b"".join(
            b"%x\r\n%s\r\n" % (len(body[at : at + 40]), body[at : at + 40]) for at in range(0, len(body), 40)
        )
        assert (await plane.exchange(head + pieces + b"0\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        few = b"".join(b"1\r\n%c\r\n" % byte for byte in b'{"model":"m"}') + b"0\r\n\r\n"
        assert (await plane.exchange(head + few)).startswith(b"HTTP/1.1 200 ")
        bomb = b'{"model":"m","messages":[' + b"[]," * 100_000 + b"0]}"
        got = await plane.exchange(POST + b"Content-Length: %d\r\n\r\n" % len(bomb) + bomb)
        assert got.startswith(b"HTTP/1.1 413 ")
        assert b"body_too_complex" in got


async def test_one_agent_takes_not_all_descriptors_and_a_full_worker_goes_on_when_it_can() -> None:
    async with running(Upstream(), files_max=56) as plane:
        plane.grant("llm:*")
        evil = plane.listen("ag_evil")
        assert (await plane.exchange(MODELS)).startswith(b"HTTP/1.1 200 ")
        held = [await asyncio.open_connection("127.0.0.1", evil) for _ in range(80)]
        try:
            assert (await plane.exchange(MODELS)).startswith(b"HTTP/1.1 200 ")
        finally:
            for _, writer in held:
                writer.close()
        # Many agents together can still fill it: then it waits, and goes on.
        ports = [plane.listen(f"ag_{number}") for number in range(10)]
        await asyncio.sleep(0.1)
        held = [await asyncio.open_connection("127.0.0.1", port) for port in ports for _ in range(5)]
        open_files = Path(f"/proc/{plane.worker_process.pid}/fd")
        await until(lambda: len(list(open_files.iterdir())) >= 54)
        for _, writer in held:
            writer.close()

        async def served(port: int) -> bool:
            with contextlib.suppress(TimeoutError, ConnectionError):
                return (await plane.exchange(MODELS, port=port, seconds=2)).startswith(b"HTTP/1.1 200 ")
            return False

        for port in (plane.port, evil, *ports):
            deadline = time.monotonic() + 10
            while not await served(port):
                assert time.monotonic() < deadline
        assert plane.worker_process.poll() is None
