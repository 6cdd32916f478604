"""Certificates of an agent's own authority for the hosts it calls: made on demand, in memory, for that agent alone.

OpenSSL through pyOpenSSL, and not the `ssl` module, which loads keys from files only: this process can open none.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL import SSL

from gateway_client.egress.authority import CLOCK_SLACK, SECRET_BYTES, make_authority
from gateway_client.egress.target import address_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway_client.egress.messages import Authority

leaves_per_agent_max: Final = 256
leaf_seconds: Final = 7 * 86_400
leaf_reused_seconds_max: Final = 86_400
ALPN: Final = b"http/1.1"


@dataclass(frozen=True, slots=True)
class Leaf:
    """What one host is answered with, and when it was made."""

    context: SSL.Context
    made_at: dt.datetime


class Leaves:
    """The leaf certificates of one agent; the least recently used go first."""

    def __init__(self, authority: Authority, *, now: Callable[[], dt.datetime]) -> None:
        self._issuer = x509.load_pem_x509_certificate(authority.certificate.encode("ascii"))
        key = serialization.load_pem_private_key(authority.key.encode("ascii"), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("cannot use authority: its key is not of an elliptic curve")  # noqa: TRY004 - of a value
        self._issuer_key = key
        self._now = now
        # One key for all of an agent's leaves: making one for each would protect nothing, the authority lies beside it.
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._kept: OrderedDict[str, Leaf] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def context(self, host: str) -> SSL.Context:
        """Give what TLS with the agent is spoken with when it calls `host`, a normalised name or address."""
        now = self._now()
        leaf = self._kept.get(host)
        if leaf is None or (now - leaf.made_at).total_seconds() > leaf_reused_seconds_max:
            leaf = Leaf(self._make(self._certificate(host, now)), now)
            self._kept[host] = leaf
        self._kept.move_to_end(host)
        while len(self._kept) > leaves_per_agent_max:
            self._kept.popitem(last=False)
        return leaf.context

    def _certificate(self, host: str, now: dt.datetime) -> x509.Certificate:
        address = address_of(host)
        name: x509.GeneralName = (
            x509.DNSName(host) if address is None else x509.IPAddress(ipaddress.ip_address(address))
        )
        until = min(now + dt.timedelta(seconds=leaf_seconds), self._issuer.not_valid_after_utc)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))  # the name is in the extension, which is critical for that (RFC 5280 4.2.1.6)
            .issuer_name(self._issuer.subject)
            .public_key(self._key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(max(now - CLOCK_SLACK, self._issuer.not_valid_before_utc))
            .not_valid_after(until)
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._issuer_key.public_key()), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._issuer_key, hashes.SHA256())
        )

    def _make(self, certificate: x509.Certificate) -> SSL.Context:
        context = SSL.Context(SSL.TLS_SERVER_METHOD)
        context.set_min_proto_version(SSL.TLS1_2_VERSION)
        # No renegotiation, no resumption: every connection is looked at from its beginning.
        context.set_options(SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION)
        context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
        context.use_certificate(certificate)
        context.use_privatekey(self._key)
        context.set_alpn_select_callback(_choose)
        return context


def _choose(_: SSL.Connection, offered: list[bytes]) -> bytes | SSL._NoOverlappingProtocols:
    """Choose HTTP/1.1, also for clients that would rather speak HTTP/2; for those that speak nothing else, nothing."""
    return ALPN if ALPN in offered else SSL.NO_OVERLAPPING_PROTOCOLS


def warm_up() -> None:
    """Make a certificate once, so that everything is imported before nothing can be opened any more."""
    now = dt.datetime.now(dt.UTC)
    Leaves(make_authority(bytes(SECRET_BYTES), "warm-up", since=now), now=lambda: now).context("host.invalid")
