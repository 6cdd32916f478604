"""Sinks with real receivers: a file, datagram and stream syslogs, a collector; each dies or refuses in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import os
import pwd
import shutil
import signal
import socket
import ssl
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from supervisord.actions.log import ActionLog
from supervisord.actions.types import Action
from supervisord.config import Config, LogConfig, SinkConfig, SinkKind
from supervisord.sinks import feed
from supervisord.sinks.feed import Sinks
from tests.support.site_authority import SiteAuthority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

SECONDS_MAX = 20.0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("state", "run/processes"):
        (tmp_path / name).mkdir(parents=True)
    # The sinks' user reaches sockets in here.
    for path in (tmp_path, *tmp_path.parents[:-1]):
        with contextlib.suppress(PermissionError):
            path.chmod(path.stat().st_mode | 0o011)
    return tmp_path


@pytest.fixture
async def log(directory: Path) -> AsyncIterator[ActionLog]:
    opened = ActionLog.open(directory / "log", directory / "key", now_ns=time.time_ns)
    yield opened
    await opened.close()


def sinks(directory: Path, log: ActionLog, **sink: Any) -> Sinks:
    config = replace(
        Config(),
        state_dir=directory / "state",
        run_dir=directory / "run",
        log=LogConfig(sinks=(SinkConfig(name="s", **sink),)),
    )
    return Sinks(config, log, now=time.monotonic)


@contextlib.asynccontextmanager
async def running(made: Sinks) -> AsyncIterator[Sinks]:
    made.start()
    try:
        yield made
    finally:
        await made.stop()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - it is about files and foreign sockets
            await asyncio.sleep(0.02)


async def act(log: ActionLog, first: int, count: int) -> None:
    await log.append_all(
        [
            Action("ag_a", "agent:ag_a", "egress.request", f"GET http://a.example/{n}\n<13>1 forged", "allowed")
            for n in range(first, first + count)
        ]
    )


def sequence(lines: list[bytes]) -> list[int]:
    return [json.loads(line[line.index(b"{") :])["seq"] for line in lines]


def pid_of(directory: Path) -> int:
    return int(json.loads((directory / "run/processes/sink-s.json").read_text())["pid"])


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def network_of(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


# --- files


def whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


async def test_a_file_gets_every_entry_also_when_its_process_is_killed(directory: Path, log: ActionLog) -> None:
    path = directory / "out.jsonl"
    async with running(sinks(directory, log, kind=SinkKind.JSONL, path=path)) as made:
        await act(log, 0, 200)
        await until(lambda: len(whole_lines(path)) >= 200)
        status = status_of(pid_of(directory))
        uid = str(pwd.getpwnam("stockade-sinks").pw_uid)
        assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}" in status
        for fact in ("CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
            assert fact in status
        assert network_of(pid_of(directory)) != network_of(os.getpid())
        os.kill(pid_of(directory), signal.SIGKILL)
        await act(log, 200, 100)
        await until(lambda: made.states()[0].behind == 0)
    assert sorted(set(sequence(whole_lines(path)))) == list(range(1, 301))
    assert not (directory / "run/processes/sink-s.json").exists()
    # Another life goes on where this one ended: nothing twice after an orderly stop.
    count = len(whole_lines(path))
    await act(log, 300, 1)
    async with running(sinks(directory, log, kind=SinkKind.JSONL, path=path)):
        await until(lambda: len(whole_lines(path)) > count)
    assert sequence(whole_lines(path))[count:] == [301]


async def test_a_file_that_was_moved_away_is_made_again_and_a_half_line_is_ended(
    directory: Path, log: ActionLog
) -> None:
    path = directory / "out.ocsf"
    path.write_bytes(b'{"half')
    async with running(sinks(directory, log, kind=SinkKind.OCSF, path=path)) as made:
        await act(log, 0, 3)
        await until(lambda: made.states()[0].behind == 0)
        assert whole_lines(path)[0] == b'{"half'
        events = [json.loads(line) for line in whole_lines(path)[1:]]
        assert [event["metadata"]["sequence"] for event in events] == [1, 2, 3]
        path.rename(directory / "rotated")
        await act(log, 3, 2)
        await until(lambda: made.states()[0].behind == 0)
    assert [json.loads(line)["metadata"]["sequence"] for line in whole_lines(path)] == [4, 5]
    assert [entry.action.verb for entry in await log.query(verb="log.sink")] == []


async def test_a_link_in_the_place_of_the_file_is_not_followed(directory: Path, log: ActionLog) -> None:
    secret = directory / "secret"
    secret.write_text("whole\n")
    (directory / "out").symlink_to(secret)
    async with running(sinks(directory, log, kind=SinkKind.JSONL, path=directory / "out")) as made:
        await act(log, 0, 1)
        await until(lambda: made.states()[0].cause)
    assert secret.read_text() == "whole\n"


# --- syslog


@contextlib.contextmanager
def datagrams(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        path.chmod(0o666)
        receiver.setblocking(False)
        yield receiver
    path.unlink(missing_ok=True)


def drain(receiver: socket.socket, into: list[bytes]) -> list[bytes]:
    with contextlib.suppress(BlockingIOError):
        while True:
            into.append(receiver.recv(1 << 20))
    return into


async def test_a_syslog_that_restarts_gets_every_entry_and_its_failing_is_told(
    directory: Path, log: ActionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "BACKOFF_SECONDS", (0.05,))
    path = directory / "log.sock"
    got: list[bytes] = []
    async with running(sinks(directory, log, kind=SinkKind.SYSLOG, address=f"unix:{path}")) as made:
        with datagrams(path) as receiver:
            await act(log, 0, 50)
            await until(lambda: len(drain(receiver, got)) >= 50)
        began = time.monotonic()
        await act(log, 50, 50)
        assert time.monotonic() - began < 2  # nobody who records waits for a sink
        await until(lambda: made.states()[0].failing)
        assert made.states()[0].cause
        with datagrams(path) as receiver:
            await until(lambda: drain(receiver, got) and made.states()[0].behind == 0)
            drain(receiver, got)
            assert not made.states()[0].failing
    assert set(sequence(got)) >= set(range(1, 101))
    assert all(line.startswith(b"<") and b"\n" not in line for line in got)
    assert [entry.action.verdict for entry in await log.query(verb="log.sink")] == ["failed", "done"]


async def test_syslog_over_udp(directory: Path, log: ActionLog) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.setblocking(False)
        got: list[bytes] = []
        address = f"udp:localhost:{receiver.getsockname()[1]}"
        async with running(sinks(directory, log, kind=SinkKind.SYSLOG, address=address)):
            await act(log, 0, 10)
            await until(lambda: len(drain(receiver, got)) >= 10)
    assert sequence(got) == list(range(1, 11))


async def test_syslog_over_tcp_counts_octets_and_connects_again(directory: Path, log: ActionLog) -> None:
    received = bytearray()
    clients: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clients.append(writer)
        start = len(received)
        while data := await reader.read(65536):
            received.extend(data)
        del received[start + whole(received[start:])[1] :]
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"tcp:127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with running(sinks(directory, log, kind=SinkKind.SYSLOG, address=address)) as made:
        await act(log, 0, 20)
        # Sent is not yet accepted: what it says of a queue is the kernel's word.
        await until(lambda: made.states()[0].behind == 0 and bool(clients))
        clients[0].transport.abort()
        with contextlib.suppress(OSError):
            await clients[0].wait_closed()  # what goes into a connection that is just dying is lost: TCP says nothing
        await act(log, 20, 20)
        await until(lambda: set(sequence(whole(received)[0])) >= set(range(1, 41)))
    server.close()
    assert len(clients) >= 2


def whole(data: bytes | bytearray) -> tuple[list[bytes], int]:
    """Messages framed as `LENGTH SP MESSAGE`, and how many bytes those take."""
    found, at = [], 0
    while (space := data.find(b" ", at)) > 0 and space + 1 + int(data[at:space]) <= len(data):
        end = space + 1 + int(data[at:space])
        found.append(bytes(data[space + 1 : end]))
        at = end
    return found, at


# --- OTLP


class Collector(http.server.BaseHTTPRequestHandler):
    refuse = 0
    got: ClassVar[list[dict[str, Any]]]
    header: ClassVar[str]

    def do_POST(self) -> None:
        document = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        kind.header = self.headers.get("X-Token", "")
        status = 200
        if kind.refuse > 0:
            kind.refuse -= 1
            status = 503
        else:
            kind.got += document["resourceLogs"][0]["scopeLogs"][0]["logRecords"]
        self.send_response(status)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        return


async def test_a_collector_that_refuses_for_a_while_gets_every_entry(
    directory: Path, log: ActionLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "BACKOFF_SECONDS", (0.05,))

    class One(Collector):
        got: ClassVar[list[dict[str, Any]]] = []
        header = ""
        refuse = 4

    collector = One
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), collector)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    header = directory / "header"
    header.write_text("X-Token: secret\n")
    header.chmod(0o600)
    url = f"http://127.0.0.1:{server.server_port}/v1/logs"
    try:
        async with running(sinks(directory, log, kind=SinkKind.OTLP, url=url, header_file=header)) as made:
            await act(log, 0, 300)
            await until(lambda: collector.got and made.states()[0].behind == 0)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    numbers = [
        int(item["value"]["intValue"])
        for each in collector.got
        for item in each["attributes"]
        if item["key"] == "stockade.seq"
    ]
    assert set(numbers) >= set(range(1, 301))
    assert collector.header == "secret"
    told = [entry.action for entry in await log.query(verb="log.sink")]
    assert [action.verdict for action in told] == ["failed", "done"]
    assert "503" in told[0].reason


# --- TLS


class SecureSyslog:
    """Takes whatever syslog over TLS (RFC 5425) sends, as its context allows."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.received = bytearray()
        self.shown: list[object] = []  # what each client showed
        self._context = context

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        return f"tcp:localhost:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.shown.append(writer.get_extra_info("peercert"))
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                self.received.extend(data)
        writer.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> SiteAuthority:
    return SiteAuthority.make(tmp_path_factory.mktemp("sktest-tls"))


