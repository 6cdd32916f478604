"""The thin client of Stockade's API, for orchestrators: typed values in and out, plain exceptions, sync or asyncio.

from stockade.client import Stockade

with Stockade("unix:/run/stockade/control.sock") as stockade:
    agent = stockade.launch(command=["python3", "agent.py"], scopes=["llm:*"])
    print(agent.wait().exit_code)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stockade.client.errors import (
    Conflict,
    Failed,
    InvalidArgument,
    NotFound,
    NotPermitted,
    StockadeError,
    Unavailable,
    Unreachable,
)
from stockade.client.session import Session
from stockade.client.sync import Agent, Stockade
from stockade.client.values import (
    Action,
    AgentInfo,
    BudgetUse,
    Change,
    Changes,
    Completed,
    ExitStatus,
    Grant,
    Hold,
    Output,
    Receipt,
    Request,
    Selector,
    Spend,
    State,
    Verification,
    Workspace,
)

if TYPE_CHECKING:
    from stockade.client.aio import AsyncAgent, AsyncStockade

__all__ = [
    "Action",
    "Agent",
    "AgentInfo",
    "AsyncAgent",
    "AsyncStockade",
    "BudgetUse",
    "Change",
    "Changes",
    "Completed",
    "Conflict",
    "ExitStatus",
    "Failed",
    "Grant",
    "Hold",
    "InvalidArgument",
    "NotFound",
    "NotPermitted",
    "Output",
    "Receipt",
    "Request",
    "Selector",
    "Session",
    "Spend",
    "State",
    "Stockade",
    "StockadeError",
    "Unavailable",
    "Unreachable",
    "Verification",
    "Workspace",
]


def __getattr__(name: str) -> object:
    # The asyncio half costs a command-line start some milliseconds that it has no use for.
    if name in {"AsyncStockade", "AsyncAgent"}:
        from stockade.client import aio  # noqa: PLC0415 - see above

        return getattr(aio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
