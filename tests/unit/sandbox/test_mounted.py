"""A descriptor of a bind is closed once, although a child that takes the bind away may answer after its agent's end."""

from __future__ import annotations

import os
from typing import Any, cast

from sandbox import mounted
from sandbox.running import Agent, Ending


def test_what_is_said_of_a_bind_after_its_agents_end_closes_nobody_elses_descriptor() -> None:
    agent = Agent(plan=cast("Any", None), meta={}, directory="/nowhere", loop=cast("Any", None))
    agent.ending = Ending(began=0, processes=0, egress_cut_ms=0)
    bind = mounted.Mounted("/data", "/data", "fs:ro:/data", writable=False, mount_id=1, fd=os.open("/", os.O_RDONLY))
    agent.mounted[bind.target], number = bind, bind.fd
    agent._let_go()
    others = [os.open("/dev/null", os.O_RDONLY)]
    while number not in others:
        others.append(os.open("/dev/null", os.O_RDONLY))
    mounted.drop(agent, bind)
    for fd in others:
        os.close(fd)  # raises where it was closed
