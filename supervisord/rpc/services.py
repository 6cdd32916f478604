"""Every service of the API, made of the parts of the daemon that it needs."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from stockade.v1 import (
    actions_pb2_grpc,
    agents_pb2_grpc,
    changes_pb2_grpc,
    grants_pb2_grpc,
    policies_pb2_grpc,
    registry_pb2_grpc,
    requests_pb2_grpc,
    system_pb2_grpc,
)

from supervisord.backup import Backup
from supervisord.rpc.agents import AgentService
from supervisord.rpc.changes import ChangeService
from supervisord.rpc.governance import ActionService, GrantService, PolicyService, RequestService
from supervisord.rpc.registry import RegistryService
from supervisord.rpc.system import SystemService

if TYPE_CHECKING:
    import grpc

    from supervisord.parts import Parts


def register(server: grpc.aio.Server, parts: Parts, *, started_at_ns: int) -> None:
    """Have the server answer every RPC of the API."""
    config = parts.config
    agents_pb2_grpc.add_AgentServiceServicer_to_server(
        AgentService(
            agents=parts.agents,
            launching=parts.launching,
            killswitch=parts.killswitch,
            acts=parts.acts,
            holds=parts.holds,
            policies=parts.policies,
            registry=parts.registry,
            launcher=parts.launcher,
            layers=parts.layers,
            ledgers=parts.exchanges.ledgers,
            leases=parts.leases,
            output_dir=config.run_dir / "agents",
            entropy=os.urandom,
            now_ns=time.time_ns,
        ),
        server,
    )
    changes_pb2_grpc.add_ChangeServiceServicer_to_server(ChangeService(layers=parts.layers), server)
    grants_pb2_grpc.add_GrantServiceServicer_to_server(
        GrantService(agents=parts.agents, book=parts.book, acts=parts.acts), server
    )
    requests_pb2_grpc.add_RequestServiceServicer_to_server(
        RequestService(agents=parts.agents, requests=parts.requests, acts=parts.acts), server
    )
    actions_pb2_grpc.add_ActionServiceServicer_to_server(
        ActionService(agents=parts.agents, actions=parts.actions, sinks=parts.sinks), server
    )
    policies_pb2_grpc.add_PolicyServiceServicer_to_server(
        PolicyService(
            config=config, policies=parts.policies, agents=parts.agents, book=parts.book, images=parts.images
        ),
        server,
    )
    registry_pb2_grpc.add_RegistryServiceServicer_to_server(
        RegistryService(
            registry=parts.registry,
            policies=parts.policies,
            agents=parts.agents,
            book=parts.book,
            ledgers=parts.exchanges.ledgers,
            actions=parts.actions,
            now_ns=time.time_ns,
        ),
        server,
    )
    system_pb2_grpc.add_SystemServiceServicer_to_server(
        SystemService(
            instance=config.instance,
            state_dir=config.state_dir,
            started_at_ns=started_at_ns,
            health=parts.health,
            sinks=parts.sinks.states,
            backup=Backup(state_dir=config.state_dir, actions=parts.actions, store=parts.store),
        ),
        server,
    )
