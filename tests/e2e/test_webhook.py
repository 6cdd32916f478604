"""The webhook: a receiver on loopback hears of every request: signed, in order, again after a failure, no secret."""

from __future__ import annotations

import hashlib
import hmac
import http.server
import json
import os
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest

from tests.support.instance import Instance
from tests.support.people import pending, root

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from stockade.client import Stockade

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")

KEY = "a-key-that-nobody-guesses-0123456789"
ASK = "curl -sS $STOCKADE_GATEWAY_URL/.stockade/v1/requests"


class Receiver:
    """Answers with `status`, and keeps what came with it: headers, body, and the status that was given."""

    def __init__(self) -> None:
        self.status = 200
        self.came: list[tuple[dict[str, str], bytes, int]] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = int(self._server.server_port)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def taken(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body, status in self.came if status == 200]

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = receiver.status
                receiver.came.append((dict(self.headers), body, status))
                self.send_response(status)
                self.send_header("Location", f"http://127.0.0.1:{receiver.port}/elsewhere")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Keep quiet."""

        return Handler


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def stockade(receiver: Receiver) -> Iterator[Instance]:
    with tempfile.NamedTemporaryFile("w", prefix="webhook-key-") as key:
        key.write(f"{KEY}\n")
        key.flush()
        table = (
            f'[requests]\nwebhook_url = "http://localhost:{receiver.port}/hook"\nwebhook_secret_file = "{key.name}"\n'
        )
        with Instance.start(table) as instance:
            yield instance


@pytest.fixture(scope="module")
def client(stockade: Instance) -> Iterator[Stockade]:
    with root(stockade) as client:
        yield client


def asker(client: Stockade, name: str, path: str) -> str:
    script = f'{ASK} -d \'{{"scope": "http:GET:http://a.example/{path}", "reason": "why {path}"}}\'; sleep 1000'
    client.launch(["sh", "-c", script], name=name)
    return name


def check(headers: dict[str, str], body: bytes) -> None:
    stamp = headers["Stockade-Timestamp"]
    wanted = hmac.new(KEY.encode(), stamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert headers["Stockade-Signature"] == f"sha256={wanted}"
    assert abs(time.time() - int(stamp)) < 60
    assert headers["Stockade-Delivery"] == json.loads(body)["event_id"]


def test_every_change_is_told_signed_and_in_order(stockade: Instance, client: Stockade, receiver: Receiver) -> None:
    receiver.came.clear()
    asker(client, "one", "a")
    first = pending(stockade, client, "one")
    client.approve(first.request_id, digest=first.digest)
    asker(client, "two", "b")
    second = pending(stockade, client, "two")
    client.deny(second.request_id, "no")
    stockade.wait(lambda: len(receiver.came) == 4)
    told = receiver.taken()
    assert [(each["event"], each["request"]["request_id"]) for each in told] == [
        ("request.created", first.request_id),
        ("request.approved", first.request_id),
        ("request.created", second.request_id),
        ("request.denied", second.request_id),
    ]
    assert told[0]["request"]["digest"] == first.digest
    assert told[0]["request"]["reason"] == "why a"
    assert told[1]["request"]["decided_by"] == "uid:0(root)"
    assert told[3]["request"]["answer"] == "no"
    for headers, body, _ in receiver.came:
        check(headers, body)
        assert KEY.encode() not in body + json.dumps(headers).encode()
    # Without the key there is no signature, and it is nowhere but with root and the sender.
    with pytest.raises(AssertionError):
        check({**receiver.came[0][0], "Stockade-Timestamp": "1"}, receiver.came[0][1])
    assert KEY not in json.dumps(stockade.actions())
    assert KEY not in stockade.daemon_log()


def test_what_is_not_taken_is_sent_again_and_nothing_waits_for_it(
    stockade: Instance, client: Stockade, receiver: Receiver
) -> None:
    receiver.came.clear()
    receiver.status = 302
    asker(client, "three", "c")
    request = pending(stockade, client, "three")
    began = time.monotonic()
    client.deny(request.request_id, "later")
    assert time.monotonic() - began < 5  # the daemon waits for no receiver
    stockade.wait(lambda: len(receiver.came) >= 2)
    # A redirect is no taking, and is not followed.
    assert {json.loads(body)["event"] for _, body, _ in receiver.came} == {"request.created"}
    receiver.status = 200
    stockade.wait(lambda: len(receiver.taken()) == 2, 20)
    assert [each["event"] for each in receiver.taken()] == ["request.created", "request.denied"]
    assert len({headers["Stockade-Delivery"] for headers, _, _ in receiver.came}) == 2


def test_the_sender_has_nothing_and_comes_back(stockade: Instance, client: Stockade, receiver: Receiver) -> None:
    receiver.came.clear()
    record = stockade.run_dir / "processes" / "webhook.json"
    pid = int(json.loads(record.read_text())["pid"])
    status = Path(f"/proc/{pid}/status").read_text()
    facts = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert "0" not in facts["Uid"].split()
    assert (facts["CapEff"].strip("0"), facts["NoNewPrivs"], facts["Seccomp"]) == ("", "1", "2")
    os.kill(pid, signal.SIGKILL)
    asker(client, "four", "d")

    def of_four() -> list[str]:  # what was taken just before may come twice
        return [each["event"] for each in receiver.taken() if each["request"]["agent_name"] == "four"]

    stockade.wait(of_four)
    assert of_four() == ["request.created"]
    assert int(json.loads(record.read_text())["pid"]) != pid


def test_a_key_that_others_can_read_is_no_key(tmp_path: Path, receiver: Receiver) -> None:
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o644)
    table = f'[requests]\nwebhook_url = "http://127.0.0.1:{receiver.port}/"\nwebhook_secret_file = "{key}"\n'
    with pytest.raises(AssertionError, match="others than its owner may open it"), Instance.start(table):
        pass
