"""An agent's share of the worker's thread: whose steps wait, in which order, and that nothing else of them changes."""

from __future__ import annotations

import asyncio

import pytest

from gateway_client.egress.share import (
    Share,
    Thread,
    burst_seconds_max,
    crowded_seconds,
    debt_seconds_max,
    metered,
    share_alone_per_second,
    share_per_second,
)


class Clock:
    """CPU time that passes when a step says so, and a wall clock that follows the loop's timers at once."""

    def __init__(self) -> None:
        self.cpu = 0.0
        self.wall = 100.0

    def work(self, seconds: float) -> None:
        self.cpu += seconds
        self.wall += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def thread(clock: Clock) -> Thread:
    return Thread(cpu=lambda: clock.cpu, now=lambda: clock.wall)


async def test_a_coroutine_gives_takes_raises_and_is_cancelled_as_before(clock: Clock) -> None:
    share = Share(asyncio.get_running_loop(), thread(clock))

    async def fine() -> int:
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await asyncio.sleep(5)
        return 7

    async def bad() -> None:
        await asyncio.sleep(0)
        raise LookupError("x")

    seen = []

    async def waits() -> None:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    assert await metered(fine(), share) == 7
    with pytest.raises(LookupError):
        await metered(bad(), share)
    task = asyncio.create_task(metered(waits(), share))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seen == ["cancelled"]


async def test_an_agent_that_overdraws_waits_and_another_does_not(clock: Clock) -> None:
    loop = asyncio.get_running_loop()
    both = thread(clock)
    greedy, modest = Share(loop, both), Share(loop, both)
    done: list[str] = []

    async def steps(name: str, count: int, seconds: float) -> None:
        for _ in range(count):
            clock.work(seconds)
            await asyncio.sleep(0)
        done.append(name)

    tasks = [asyncio.create_task(metered(steps("greedy", 3, burst_seconds_max), greedy)) for _ in range(5)]
    tasks.append(asyncio.create_task(metered(steps("modest", 10, 0.001), modest)))
    for _ in range(30):
        await asyncio.sleep(0)
    assert done == ["modest"]
    for _ in range(400):  # as its share grows, one step after another is taken, and all come to their end
        clock.wall += 0.5
        await asyncio.sleep(0.002)
        if all(task.done() for task in tasks):
            break
    assert done == ["modest", *["greedy"] * 5]


async def test_connections_of_one_agent_take_turns(clock: Clock) -> None:
    share = Share(asyncio.get_running_loop(), thread(clock))
    order: list[int] = []

    async def steps(number: int) -> None:
        for _ in range(3):
            order.append(number)
            clock.work(burst_seconds_max * 1.5)
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(metered(steps(number), share)) for number in range(3)]
    for _ in range(400):
        clock.wall += 0.5
        await asyncio.sleep(0.002)
        if all(task.done() for task in tasks):
            break
    assert order == [0, 1, 2] * 3


async def test_one_who_is_gone_while_waiting_keeps_nobody(clock: Clock) -> None:
    share = Share(asyncio.get_running_loop(), thread(clock))

    async def step() -> None:
        clock.work(burst_seconds_max * 2)
        await asyncio.sleep(0)

    tasks = [asyncio.create_task(metered(step(), share)) for _ in range(3)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    for _ in range(400):
        clock.wall += 0.5
        await asyncio.sleep(0.002)
        if all(task.done() for task in tasks):
            break
    assert [task.cancelled() for task in tasks] == [True, False, False]


async def test_a_share_grows_faster_for_one_that_is_alone_and_debt_is_bounded(clock: Clock) -> None:
    loop = asyncio.get_running_loop()
    both = thread(clock)
    one, other = Share(loop, both), Share(loop, both)
    one.begin()
    one.end()
    assert both.rate(one, clock.wall) == share_alone_per_second
    other.begin()
    other.end()
    assert both.rate(one, clock.wall) == both.rate(other, clock.wall) == share_per_second
    assert both.rate(other, clock.wall + crowded_seconds) == share_alone_per_second
    one.begin()
    clock.work(1000)
    one.end()
    assert one._left == -debt_seconds_max
    assert one.overdrawn


async def test_a_long_step_gives_way_and_a_short_one_does_not(clock: Clock) -> None:
    share = Share(asyncio.get_running_loop(), thread(clock))
    seen: list[str] = []
    asyncio.get_running_loop().call_soon(seen.append, "other")
    share.begin()
    await share.breathe()
    assert not seen
    clock.work(0.01)
    await share.breathe()
    assert seen
