"""Authorities and the certificates made by them: who trusts them, for what, for how long, and how many are kept."""

from __future__ import annotations

import datetime as dt
import ssl
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from gateway_client.egress import leaves as subject
from gateway_client.egress.authority import SECRET_BYTES, authority_seconds, make_authority
from gateway_client.egress.leaves import Leaves
from gateway_client.egress.sealed import BrokenSeal, ClientEngine, Engine, ServerEngine

if TYPE_CHECKING:
    from gateway_client.egress.messages import Authority

NOW = dt.datetime.now(dt.UTC)
SECRET = bytes(range(SECRET_BYTES))
OWN = make_authority(SECRET, "a", since=NOW)


def trusting(authority: Authority = OWN) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.certificate)
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # as Python 3.13 has it
    return context


def meet(client: Engine, server: Engine) -> None:
    """Pass bytes between the two until both are done."""
    for _ in range(10):
        done = [client.shake()]
        server.feed(client.outgoing())
        done.append(server.shake())
        client.feed(server.outgoing())
        if all(done):
            return
    raise AssertionError("the handshake has no end")


@pytest.mark.parametrize("host", ["api.example.com", "a_b.example", "192.0.2.7", "2001:db8::1"])
def test_who_trusts_the_authority_trusts_a_leaf_for_that_host(host: str) -> None:
    client = ClientEngine(trusting(), host)
    server = ServerEngine(Leaves(OWN, now=lambda: NOW).context(host))
    meet(client, server)
    assert server.server_name == (host if host[0] == "a" else None)
    client.write(b"hello")
    server.feed(client.outgoing())
    assert (server.read(), server.read()) == (b"hello", None)
    server.write(b"x" * 100_000)
    server.end()
    client.feed(server.outgoing())
    got = bytearray()
    while piece := client.read():
        got += piece
    assert (len(got), piece) == (100_000, b"")


def test_nobody_else_does_and_not_for_another_host() -> None:
    for context, host in (
        (trusting(make_authority(SECRET, "b", since=NOW)), "api.example.com"),
        (trusting(), "other.example"),
        (ssl.create_default_context(), "api.example.com"),
    ):
        server = ServerEngine(Leaves(OWN, now=lambda: NOW).context("api.example.com"))
        with pytest.raises(BrokenSeal, match="not trusted"):
            meet(ClientEngine(context, host), server)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_of_tls_are_refused() -> None:
    context = trusting()
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((BrokenSeal, ssl.SSLError)):
        meet(ClientEngine(context, "a.example"), ServerEngine(Leaves(OWN, now=lambda: NOW).context("a.example")))


def test_an_authority_is_the_same_for_its_name_and_another_for_any_other() -> None:
    assert make_authority(SECRET, "a", since=NOW).key == OWN.key
    assert make_authority(SECRET, "b", since=NOW).key != OWN.key
    assert make_authority(bytes(SECRET_BYTES), "a", since=NOW).key != OWN.key
    assert OWN.key not in repr(OWN)
    with pytest.raises(ValueError, match="32 bytes"):
        make_authority(b"short", "a", since=NOW)


def test_an_authority_signs_hosts_and_nothing_below_it() -> None:
    certificate = x509.load_pem_x509_certificate(OWN.certificate.encode())
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    lasts = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert lasts.total_seconds() < authority_seconds + 7200


def test_leaves_are_reused_made_anew_after_a_day_and_bounded() -> None:
    now = [NOW]
    made = Leaves(OWN, now=lambda: now[0])
    first = made.context("a.example")
    assert made.context("a.example") is first
    now[0] += dt.timedelta(seconds=subject.leaf_reused_seconds_max + 1)
    assert made.context("a.example") is not first
    for number in range(subject.leaves_per_agent_max + 5):
        made.context(f"n{number}.example")
    assert len(made) == subject.leaves_per_agent_max