@pytest.fixture(scope="module")
def client(authority: SiteAuthority) -> Path:
    authority.context("sinks.example")
    file = authority.directory / "sinks.example.pem"
    file.chmod(0o600)
    return file


def asking_for_certificates(authority: SiteAuthority) -> ssl.SSLContext:
    context = authority.context("localhost")
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(authority.ca)
    return context


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_syslog_over_tls(
    directory: Path, log: ActionLog, authority: SiteAuthority, version: ssl.TLSVersion
) -> None:
    context = authority.context("localhost")
    context.minimum_version = context.maximum_version = version
    server = SecureSyslog(context)
    async with server as address:
        about = {"kind": SinkKind.SYSLOG, "address": address, "tls": True, "ca_file": authority.ca}
        async with running(sinks(directory, log, **about)) as made:
            await act(log, 0, 300)
            await until(lambda: made.states()[0].behind == 0)
            assert "CapEff:\t0000000000000000" in status_of(pid_of(directory))
            await until(lambda: len(whole(server.received)[0]) >= 300)
    assert sequence(whole(server.received)[0]) == list(range(1, 301))
    assert b"egress.request" in server.received


@pytest.mark.parametrize(
    ("name", "ca"), [("localhost", "another"), ("localhost", "none"), ("other.example", "its own")]
)
async def test_a_syslog_that_is_not_the_one_named_gets_nothing(
    directory: Path, log: ActionLog, authority: SiteAuthority, name: str, ca: str
) -> None:
    (directory / "other").mkdir()
    believed = {"another": SiteAuthority.make(directory / "other").ca, "none": None, "its own": authority.ca}[ca]
    server = SecureSyslog(authority.context(name))
    async with server as address:
        about = {"kind": SinkKind.SYSLOG, "address": address, "tls": True, "ca_file": believed}
        async with running(sinks(directory, log, **about)) as made:
            await act(log, 0, 3)
            await until(lambda: made.states()[0].cause)
            state = made.states()[0]
    assert ("Hostname mismatch" if name != "localhost" else "certificate verify failed") in state.cause
    assert (state.delivered_seq, bytes(server.received)) == (0, b"")


