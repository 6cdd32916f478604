"""The embedded gateway's process: who may connect, what it gives up, how it ends, what it refuses to start with."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.embedded_gateway import EmbeddedGateway, preface_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

SECRET = "sk-sktest-never-shown"
GET_MODELS = b"GET /v1/models HTTP/1.1\r\nHost: gateway.internal\r\n\r\n"
NOBODY = 65534


@pytest.fixture(scope="module")
def gateway() -> Iterator[EmbeddedGateway]:
    models = [
        {"name": "stockade-scripted", "kind": "scripted"},
        {"name": "gpt-*", "kind": "openai", "url": "http://127.0.0.1:9/v1", "key": SECRET},
    ]
    with EmbeddedGateway(models=models) as running:
        assert running.ready["ready"], running.ready
        yield running


def exchange(connection: socket.socket, data: bytes) -> bytes:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(data)
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            answer += piece
            head, found, body = answer.rpartition(b"\r\n\r\n")
            if found and b"content-length: %d\r\n" % len(body) in head.lower() + b"\r\n":
                break
    return answer


def test_prefaced_connection_is_served(gateway: EmbeddedGateway) -> None:
    with gateway.connect() as connection:
        assert exchange(connection, GET_MODELS).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"\r\n\r\n\x00\r\nQUIT\nxxxxxxxxxxxxxxx",
        preface_bytes()[:-1],
        preface_bytes("api").replace(b'"api"', b'"all"'),
    ],
    ids=["none", "rubbish", "cut", "unknown allow"],
)
def test_without_a_preface_nothing_is_served(gateway: EmbeddedGateway, start: bytes) -> None:
    with gateway.connect(preface=start) as connection:
        assert exchange(connection, GET_MODELS) == b""


def test_other_uid_cannot_connect(gateway: EmbeddedGateway) -> None:
    pid = os.fork()
    if pid == 0:  # the attempt, as another user
        os.setresuid(NOBODY, NOBODY, NOBODY)
        try:
            gateway.connect()
        except PermissionError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_other_uid_is_refused_even_where_the_file_lets_it_connect() -> None:
    # Root passes every file mode, so only SO_PEERCRED is left.
    answer = b""
    closed_early = contextlib.suppress(BrokenPipeError, ConnectionResetError)  # before the first byte is written
    with EmbeddedGateway(allowed_uid=NOBODY) as gateway, closed_early, gateway.connect() as connection:
        answer = exchange(connection, GET_MODELS)
    assert answer == b""


def test_process_has_given_up_root(gateway: EmbeddedGateway) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{gateway.ready['pid']}/status").read_text().splitlines()
        if ":\t" in line
    )
    assert set(status["Uid"].split()) == {str(NOBODY)}
    assert status["Groups"].strip() == ""
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb")} == {0}
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"


def test_key_is_in_no_argument_environment_or_log(gateway: EmbeddedGateway) -> None:
    with gateway.connect() as connection:
        body = b'{"model":"gpt-x","messages":[{"role":"user","content":"hi"}]}'
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: %d\r\n\r\n" % len(body)
        answer = exchange(connection, head + body)
    assert answer.startswith(b"HTTP/1.1 502"), answer
    assert SECRET.encode() not in answer
    process = Path(f"/proc/{gateway.ready['pid']}")
    assert SECRET not in process.joinpath("cmdline").read_text() + process.joinpath("environ").read_text()
    with EmbeddedGateway(models=[{"name": "x", "kind": "openai", "url": "ftp://x", "key": SECRET}]) as failed:
        assert not failed.ready["ready"]
        assert SECRET not in failed.ready["error"]
    assert SECRET not in failed.stderr


def test_life_line_ends_it() -> None:
    with EmbeddedGateway() as gateway:
        gateway.life_line.shutdown(socket.SHUT_RDWR)
        assert gateway.process.wait(timeout=10) == 0


def test_stale_socket_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "gateway.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with EmbeddedGateway(socket_path=str(path)) as gateway:
        assert gateway.ready["ready"]
    path.unlink()
    path.write_text("precious")
    with EmbeddedGateway(socket_path=str(path)) as gateway:
        assert not gateway.ready["ready"]
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"modles": []}, "unknown key modles"),
        ({"models": [{"name": "x", "kind": "magic"}]}, "models[0]: kind must be one of"),
        ({"models": [{"name": "x", "kind": "scripted", "script": "nope"}]}, "no script 'nope'"),
        ({"scripted": {"a": {"rules": [{"when": {"user": "("}, "say": "x"}]}}}, "scripted.a.rules[0].when.user"),
        ({"hosts": {"a": "not an address"}}, "hosts.a"),
        ({"allow_networks": ["10.0.0.1/8"]}, "allow_networks[0]"),
        ({"user": "no-such-user"}, "cannot become no-such-user"),
        ({"models": [{"name": "x", "kind": "local", "path": "/nonexistent.gguf"}]}, "local model"),
    ],
)
def test_bad_config_names_the_place(config: dict[str, object], said: str) -> None:
    with EmbeddedGateway(**config) as gateway:
        assert not gateway.ready["ready"]
        assert said in gateway.ready["error"]
        assert gateway.process.wait(timeout=10) == 1


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /v1/models HTTP/1.1\r\n\r\n", b"400"),
        (b"NONSENSE\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 5_000 + b" HTTP/1.1\r\nHost: g\r\n\r\n", b"414"),
        (b"GET / HTTP/1.1\r\nHost: g\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", b"431"),
        (b"POST /v1/responses HTTP/1.1\r\nHost: g\r\nContent-Length: 99999999\r\n\r\n", b"413"),
        (b"POST /v1/responses HTTP/1.1\r\nHost: g\r\nContent-Length: 1\r\n\r\n{", b"400"),
        (b"POST /v1/responses HTTP/1.1\r\nHost: g\r\nContent-Length: 2\r\n\r\n[]", b"400"),
        (b"GET /key/generate HTTP/1.1\r\nHost: g\r\n\r\n", b"404"),
        (b"DELETE /v1/models HTTP/1.1\r\nHost: g\r\n\r\n", b"405"),
    ],
    ids=[
        "no host",
        "nonsense",
        "long target",
        "long head",
        "large body",
        "cut JSON",
        "no object",
        "unknown path",
        "unknown method",
    ],
)
def test_bad_request_is_answered_cleanly(gateway: EmbeddedGateway, request_bytes: bytes, status: bytes) -> None:
    with gateway.connect() as connection:
        answer = exchange(connection, request_bytes)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
    with gateway.connect() as connection:  # and the next one is served
        assert exchange(connection, GET_MODELS).startswith(b"HTTP/1.1 200")


def test_head_is_answered_without_a_body_and_the_connection_goes_on(gateway: EmbeddedGateway) -> None:
    with gateway.connect() as connection:
        connection.sendall(b"HEAD / HTTP/1.1\r\nHost: g\r\n\r\nHEAD /v1/models HTTP/1.1\r\nHost: g\r\n\r\n")
        answer = exchange(connection, GET_MODELS)
    assert [line.split()[1] for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")] == [
        b"404",
        b"200",
        b"200",
    ]
    assert answer.count(b'"object":"list"') == 1


def test_one_agents_connections_are_bounded(gateway: EmbeddedGateway) -> None:
    open_ones = [gateway.connect() for _ in range(256)]
    try:
        for connection in open_ones:  # each has been counted once it answered
            connection.sendall(GET_MODELS)
            assert connection.recv(12) == b"HTTP/1.1 200"
        with gateway.connect() as beyond:
            assert exchange(beyond, GET_MODELS) == b""
    finally:
        for connection in open_ones:
            connection.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with gateway.connect() as connection:
            if exchange(connection, GET_MODELS).startswith(b"HTTP/1.1 200"):
                return
    pytest.fail("the connections that ended still count")
