"""AgentService of a daemon that can only kill: look, and kill. What else there is, an interceptor refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from stockade.v1 import agents_pb2, agents_pb2_grpc

from supervisord.callers import current_caller
from supervisord.rpc import convert

if TYPE_CHECKING:
    import grpc

    from supervisord.agents import Agents
    from supervisord.killswitch import KillSwitch

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class KillingService(agents_pb2_grpc.AgentServiceServicer):
    def __init__(self, *, agents: Agents, killswitch: KillSwitch) -> None:
        self._agents = agents
        self._killswitch = killswitch

    async def GetAgent(self, request: agents_pb2.GetAgentRequest, _context: Context) -> agents_pb2.GetAgentResponse:
        return agents_pb2.GetAgentResponse(agent=convert.agent(self._agents.find(request.agent)))

    async def ListAgents(
        self, request: agents_pb2.ListAgentsRequest, _context: Context
    ) -> agents_pb2.ListAgentsResponse:
        if request.HasField("selector"):
            chosen = self._agents.select(convert.selector(request.selector), live_only=not request.include_ended)
        else:
            chosen = self._agents.all() if request.include_ended else self._agents.live()
        shown, token = convert.page(
            chosen, size=request.page_size, token=request.page_token, key=lambda agent: agent.agent_id
        )
        return agents_pb2.ListAgentsResponse(agents=[convert.agent(agent) for agent in shown], next_page_token=token)

    async def Kill(self, request: agents_pb2.KillRequest, _context: Context) -> agents_pb2.KillResponse:
        chosen = self._agents.select(convert.selector(request.selector), live_only=True)
        reason = convert.words(request.reason)
        receipts = await self._killswitch.kill(chosen, actor=current_caller().actor, reason=reason)
        return agents_pb2.KillResponse(receipts=[convert.receipt(receipt) for receipt in receipts])