async def test_a_syslog_that_does_not_speak_tls_gets_no_entry(directory: Path, log: ActionLog) -> None:
    received = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.extend(await reader.read(65536))
        writer.write(b"what?\r\n")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    address = f"tcp:localhost:{server.sockets[0].getsockname()[1]}"
    async with running(sinks(directory, log, kind=SinkKind.SYSLOG, address=address, tls=True)) as made:
        await act(log, 0, 3)
        await until(lambda: made.states()[0].cause)
        assert made.states()[0].delivered_seq == 0
    server.close()
    assert received
    assert b"egress.request" not in received


async def test_a_syslog_that_wants_a_certificate_takes_entries_with_one_only(
    directory: Path, log: ActionLog, authority: SiteAuthority, client: Path
) -> None:
    server = SecureSyslog(asking_for_certificates(authority))
    async with server as address:
        about: dict[str, Any] = {"kind": SinkKind.SYSLOG, "address": address, "tls": True, "ca_file": authority.ca}
        await act(log, 0, 20)
        async with running(sinks(directory, log, **about)) as made:
            await until(lambda: made.states()[0].cause)
            # Nothing counts as taken that the server never read.
            assert (made.states()[0].delivered_seq, bytes(server.received)) == (0, b"")
        about |= {"cert_file": client, "key_file": client}
        async with running(sinks(directory, log, **about)) as made:
            await until(lambda: made.states()[0].behind == 0)
        await until(lambda: len(whole(server.received)[0]) >= 20)
    assert sequence(whole(server.received)[0]) == list(range(1, 21))
    assert server.shown


