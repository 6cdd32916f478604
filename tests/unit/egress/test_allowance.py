"""Bytes of a budget as a worker counts them: none passes that was not lent, and what is over is given back."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway_client.egress.allowance import Allowance, Loan, Moved
from gateway_client.egress.exchange import BudgetSpent, Exchange, GrantSpent
from gateway_client.egress.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable


class Daemon:
    """Lends of what it has as it is asked, at once or when told to."""

    def __init__(self, left: int, *, piece: int = 10, at_once: bool = True) -> None:
        self.left = left
        self.piece = piece
        self.at_once = at_once
        self.told: list[Moved] = []
        self.wanted: list[int] = []
        self.cut = 0
        self.loan = Loan(self.tell, self.spent)

    def tell(self, moved: Moved) -> None:
        self.told.append(moved)
        self.left += moved.back
        if moved.want:
            self.wanted.append(moved.want)
            if self.at_once:
                asyncio.get_running_loop().call_soon(self.lend)

    def lend(self) -> None:
        count = min(self.left, max(self.piece, self.wanted.pop(0)))
        self.left -= count
        self.loan.lend(count, last=not self.left)

    def spent(self, _loan: Loan) -> None:
        self.cut += 1

    @property
    def used(self) -> int:
        return sum(moved.used for moved in self.told)


def an_exchange(daemon: Daemon) -> Exchange:
    return Exchange(x=1, agent_id="ag", started=0.0, loan=daemon.loan)


async def test_what_was_lent_passes_to_the_last_byte_and_not_one_more() -> None:
    daemon = Daemon(100)
    exchange = an_exchange(daemon)
    for _ in range(10):
        await exchange.take(10)
    assert (exchange.used_up, daemon.cut) == ("", 0)
    with pytest.raises(BudgetSpent):
        await exchange.take(1)
    assert (daemon.used, daemon.cut, daemon.loan.spent) == (100, 1, True)
    assert exchange.used_up == "the agent's budget of egress_bytes is used up"
    with pytest.raises(BudgetSpent):
        await exchange.take(1)


async def test_a_piece_that_does_not_fit_does_not_pass_and_the_rest_counts_as_used() -> None:
    daemon = Daemon(100)
    exchange = an_exchange(daemon)
    await exchange.take(95)
    with pytest.raises(BudgetSpent):
        await exchange.take(6)
    assert (daemon.used, daemon.left) == (100, 0)


async def test_who_needs_more_than_there_is_waits_and_nobody_overtakes() -> None:
    daemon = Daemon(100, at_once=False)
    order: list[str] = []
    first, second = an_exchange(daemon), an_exchange(daemon)

    async def take(exchange: Exchange, count: int, name: str) -> None:
        await exchange.take(count)
        order.append(name)

    tasks = [asyncio.create_task(take(first, 50, "long")), asyncio.create_task(take(second, 1, "short"))]
    await asyncio.sleep(0)
    assert (first.waiting, second.waiting, order) == (1, 1, [])
    daemon.loan.lend(10, last=False)  # with another exchange's answer: too little for the first
    await asyncio.sleep(0)
    assert order == []
    while daemon.wanted:
        daemon.lend()
    await asyncio.gather(*tasks)
    assert order == ["long", "short"]
    assert (first.waiting, second.waiting) == (0, 0)


async def test_more_is_asked_for_before_it_is_gone() -> None:
    daemon = Daemon(1000, piece=100, at_once=False)
    daemon.loan.lend(100, last=False)
    assert daemon.loan.take_now(50)
    assert daemon.wanted == []
    assert daemon.loan.take_now(1)
    assert len(daemon.wanted) == 1
    assert daemon.loan.take_now(49)
    assert len(daemon.wanted) == 1, "one question at a time"


async def test_what_is_left_is_given_back_when_nothing_is_open() -> None:
    daemon = Daemon(100)
    await an_exchange(daemon).take(3)
    daemon.loan.end()
    assert (daemon.used, daemon.left) == (3, 97)
    daemon.loan.end()
    assert sum(moved.back for moved in daemon.told) == 7


async def test_the_grant_is_asked_first_and_says_so() -> None:
    exchange = an_exchange(Daemon(100))
    exchange.allowance = Allowance(5)
    with pytest.raises(GrantSpent):
        await exchange.take(6)
    assert exchange.used_up == "the bytes of the grant are used up"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 50), max_size=8), min_size=1, max_size=8), st.integers(0, 400), st.integers(1, 60)
)
def test_many_at_once_pass_no_more_than_there_was_and_nothing_gets_lost(
    wishes: list[list[int]], most: int, piece: int
) -> None:
    async def run() -> None:
        daemon = Daemon(most, piece=piece)
        passed = 0

        async def one(counts: list[int]) -> None:
            nonlocal passed
            exchange = an_exchange(daemon)
            for count in counts:
                try:
                    await exchange.take(count)
                except BudgetSpent:
                    return
                passed += count

        await asyncio.wait_for(asyncio.gather(*map(one, wishes)), 5)
        daemon.loan.end()
        assert passed <= most
        assert daemon.used + daemon.left == most
        assert passed == sum(map(sum, wishes)) or daemon.loan.spent
        assert daemon.used == (most if daemon.loan.spent else passed)

    asyncio.run(run())


class Wire:
    """The transport of one side of a relay."""

    def __init__(self) -> None:
        self.written = b""
        self.reading = True
        self.ended = self.aborted = False

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_arguments, **_named: None

    def write(self, data: bytes) -> None:
        self.written += data

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.aborted = True

    def get_extra_info(self, _name: str) -> None:
        return None


def a_relay(loan: Loan, *, unread: bytes = b"") -> tuple[Stream, Wire, Stream, Wire, asyncio.Future[None]]:
    near, far, near_wire, far_wire = Stream(), Stream(), Wire(), Wire()
    near.connection_made(near_wire)  # type: ignore[arg-type]
    far.connection_made(far_wire)  # type: ignore[arg-type]
    near.unread(unread)
    return near, near_wire, far, far_wire, near.splice(far, None, loan)


async def test_a_relay_waits_for_its_loan_and_takes_nothing_meanwhile() -> None:
    daemon = Daemon(100, at_once=False)
    near, near_wire, far, far_wire, end = a_relay(daemon.loan, unread=b"hello ")
    assert (far_wire.written, near_wire.reading) == (b"", False)
    near.data_received(b"world")  # was on its way
    near.eof_received()
    far.resume_writing()
    assert (far_wire.written, near_wire.reading, far_wire.ended) == (b"", False, False)
    while daemon.wanted:
        daemon.lend()
    assert (far_wire.written, far_wire.ended, end.done()) == (b"hello world", True, False)
    far.data_received(b"!")
    far.eof_received()
    assert (near_wire.written, near_wire.ended, end.done()) == (b"!", True, True)
    daemon.loan.end()
    assert daemon.used == 12


async def test_a_relay_is_reset_where_there_is_no_more() -> None:
    daemon = Daemon(8, at_once=False)
    near, near_wire, _far, far_wire, _end = a_relay(daemon.loan)
    near.data_received(b"12345678")
    daemon.lend()
    assert far_wire.written == b"12345678"
    near.data_received(b"9")
    daemon.lend()
    assert (far_wire.written, near_wire.aborted, far_wire.aborted) == (b"12345678", True, True)
