"""The process that tells an operator's URL what agents ask: `python -I -m supervisord.webhook_sender`, daemon on fd 3.

It speaks HTTP so that the daemon does not, as a user of its own without capabilities. It is told URL and key once, then
one event at a time, and says when that is delivered: a 2xx answer and nothing else. Redirects are not followed.
"""

from __future__ import annotations

import encodings.idna  # noqa: F401 - looked up by name at run time
import hashlib
import hmac
import http.client
import json
import os
import select
import signal
import socket
import ssl
import sys
import time
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from gateway_client.egress.confine import DIAL, STEADY, Confinement, confine

CHANNEL_FD: Final = 3
FRAME_BYTES_MAX: Final = 64 * 1024
ANSWER_BYTES_MAX: Final = 64 * 1024
ATTEMPT_SECONDS_MAX: Final = 10.0
PAUSE_SECONDS_MIN: Final = 0.5
PAUSE_SECONDS_MAX: Final = 60.0

# What getaddrinfo(3) does beside: it reads resolver files, loads its modules, and asks in datagrams.
RESOLVE: Final = ("openat", "bind", "sendmmsg", "uname", "readlink", "access")


@dataclass(frozen=True, slots=True)
class Target:
    url: str
    key: bytes


def signature(key: bytes, timestamp: str, body: bytes) -> str:
    """Give the value of Stockade-Signature: HMAC-SHA256 (RFC 2104) over the timestamp, a dot and the body."""
    return "sha256=" + hmac.new(key, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def pause_seconds(attempt: int) -> float:
    return float(min(PAUSE_SECONDS_MIN * 2.0 ** min(attempt, 16), PAUSE_SECONDS_MAX))


def attempt(target: Target, event: dict[str, object], *, now: float, tls: ssl.SSLContext) -> str:
    """Send an event once; give what went wrong, or an empty text where it was taken."""
    body = json.dumps(event, sort_keys=True).encode()
    timestamp = str(int(now))
    parts = urlsplit(target.url)
    host = parts.hostname or ""
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, parts.port, timeout=ATTEMPT_SECONDS_MAX, context=tls)
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=ATTEMPT_SECONDS_MAX)
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "stockade-webhook",
        "Stockade-Event": str(event["event"]),
        "Stockade-Delivery": str(event["event_id"]),
        "Stockade-Timestamp": timestamp,
        "Stockade-Signature": signature(target.key, timestamp, body),
        "Connection": "close",
    }
    try:
        connection.request("POST", parts.path or "/", body, headers)
        answer = connection.getresponse()
        answer.read(ANSWER_BYTES_MAX)
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        return str(error) or type(error).__name__
    finally:
        connection.close()
    return "" if 200 <= answer.status < 300 else f"it answered {answer.status}"  # noqa: PLR2004 - taken is 2xx


def deliver(channel: socket.socket, target: Target, event: dict[str, object], tls: ssl.SSLContext) -> bool:
    """Send an event until it is taken; False where the daemon has gone meanwhile."""
    tries = 0
    while problem := attempt(target, event, now=time.time(), tls=tls):
        channel.send(json.dumps({"failed": event["event_id"], "why": problem[:500], "tries": tries + 1}).encode())
        poller = select.poll()
        poller.register(channel, select.POLLRDHUP | select.POLLHUP)
        if poller.poll(pause_seconds(tries) * 1000):
            return False
        tries += 1
    channel.send(json.dumps({"delivered": event["event_id"]}).encode())
    return True


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal is the daemon's to act on
    os.closerange(CHANNEL_FD + 1, 1 << 20)
    channel = socket.socket(fileno=CHANNEL_FD)
    order = json.loads(channel.recv(FRAME_BYTES_MAX))
    target = Target(order["url"], order["key"].encode())
    tls = ssl.create_default_context()
    try:
        posture = confine(Confinement(user=order["user"], system_calls=(*STEADY, *DIAL, *RESOLVE), own_network=False))
    except OSError as error:
        sys.stderr.write(f"webhook sender: {error}\n")
        return 1
    channel.send(json.dumps({"ready": list(posture)}).encode())
    while frame := channel.recv(FRAME_BYTES_MAX):
        if not deliver(channel, target, json.loads(frame), tls):
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
