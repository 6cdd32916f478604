"""People who operate an instance: whoever has a uid, through the command line, and root by the client library."""

from __future__ import annotations

import grp
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stockade.client import Stockade

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stockade.client.values import Request

    from tests.support.instance import Done, Instance

ANNA, BERT = 62001, 62002
"""Two operators by the group of the control socket, without names."""


def by(stockade: Instance, uid: int, *arguments: str) -> Done:
    """Run stockadectl as this user."""
    return stockade.ctl(*arguments, user=uid, group=grp.getgrnam("stockade").gr_gid, extra_groups=[], cwd="/")


@contextmanager
def root(stockade: Instance) -> Iterator[Stockade]:
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        yield client


def pending(stockade: Instance, client: Stockade, agent: str) -> Request:
    """The one request that this agent waits for, once it is there."""

    def found() -> list[Request]:
        return [request for request in client.requests() if request.agent_name == agent]

    stockade.wait(found)
    (request,) = found()
    return request


def steps(client: Stockade, agent: str, verb: str) -> list[Any]:
    return list(client.actions(agent, verb=verb))
