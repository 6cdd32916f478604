"""A Java trust store with one certificate more: Java reads no PEM, and one store alone. Pure; standard library only.

JKS is the oldest format and the one every Java still reads (sun.security.provider.JavaKeyStore): magic, version, count;
for each certificate its kind, alias, time, type and DER; then SHA-1 of the password, a constant and all before it.
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

_MAGIC: Final = 0xFEEDFEED
_VERSION: Final = 2
_CERTIFICATE: Final = 2
_DIGEST_BYTES: Final = 20
_HEAD: Final = struct.Struct(">III")
# The password that everybody knows: it protects nothing, and tools ask for it.
_SEASONING: Final = "changeit".encode("utf-16-be") + b"Mighty Aphrodite"
_PEM: Final = re.compile(r"-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----")


@dataclass(frozen=True, slots=True)
class Change:
    """How a store becomes the new one: `head` at its beginning, `tail` from byte `at` on, and nothing after it.

    What is between stays where it is: a launch waits for this, and a host's store has some hundred certificates.
    """

    head: bytes
    at: int
    tail: bytes


@dataclass(frozen=True, slots=True)
class Begun:
    """A store that was looked at and hashed, to become one with `more` certificates."""

    head: bytes
    at: int
    more: int
    digest: hashlib._Hash

    def with_certificates(self, added: Sequence[bytes]) -> Change:
        """Give how to add these, in DER; as many as it was begun for."""
        entries = b"".join(_entry(f"stockade-{number}", der) for number, der in enumerate(added))
        digest = self.digest.copy()
        digest.update(entries)
        return Change(self.head, self.at, entries + digest.digest())


def begin(store: bytes, more: int) -> Begun:
    """Look at a store ahead of need; one of another format than JKS counts as empty."""
    at, count = _HEAD.size, 0
    if len(store) >= _HEAD.size + _DIGEST_BYTES:
        magic, version, there = _HEAD.unpack_from(store)
        if (magic, version) == (_MAGIC, _VERSION):
            at, count = len(store) - _DIGEST_BYTES, there
    head = _HEAD.pack(_MAGIC, _VERSION, count + more)
    digest = hashlib.sha1(_SEASONING + head)  # noqa: S324 - the format's own
    digest.update(memoryview(store)[_HEAD.size : at])
    return Begun(head, at, more, digest)


def certificates(pem: str) -> list[bytes]:
    """Give the certificates of a PEM text, in DER."""
    return [base64.b64decode(text) for text in _PEM.findall(pem)]


def _entry(alias: str, der: bytes) -> bytes:
    name = alias.encode("ascii")
    return (
        struct.pack(">IH", _CERTIFICATE, len(name))
        + name
        + struct.pack(">QH", 0, len(b"X.509"))
        + b"X.509"
        + struct.pack(">I", len(der))
        + der
    )
