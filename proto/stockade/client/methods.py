"""The RPCs that the client calls: path and message types of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, TypeVar

from google.protobuf.message import Message

from stockade.v1 import actions_pb2 as actions
from stockade.v1 import agents_pb2 as agents
from stockade.v1 import changes_pb2 as changes
from stockade.v1 import grants_pb2 as grants
from stockade.v1 import policies_pb2 as policies
from stockade.v1 import registry_pb2 as registry
from stockade.v1 import requests_pb2 as requests
from stockade.v1 import system_pb2 as system

if TYPE_CHECKING:
    from collections.abc import Callable

Req = TypeVar("Req", bound=Message)
Res = TypeVar("Res", bound=Message)


class Method(Generic[Req, Res]):
    """One RPC. The generated gRPC stubs would do the same, without types and with an import of their own."""

    __slots__ = ("decode", "encode", "path")

    def __init__(self, path: str, request: type[Req], response: type[Res]) -> None:
        self.path = f"/stockade.v1.{path}"
        self.encode: Callable[[Req], bytes] = request.SerializeToString
        self.decode: Callable[[bytes], Res] = response.FromString


LAUNCH: Final = Method("AgentService/Launch", agents.LaunchRequest, agents.LaunchResponse)
GET_AGENT: Final = Method("AgentService/GetAgent", agents.GetAgentRequest, agents.GetAgentResponse)
LIST_AGENTS: Final = Method("AgentService/ListAgents", agents.ListAgentsRequest, agents.ListAgentsResponse)
WATCH_AGENTS: Final = Method("AgentService/WatchAgents", agents.WatchAgentsRequest, agents.WatchAgentsResponse)
WAIT: Final = Method("AgentService/Wait", agents.WaitRequest, agents.WaitResponse)
LOGS: Final = Method("AgentService/Logs", agents.LogsRequest, agents.LogsResponse)
ATTACH: Final = Method("AgentService/Attach", agents.AttachRequest, agents.AttachResponse)
EXEC: Final = Method("AgentService/Exec", agents.ExecRequest, agents.ExecResponse)
KILL: Final = Method("AgentService/Kill", agents.KillRequest, agents.KillResponse)
FREEZE: Final = Method("AgentService/Freeze", agents.FreezeRequest, agents.FreezeResponse)
THAW: Final = Method("AgentService/Thaw", agents.ThawRequest, agents.ThawResponse)
RENEW: Final = Method("AgentService/Renew", agents.RenewRequest, agents.RenewResponse)
KILL_EXEC: Final = Method("AgentService/KillExec", agents.KillExecRequest, agents.KillExecResponse)
HOLD: Final = Method("AgentService/Hold", agents.HoldRequest, agents.HoldResponse)
RELEASE: Final = Method("AgentService/Release", agents.ReleaseRequest, agents.ReleaseResponse)
LIST_BUDGETS: Final = Method("AgentService/ListBudgets", agents.ListBudgetsRequest, agents.ListBudgetsResponse)
LIST_HOLDS: Final = Method("AgentService/ListHolds", agents.ListHoldsRequest, agents.ListHoldsResponse)
GRANT: Final = Method("GrantService/Grant", grants.GrantRequest, grants.GrantResponse)
REVOKE: Final = Method("GrantService/Revoke", grants.RevokeRequest, grants.RevokeResponse)
LIST_GRANTS: Final = Method("GrantService/ListGrants", grants.ListGrantsRequest, grants.ListGrantsResponse)
LIST_REQUESTS: Final = Method(
    "RequestService/ListRequests", requests.ListRequestsRequest, requests.ListRequestsResponse
)
APPROVE: Final = Method("RequestService/Approve", requests.ApproveRequest, requests.ApproveResponse)
DENY: Final = Method("RequestService/Deny", requests.DenyRequest, requests.DenyResponse)
WATCH_REQUESTS: Final = Method(
    "RequestService/WatchRequests", requests.WatchRequestsRequest, requests.WatchRequestsResponse
)
QUERY_ACTIONS: Final = Method("ActionService/QueryActions", actions.QueryActionsRequest, actions.QueryActionsResponse)
TAIL_ACTIONS: Final = Method("ActionService/TailActions", actions.TailActionsRequest, actions.TailActionsResponse)
VERIFY_LOG: Final = Method("ActionService/VerifyLog", actions.VerifyLogRequest, actions.VerifyLogResponse)
CHECKPOINT: Final = Method("ActionService/Checkpoint", actions.CheckpointRequest, actions.CheckpointResponse)
PROVE: Final = Method("ActionService/Prove", actions.ProveRequest, actions.ProveResponse)
PROVE_CONSISTENCY: Final = Method(
    "ActionService/ProveConsistency", actions.ProveConsistencyRequest, actions.ProveConsistencyResponse
)
LOG_STATUS: Final = Method("ActionService/LogStatus", actions.LogStatusRequest, actions.LogStatusResponse)
ROTATE_KEY: Final = Method("ActionService/RotateKey", actions.RotateKeyRequest, actions.RotateKeyResponse)
REDACT_ACTION: Final = Method("ActionService/RedactAction", actions.RedactActionRequest, actions.RedactActionResponse)
DIFF: Final = Method("ChangeService/Diff", changes.DiffRequest, changes.DiffResponse)
APPLY: Final = Method("ChangeService/Apply", changes.ApplyRequest, changes.ApplyResponse)
DISCARD: Final = Method("ChangeService/Discard", changes.DiscardRequest, changes.DiscardResponse)
LIST_POLICIES: Final = Method("PolicyService/ListPolicies", policies.ListPoliciesRequest, policies.ListPoliciesResponse)
GET_POLICY: Final = Method("PolicyService/GetPolicy", policies.GetPolicyRequest, policies.GetPolicyResponse)
CHECK_POLICY: Final = Method("PolicyService/CheckPolicy", policies.CheckPolicyRequest, policies.CheckPolicyResponse)
EXPLAIN: Final = Method("PolicyService/Explain", policies.ExplainRequest, policies.ExplainResponse)
REGISTER_DEFINITION: Final = Method(
    "RegistryService/RegisterDefinition", registry.RegisterDefinitionRequest, registry.RegisterDefinitionResponse
)
GET_DEFINITION: Final = Method(
    "RegistryService/GetDefinition", registry.GetDefinitionRequest, registry.GetDefinitionResponse
)
LIST_DEFINITIONS: Final = Method(
    "RegistryService/ListDefinitions", registry.ListDefinitionsRequest, registry.ListDefinitionsResponse
)
DEPRECATE_DEFINITION: Final = Method(
    "RegistryService/DeprecateDefinition", registry.DeprecateDefinitionRequest, registry.DeprecateDefinitionResponse
)
REVIEW: Final = Method("RegistryService/Review", registry.ReviewRequest, registry.ReviewResponse)
LIST_RUNNING: Final = Method("RegistryService/ListRunning", registry.ListRunningRequest, registry.ListRunningResponse)
VERSION: Final = Method("SystemService/Version", system.VersionRequest, system.VersionResponse)
DOCTOR: Final = Method("SystemService/Doctor", system.DoctorRequest, system.DoctorResponse)
BACKUP: Final = Method("SystemService/Backup", system.BackupRequest, system.BackupResponse)
READY: Final = Method("SystemService/Ready", system.ReadyRequest, system.ReadyResponse)
