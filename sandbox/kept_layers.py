"""The layers of agents that are kept beyond their end: shown to the daemon, and dropped when it has no use for them."""

# ruff: noqa: PTH108, PTH110 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import contextlib
import errno
import os

from sandbox.channel import Answer
from sandbox.decoding import InvalidPlan
from sandbox.scratch import CannotMakeScratch
from sandbox.sync import StepError
from sandbox.workshop import Workshop


def show(workshop: Workshop, agent_id: str, answer: Answer) -> None:
    """Answer with the top of what the agent changed, read-only, once its image is written out."""
    path = _path(workshop, agent_id, "layer")

    def read() -> None:
        try:
            top = workshop.stock.read(path)
        except CannotMakeScratch as error:
            answer(StepError("layer", error.number, str(error), error.remedy))
            return
        answer(fds=(top,))
        os.close(top)

    workshop.when_free(path, read)


def drop(workshop: Workshop, agent_id: str, answer: Answer) -> None:
    """Remove the layer of an agent that has ended."""
    path = _path(workshop, agent_id, "drop")

    def unlink() -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        answer()

    workshop.when_free(path, unlink)


def _path(workshop: Workshop, agent_id: str, step: str) -> str:
    if not agent_id or not all(c.isascii() and (c.isalnum() or c in "-_") for c in agent_id):
        raise InvalidPlan("agent_id: must be letters, digits, '-' or '_'")
    path = workshop.stock.layer_path(agent_id)
    if not os.path.exists(path):
        raise StepError(step, errno.ENOENT, f"there is no layer of {agent_id}")
    return path
