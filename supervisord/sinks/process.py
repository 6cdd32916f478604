"""The process behind one sink: takes entries from the daemon and hands them to a file, a syslog or a collector.

It is started as root, becomes the sinks' user and keeps no capability before it hears the first entry. A receiver that
is slow, hostile or gone keeps this process busy and nobody else. Messages are lines of JSON over one socket:

    started with  {kind, address, url, header, tls, ca_file, cert_file, key_file, user, host, instance, origin, key},
                  and for a file its descriptor
    it says       {ready: true} or {error}
    it hears      {entries: [...]}   and says {ack: SEQ}, or {ack: SEQ, failed: CAUSE} with how far it came
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 - resolving a name imports it, and then it is too late
import http.client
import json
import os
import select
import socket
import ssl
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

from gateway_client.egress.confine import DIAL, STEADY, Confinement, confine
from supervisord.sinks import formats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from supervisord.sinks.formats import Record

CHANNEL_FD: Final = 3
FILE_FD: Final = 4
CONNECT_SECONDS_MAX: Final = 10.0
SETTLE_SECONDS_MAX: Final = 1.0
ANSWER_BYTES_MAX: Final = 64 * 1024
CAUSE_CHARACTERS_MAX: Final = 300
# Resolving names reads /etc, asks over a socket of its own, and takes these beside what bytes on sockets take.
_RESOLVE: Final = ("bind", "getdents64", "ioctl", "openat", "pread64", "sendmmsg", "uname")
_FILE: Final = ("fdatasync", "ftruncate", "pread64")


class CannotDeliver(Exception):  # noqa: N818 - goes into the answer
    pass


class Sink(Protocol):
    def deliver(self, records: Sequence[Record], took: Callable[[int], None]) -> None:
        """Hand the records over in order, and say how far; raises CannotDeliver or OSError."""


class FileSink:
    """A line an entry. Durable before it is said to be; what a death left half is ended before the next line."""

    def __init__(self, fd: int, form: Callable[[Record], str]) -> None:
        self._fd = fd
        self._form = form
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            os.write(fd, b"\n")

    def deliver(self, records: Sequence[Record], took: Callable[[int], None]) -> None:
        before = os.fstat(self._fd).st_size
        view = memoryview("".join(f"{self._form(record)}\n" for record in records).encode("ascii"))
        try:
            while view:
                view = view[os.write(self._fd, view) :]
            os.fdatasync(self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, before)
            raise
        took(records[-1]["seq"])


class SyslogSink:
    """RFC 5424 over a unix socket, UDP, TCP with octet counting (RFC 6587 section 3.4.1), or TLS (RFC 5425)."""

    def __init__(self, address: str, host: str, tls: ssl.SSLContext | None = None) -> None:
        self._transport, _, self._where = address.partition(":")
        self._host = host
        self._tls = tls
        self._socket: socket.socket | None = None

    def deliver(self, records: Sequence[Record], took: Callable[[int], None]) -> None:
        try:
            self._socket = self._socket or self._connect()
            for record in records:
                message = formats.syslog(record, host=self._host, pid=os.getpid())
                if self._transport == "tcp":
                    message = b"%d %s" % (len(message), message)
                self._socket.sendall(message)
                if self._transport != "tcp":
                    took(record["seq"])
            # TCP takes what a dead peer never reads: acknowledge a batch whole, and only while the peer is there.
            if self._transport == "tcp":
                self._still_there(self._socket)
                took(records[-1]["seq"])
        except (OSError, CannotDeliver):
            if self._socket is not None:
                self._socket.close()
            self._socket = None
            raise

    def _connect(self) -> socket.socket:
        if self._transport == "unix":
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                made = socket.socket(socket.AF_UNIX, kind)
                made.settimeout(CONNECT_SECONDS_MAX)
                try:
                    made.connect(self._where)
                except OSError as error:
                    made.close()
                    failure = error
                    continue
                return made
            raise failure
        host, _, port = self._where.rpartition(":")
        host = host.strip("[]")
        if self._transport == "tcp":
            plain = socket.create_connection((host, int(port)), CONNECT_SECONDS_MAX)
            return plain if self._tls is None else self._secured(plain, host, self._tls)
        family, kind, protocol, _, target = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        made = socket.socket(family, kind, protocol)
        made.settimeout(CONNECT_SECONDS_MAX)
        made.connect(target)
        return made

    def _secured(self, plain: socket.socket, host: str, tls: ssl.SSLContext) -> ssl.SSLSocket:
        try:
            peer = tls.wrap_socket(plain, server_hostname=host)
        except (OSError, ValueError):
            plain.close()
            raise
        # In TLS 1.3 a client is done before the server has judged its certificate: a refusal comes afterwards, as an
        # alert, and what was sent until then is lost. Servers that take it send a session ticket at the same place.
        if peer.version() == "TLSv1.3":
            waiting = select.poll()
            waiting.register(peer, select.POLLIN)
            waiting.poll(SETTLE_SECONDS_MAX * 1000)
        try:
            self._still_there(peer)
        except (OSError, CannotDeliver):
            peer.close()
            raise
        return peer

    @staticmethod
    def _still_there(peer: socket.socket) -> None:
        peer.setblocking(False)  # with a time-out, recv would wait for it
        try:
            # A syslog server says nothing (RFC 5425); under TLS, reading also takes tickets and alerts.
            heard = peer.recv(1) if isinstance(peer, ssl.SSLSocket) else peer.recv(1, socket.MSG_PEEK)
            if not heard:
                raise CannotDeliver("the syslog server closed the connection")
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        peer.settimeout(CONNECT_SECONDS_MAX)


class OtlpSink:
    """OTLP/HTTP in JSON: one request a batch; whatever is not 2xx is tried again."""

    def __init__(
        self, url: str, header: str, describe: Callable[[Sequence[Record]], bytes], tls: ssl.SSLContext | None
    ) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port
        self._path = parts.path or "/"
        self._tls = tls
        name, _, value = header.partition(":")
        self._headers = {"Content-Type": "application/json", "User-Agent": "stockade"}
        if header:
            self._headers[name.strip()] = value.strip()
        self._describe = describe

    def deliver(self, records: Sequence[Record], took: Callable[[int], None]) -> None:
        connection: http.client.HTTPConnection
        if self._tls is None:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_SECONDS_MAX)
        else:
            connection = http.client.HTTPSConnection(
                self._host, self._port, timeout=CONNECT_SECONDS_MAX, context=self._tls
            )
        try:
            connection.request("POST", self._path, self._describe(records), self._headers)
            answer = connection.getresponse()
            answer.read(ANSWER_BYTES_MAX)
        except http.client.HTTPException as error:
            raise CannotDeliver(f"the collector made no sense: {type(error).__name__}") from error
        finally:
            connection.close()
        if not 200 <= answer.status < 300:  # noqa: PLR2004 - RFC 9110
            raise CannotDeliver(f"the collector answered {answer.status}")
        took(records[-1]["seq"])


def main() -> None:
    channel = socket.socket(fileno=CHANNEL_FD)
    with channel, channel.makefile("rb") as lines, channel.makefile("wb", buffering=0) as out:

        def say(message: dict[str, Any]) -> None:
            out.write(json.dumps(message).encode() + b"\n")

        try:
            begin = json.loads(lines.readline())
            sink = make(begin)
            give_up(begin)
        except (OSError, ValueError, KeyError) as error:
            say({"error": cause(error)})
            return
        say({"ready": True})
        for heard in lines:
            say(answer(sink, json.loads(heard)["entries"]))


def make(begin: dict[str, Any]) -> Sink:
    host = begin["host"]
    match begin["kind"]:
        case "jsonl":
            return FileSink(FILE_FD, formats.line)
        case "ocsf":
            about = {"origin": begin["origin"], "key": begin["key"], "host": host}
            return FileSink(FILE_FD, lambda record: formats.ocsf(record, **about))
        case "syslog":
            return SyslogSink(begin["address"], host, trust(begin) if begin["tls"] else None)
        case "otlp":
            instance = begin["instance"]
            return OtlpSink(
                begin["url"],
                begin["header"],
                lambda records: formats.otlp(records, host=host, instance=instance),
                trust(begin) if urlsplit(begin["url"]).scheme == "https" else None,
            )
        case other:
            raise ValueError(f"there is no kind {other!r} of sink")


def trust(begin: dict[str, Any]) -> ssl.SSLContext:
    """How the receiver is verified, by its name and an authority, and what it is shown; reads files, as root still."""
    key = begin["key_file"]
    try:
        context = ssl.create_default_context(cafile=begin["ca_file"] or None)
        context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 9662
        if key and os.stat(key).st_mode & 0o077:  # noqa: PTH116 - pathlib would be an import for one call
            raise ValueError(f"cannot use key file {key}: others than its owner may open it; chmod 600 it")
        if key:
            # An empty pass phrase: without one, OpenSSL would ask for it at a terminal.
            context.load_cert_chain(begin["cert_file"], key, password="")
    except OSError as error:
        said = error.strerror or str(error)
        raise ValueError(f"cannot use the certificates of the sink: {said}") from error
    return context


def give_up(begin: dict[str, Any]) -> None:
    """Become nobody for good; a file is all that those who write one have left."""
    if begin["kind"] in ("jsonl", "ocsf"):
        confine(Confinement(begin["user"], (*STEADY, *_FILE), own_network=True, open_files_max=16))
        return
    with contextlib.suppress(OSError):
        socket.getaddrinfo("localhost", 1)  # loads what resolves names, from files that may not be mapped later
    confine(Confinement(begin["user"], (*STEADY, *DIAL, *_RESOLVE), own_network=False, open_files_max=64))


def answer(sink: Sink, records: Sequence[Record]) -> dict[str, Any]:
    reached = 0

    def took(seq: int) -> None:
        nonlocal reached
        reached = seq

    try:
        sink.deliver(records, took)
    except (OSError, CannotDeliver, ValueError) as error:
        return {"ack": reached, "failed": cause(error)}
    return {"ack": reached}


def cause(error: Exception) -> str:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in said[:CAUSE_CHARACTERS_MAX])


if __name__ == "__main__":
    main()
