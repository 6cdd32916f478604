"""What is sent to a process that runs, the agent's first or a later one: input, the size of its terminal, signals."""

import base64
import binascii
import errno
from typing import Any

from sandbox import confine
from sandbox.attach import Stream
from sandbox.channel import Answer
from sandbox.plan import Tty, check_terminal
from sandbox.running import Agent, agent_error
from sandbox.sync import StepError


def find(agents: dict[str, Agent], message: dict[str, Any]) -> Agent | Stream:
    """Return the process that a request names; the stream of an agent's first one has the agent's name."""
    name = str(message.get("stream_id") or message["agent_id"])
    if name in agents:
        return agents[name]
    for agent in agents.values():
        if name in agent.streams:
            return agent.streams[name]
    raise agent_error(name, str(message["op"]))


def write(process: Agent | Stream, text: str, *, eof: bool, answer: Answer) -> None:
    """Give input, which is base64; answers when it is written."""
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise StepError("write stdin", 0, "data is not base64") from error

    def written(ok: bool) -> None:  # noqa: FBT001 - a callback of one word
        answer(None if ok else StepError("write stdin", errno.EPIPE, "the stream is closed"))

    if process.feed is None or not process.feed.give(data, eof=eof, written=written):
        raise StepError("write stdin", 0, "there is no open stdin, or its buffer is full")


def resize(process: Agent | Stream, tty: Tty) -> None:
    """Tell the terminal its size."""
    check_terminal(tty)
    if process.terminal < 0:
        raise StepError("resize", 0, "there is no terminal")
    confine.resize(process.terminal, tty)
