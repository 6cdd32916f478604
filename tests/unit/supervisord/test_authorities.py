"""Authorities of agents: one each, ready before it is asked for, the same again by its name."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

import pytest

from supervisord.authorities import CA_FILE_BYTES_MAX, STOCK, Authorities, read_ca_file, read_or_make_secret
from supervisord.errors import Unavailable

if TYPE_CHECKING:
    from pathlib import Path

SECRET = bytes(32)
NOW_NS = 1_790_000_000 * 10**9


def authorities(secret: bytes = SECRET) -> Authorities:
    numbers = itertools.count(1)
    return Authorities(secret, entropy=lambda size: next(numbers).to_bytes(size, "big"), now_ns=lambda: NOW_NS)


async def test_every_agent_has_another_and_the_stock_is_filled_between() -> None:
    made = authorities()
    made.fill()
    for _ in range(STOCK + 2):
        await asyncio.sleep(0)
    taken = [made.take() for _ in range(2 * STOCK)]
    assert len({each.name for each in taken}) == len({each.authority.key for each in taken}) == 2 * STOCK


async def test_it_is_the_same_again_by_its_name_under_the_same_secret() -> None:
    named = authorities().take()
    assert authorities().again(named.name, since_ns=NOW_NS).key == named.authority.key
    assert authorities(bytes([1] * 32)).again(named.name, since_ns=NOW_NS).key != named.authority.key


def test_the_secret_is_made_once_and_is_root_s_alone(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    first = read_or_make_secret(path, lambda size: b"a" * size)
    assert read_or_make_secret(path, lambda size: b"b" * size) == first == b"a" * 32
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(b"short")
    with pytest.raises(Unavailable, match="not 32 bytes"):
        read_or_make_secret(path, lambda size: b"b" * size)


def test_the_operator_s_authorities_are_bounded_text(tmp_path: Path) -> None:
    assert read_ca_file(None) == ""
    path = tmp_path / "ca.pem"
    path.write_text("x" * CA_FILE_BYTES_MAX)
    assert len(read_ca_file(path)) == CA_FILE_BYTES_MAX
    path.write_text("x" * (CA_FILE_BYTES_MAX + 1))
    with pytest.raises(Unavailable, match="over 65536 bytes"):
        read_ca_file(path)
    with pytest.raises(Unavailable, match="cannot read"):
        read_ca_file(tmp_path / "none")
