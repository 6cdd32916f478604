"""What an agent's netlink sockets hold: the one memory that no cgroup is charged for (kernel 6.18, v1 and v2).

A reply that nobody reads stays in the socket, up to net.core.rmem_default each, and sockets are cheap. Which replies
come cannot be judged by a filter and programs need to read links and routes, so the launcher looks, and ends an agent
that holds more than a program ever does.
"""

# ruff: noqa: PTH123 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

from typing import TYPE_CHECKING, Final

from sandbox.running import State

if TYPE_CHECKING:
    from sandbox.running import Agent

LOOK_SECONDS: Final = 1.0
HELD_BYTES_MAX: Final = 32 << 20
FILE_BYTES_MAX: Final = 1 << 20  # some nine thousand sockets; more of them is too much whatever they hold
_RMEM: Final = 4  # column of /proc/net/netlink


def held_bytes(text: bytes) -> int:
    """Return what the sockets of a /proc/PID/net/netlink hold unread (pure)."""
    total = 0
    for line in text.splitlines()[1:]:
        words = line.split()
        if len(words) > _RMEM and words[_RMEM].isdigit():
            total += int(words[_RMEM])
    return total


def look(agent: "Agent") -> None:
    """End the agent where its sockets hold too much; look again later. To be called once it runs."""
    if agent.state is State.RUNNING:
        try:
            with open(f"/proc/{agent.pid}/net/netlink", "rb") as file:
                text = file.read(FILE_BYTES_MAX)
        except OSError:
            text = b""  # pid 1 has just ended
        if len(text) >= FILE_BYTES_MAX or held_bytes(text) > HELD_BYTES_MAX:
            agent.over_memory = True
            agent.end()
    if agent.state in (State.BUILDING, State.BUILT, State.STARTING, State.RUNNING):
        agent.loop.later(LOOK_SECONDS, lambda: look(agent))
