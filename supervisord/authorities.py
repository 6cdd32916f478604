"""The certificate authorities of agents: made ahead of need, so that a launch waits for none, and made again by name.

The secret they are derived from is in the run directory, which a reboot empties; agents live no longer than that.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import os
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway_client.egress.authority import SECRET_BYTES, make_authority
from supervisord.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gateway_client.egress.messages import Authority

STOCK: Final = 4
FRESH_MAX: Final = 64
FILL_SECONDS: Final = 0.05
NAME_BYTES: Final = 8
CA_FILE_BYTES_MAX: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class Named:
    """An authority and the name by which it can be made again."""

    name: str
    authority: Authority


class Authorities:
    """Gives every agent an authority of its own."""

    def __init__(self, secret: bytes, *, entropy: Callable[[int], bytes], now_ns: Callable[[], int]) -> None:
        self._secret = secret
        self._entropy = entropy
        self._now_ns = now_ns
        self._stock: deque[Named] = deque()
        self._filling = False
        self._fresh: OrderedDict[str, Authority] = OrderedDict()
        """Of launches that go on: made again a moment later would cost them that moment."""

    def take(self) -> Named:
        """An authority that nobody else has or will have."""
        named = self._stock.popleft() if self._stock else self._new()
        self.fill()
        self._fresh[named.name] = named.authority
        while len(self._fresh) > FRESH_MAX:
            self._fresh.popitem(last=False)
        return named

    def again(self, name: str, *, since_ns: int) -> Authority:
        """The authority that has this name: its key is the one it had."""
        return self._fresh.pop(name, None) or self._make(name, since_ns)

    def fill(self) -> None:
        """Make some ahead, one at a time between other things."""
        if not self._filling:
            self._filling = True
            # Later: each costs what a launch that goes on would have to wait for.
            asyncio.get_running_loop().call_later(FILL_SECONDS, self._fill_one)

    def _fill_one(self) -> None:
        self._filling = False
        if len(self._stock) < STOCK:
            self._stock.append(self._new())
            self.fill()

    def _new(self) -> Named:
        name = self._entropy(NAME_BYTES).hex()
        return Named(name, self._make(name, self._now_ns()))

    def _make(self, name: str, since_ns: int) -> Authority:
        return make_authority(self._secret, name, since=_time(since_ns))


def read_or_make_secret(path: Path, entropy: Callable[[int], bytes]) -> bytes:
    """The secret of this boot; raises Unavailable where it can be neither read nor made."""
    try:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            secret = path.read_bytes()
        else:
            secret = entropy(SECRET_BYTES)
            with os.fdopen(fd, "wb") as file:
                file.write(secret)
    except OSError as error:
        raise Unavailable(
            f"cannot use {path}: {error.strerror}", remedy="check run_dir in the configuration"
        ) from error
    if len(secret) != SECRET_BYTES:
        raise Unavailable(
            f"cannot use {path}: it is not {SECRET_BYTES} bytes", remedy="remove it; agents that run lose https scopes"
        )
    return secret


def read_ca_file(path: Path | None) -> str:
    """The operator's own authorities, as agents are to trust them too; raises Unavailable."""
    if path is None:
        return ""
    try:
        text = path.read_text("ascii")
    except (OSError, ValueError) as error:
        raise Unavailable(f"cannot read {path}: {error}", remedy="gateway.ca_file is a file of PEM") from error
    if len(text) > CA_FILE_BYTES_MAX:
        raise Unavailable(
            f"cannot use {path}: it is over {CA_FILE_BYTES_MAX} bytes",
            remedy="name only what the host does not trust already",
        )
    return text


def _time(ns: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(ns / 1e9, dt.UTC)
