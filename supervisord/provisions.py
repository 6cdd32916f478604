"""What the daemon holds for an agent: what it may do, its gate, its descriptors and its uid range.

Given at a launch, or when the agent is taken up again; given back when it is no more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from supervisord.budgets import Budget
from supervisord.channel import close_all
from supervisord.ids import GrantId
from supervisord.scopes import read_scope, transparent_ports

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway_client.egress import messages
    from supervisord.agents import Agent
    from supervisord.authorities import Authorities
    from supervisord.budgets import Amounts
    from supervisord.egress_plane import EgressPlane
    from supervisord.exchanges import Exchanges
    from supervisord.launcher_link import LauncherLink
    from supervisord.scopes import Grant, GrantBook
    from supervisord.slots import Slots


class Provisions:
    """Gives and takes back; what an agent has is in the parts that keep it."""

    def __init__(
        self,
        *,
        book: GrantBook,
        launcher: LauncherLink,
        plane: EgressPlane,
        exchanges: Exchanges,
        slots: Slots,
        authorities: Authorities,
    ) -> None:
        self._book = book
        self._launcher = launcher
        self._plane = plane
        self._exchanges = exchanges
        self._slots = slots
        self._authorities = authorities

    def give_scopes(self, agent: Agent, *, kept: Sequence[Grant] = (), spent: Amounts | None = None) -> None:
        """Give what the agent may do: grants of policy and launch, budget.

        `kept` is what the store has of its grants, and goes before the launch: one that was taken back stays so.
        """
        known = {grant.grant_id for grant in kept}
        for grant in agent.what.grants:
            if grant.grant_id not in known:
                self._book.add(
                    agent.agent_id,
                    read_scope(grant.scope),
                    by=grant.by,
                    reason="launch",
                    grant_id=GrantId(grant.grant_id),
                )
        for each in kept:
            self._book.restore(each)
        self._exchanges.ledgers.open(
            agent.agent_id, Budget.from_json(agent.what.budget), labels=agent.what.labels, spent=spent
        )

    def open_gate(self, agent: Agent, *, frozen: bool = False) -> None:
        """Serve the agent's listener: after everything that says what may pass."""
        if agent.listener is not None:
            self._plane.listen(
                agent.agent_id,
                name=agent.name,
                labels=agent.what.labels,
                listener=agent.listener,
                dedicated=agent.what.dedicated_worker,
                frozen=frozen,
                authority=self._authority(agent),
            )

    async def open_transparent(self, agent: Agent) -> None:
        """Serve look-ups and direct connections of an agent whose network is transparent; raises StockadeError."""
        if not agent.what.transparent or self._plane.has_gate(agent.agent_id):
            return
        ports = transparent_ports(grant.scope for grant in self._book.for_agent(agent.agent_id))
        reply = await self._launcher.call("gate", agent_id=agent.agent_id, ports=list(ports))
        made = reply.body.get("ports")
        doors = map(int, made) if isinstance(made, list) else (0, *ports)  # a launcher of an older version does not say
        if not self._plane.open_gate(agent.agent_id, dict(zip(doors, reply.fds, strict=True))):
            close_all(reply.fds)

    def _authority(self, agent: Agent) -> messages.Authority | None:
        """What its TLS is answered with; an agent of an older version has none."""
        name = agent.what.authority
        return self._authorities.again(name, since_ns=agent.what.launched_at_ns) if name else None

    def forget(self, agent: Agent) -> None:
        """Give back what the daemon holds for an agent that is no more: gate, grants, descriptors, uid range."""
        self._plane.unlisten(agent.agent_id)
        self._book.end_agent(agent.agent_id)
        self._exchanges.forget(agent.agent_id)
        close_all([fd for fd in (agent.pidfd, agent.listener) if fd is not None])
        agent.pidfd = agent.listener = None
        # Once: a kill that overtakes a launch comes here twice, and the slot may be another's by then.
        if agent.slot_held:
            agent.slot_held = False
            self._slots.release(agent.what.slot)