async def test_a_key_that_others_may_read_is_not_used(
    directory: Path, log: ActionLog, authority: SiteAuthority, client: Path
) -> None:
    key = directory / "open.pem"
    shutil.copy(client, key)
    key.chmod(0o640)
    server = SecureSyslog(asking_for_certificates(authority))
    async with server as address:
        about = {"kind": SinkKind.SYSLOG, "address": address, "tls": True, "ca_file": authority.ca}
        async with running(sinks(directory, log, **about, cert_file=client, key_file=key)) as made:
            await act(log, 0, 1)
            await until(lambda: made.states()[0].cause)
    assert "chmod 600" in made.states()[0].cause
    assert server.shown == []


async def test_a_collector_over_https_with_an_authority_and_a_certificate(
    directory: Path, log: ActionLog, authority: SiteAuthority, client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "BACKOFF_SECONDS", (0.05,))

    class One(Collector):
        got: ClassVar[list[dict[str, Any]]] = []
        header = ""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), One)
    # The handshake is the handler's thread's, so that one that fails does not end the server.
    context = asking_for_certificates(authority)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    monkeypatch.setattr(server, "handle_error", lambda *_: None)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    about: dict[str, Any] = {"kind": SinkKind.OTLP, "url": f"https://localhost:{server.server_port}/v1/logs"}
    try:
        await act(log, 0, 200)
        # Without a certificate of its own: the alert says so, where the server's end does not come before it.
        for more, cause in (({}, "certificate verify failed"), ({"ca_file": authority.ca}, "")):
            async with running(sinks(directory, log, **about, **more)) as made:
                await until(lambda made=made: made.states()[0].cause)  # type: ignore[misc]
                assert cause in made.states()[0].cause
                assert (made.states()[0].delivered_seq, One.got) == (0, [])
        about |= {"ca_file": authority.ca, "cert_file": client, "key_file": client, "tls": True}
        async with running(sinks(directory, log, **about)) as made:
            await until(lambda: made.states()[0].behind == 0)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    assert len(One.got) >= 200


async def test_a_cursor_of_another_log_sends_everything_again(directory: Path, log: ActionLog) -> None:
    (directory / "state" / "sinks").mkdir()
    (directory / "state" / "sinks" / "s.cursor").write_text(f"2 {'00' * 32}\n")
    await act(log, 0, 4)
    path = directory / "out"
    async with running(sinks(directory, log, kind=SinkKind.JSONL, path=path)) as made:
        await until(lambda: made.states()[0].behind == 0)
    assert sequence(whole_lines(path)) == [1, 2, 3, 4]


async def test_what_was_retired_before_a_sink_took_it_is_told(directory: Path, log: ActionLog) -> None:
    await act(log, 0, 5)
    await log.close()
    reopened = ActionLog.open(directory / "log", directory / "key", now_ns=time.time_ns, segment_bytes=1000)
    path = directory / "out"
    try:
        for number in range(10):
            await act(reopened, number, 1)
            await reopened.checkpoint()
        await reopened.retire(keep_seconds=0, keep_bytes=1500)
        first = reopened.first_seq
        assert first > 1
        async with running(sinks(directory, reopened, kind=SinkKind.JSONL, path=path)) as made:
            await until(lambda: made.states()[0].behind == 0)
        (told,) = await reopened.query(verb="log.sink")
    finally:
        await reopened.close()
    assert sequence(whole_lines(path)) == list(range(first, reopened.size + 1))
    assert told.action.reason == f"entries 1 to {first - 1} were retired before it took them"
