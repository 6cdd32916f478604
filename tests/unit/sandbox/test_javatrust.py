"""A Java trust store with a certificate added: the format, what was there before, and what is no such store."""

from __future__ import annotations

import base64
import hashlib
import struct

from sandbox.javatrust import begin, certificates

DER = b"0\x82certificate"
PEM = "-----BEGIN CERTIFICATE-----\n" + base64.b64encode(DER).decode() + "\n-----END CERTIFICATE-----\n"


def added(store: bytes, pem: str) -> bytes:
    added = certificates(pem)
    change = begin(store, len(added)).with_certificates(added)
    return change.head + store[len(change.head) : change.at] + change.tail


def entries(store: bytes) -> list[tuple[str, bytes]]:
    magic, version, count = struct.unpack_from(">III", store)
    assert (magic, version) == (0xFEEDFEED, 2)
    seasoning = "changeit".encode("utf-16-be") + b"Mighty Aphrodite"
    assert store[-20:] == hashlib.sha1(seasoning + store[:-20]).digest()  # noqa: S324 - the format's own
    found, at = [], 12
    for _ in range(count):
        kind, length = struct.unpack_from(">IH", store, at)
        alias = store[at + 6 : at + 6 + length].decode()
        at += 6 + length + 8
        assert (kind, store[at : at + 7]) == (2, b"\0\5X.509")
        (size,) = struct.unpack_from(">I", store, at + 7)
        found.append((alias, store[at + 11 : at + 11 + size]))
        at += 11 + size
    assert at == len(store) - 20
    return found


def test_certificates_are_added_to_those_that_are_there() -> None:
    first = added(b"", PEM)
    assert entries(first) == [("stockade-0", DER)]
    assert entries(added(first, PEM + PEM)) == [
        ("stockade-0", DER),
        ("stockade-0", DER),
        ("stockade-1", DER),
    ]


def test_another_format_counts_as_empty() -> None:
    for other in (b"0\x82" + b"x" * 100, b"\xfe\xed\xfe\xed\0\0\0\1" + b"\0" * 40, b"\xfe\xed"):
        assert entries(added(other, PEM)) == [("stockade-0", DER)]
