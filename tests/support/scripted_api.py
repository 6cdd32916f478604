"""A gRPC server that speaks stockade.v1 and behaves as told: for tests of what stands in front of the daemon.

Its agents are threads that understand a few commands (`cat`, `exit N`, `hang`, …), so a client meets the real protocol
with real timing and no sandbox.
"""

# ruff: noqa: N802 - a servicer's methods have the names of the protos

from __future__ import annotations

import queue
import threading
from concurrent import futures
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status
from stockade.v1 import (
    actions_pb2,
    actions_pb2_grpc,
    agents_pb2,
    agents_pb2_grpc,
    grants_pb2,
    grants_pb2_grpc,
    policies_pb2,
    policies_pb2_grpc,
    system_pb2,
    system_pb2_grpc,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Context = grpc.ServicerContext

AGENT_ID = "ag_" + "a" * 26
HOSTILE = "evil\x1b]0;title\x07\u202egnp.exe\nSECOND LINE"
STARTED = 1_700_000_000


def refuse(context: Context, code: int, message: str, reason: str, remedy: str = "", **facts: str) -> None:
    """Abort as the daemon does: with the reason, the facts and the remedy as rich details."""
    details = []
    for message_ in (
        error_details_pb2.ErrorInfo(reason=reason, domain="stockade", metadata=facts),
        error_details_pb2.LocalizedMessage(locale="en", message=remedy),
    ):
        packed = AnyMessage()
        packed.Pack(message_)
        details.append(packed)
    context.abort_with_status(rpc_status.to_status(status_pb2.Status(code=code, message=message, details=details)))


class Agents(agents_pb2_grpc.AgentServiceServicer):
    def __init__(self) -> None:
        self.launches: list[agents_pb2.LaunchRequest] = []
        self.selectors: list[agents_pb2.Selector] = []
        self.signals: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.attaches: list[agents_pb2.AttachStart] = []
        self.drop_after = -1  # break the connection of the first attach after so many chunks
        self.killed = threading.Event()
        self.attached = threading.Event()
        self._inputs: queue.Queue[Any] = queue.Queue()

    def agent(self, state: int = agents_pb2.AGENT_STATE_RUNNING, **more: Any) -> agents_pb2.Agent:
        found = agents_pb2.Agent(agent_id=AGENT_ID, name="reader", state=state, policy="default", **more)  # type: ignore[arg-type]
        found.started_at.seconds = STARTED
        found.posture.update({"seccomp": "sha256:00", "degraded": [], "limits": {"pids": 256, "cpus": 1.5}})
        return found

    def Launch(self, request: agents_pb2.LaunchRequest, context: Context) -> agents_pb2.LaunchResponse:
        self.launches.append(request)
        command = list(request.spec.command)
        if request.dry_run:
            return agents_pb2.LaunchResponse(plan_text="bind fd 0 at /workspace\nexec true\n")
        if command[:1] == [b"missing"]:
            refuse(context, code_pb2.ABORTED, "cannot exec missing: No such file or directory", "CANNOT_LAUNCH",
                   "check the command", step="exec", errno="2")  # fmt: skip
        if command[:1] == [b"noexec"]:
            refuse(context, code_pb2.ABORTED, "cannot exec noexec: denied", "CANNOT_LAUNCH", step="exec", errno="13")
        if request.spec.name == "held":
            refuse(context, code_pb2.FAILED_PRECONDITION, "cannot launch held: a hold forbids it", "HELD", "see holds")
        return agents_pb2.LaunchResponse(agent=self.agent(labels=dict(request.spec.labels)))

    def GetAgent(self, request: agents_pb2.GetAgentRequest, context: Context) -> agents_pb2.GetAgentResponse:
        if request.agent not in {"reader", AGENT_ID} and not request.agent.startswith("ag_"):
            refuse(
                context, code_pb2.NOT_FOUND, f"cannot find {request.agent}: no such agent", "NOT_FOUND", "see status"
            )
        dead = self.killed.is_set()
        return agents_pb2.GetAgentResponse(
            agent=self.agent(agents_pb2.AGENT_STATE_KILLED if dead else agents_pb2.AGENT_STATE_RUNNING)
        )

    def ListAgents(self, request: agents_pb2.ListAgentsRequest, _context: Context) -> agents_pb2.ListAgentsResponse:
        if not request.page_token:
            first = self.agent(memory_bytes=13 << 20, pids=3, labels={"team": "a"})
            return agents_pb2.ListAgentsResponse(agents=[first], next_page_token="2")
        ended = self.agent(agents_pb2.AGENT_STATE_EXITED, exit_code=3)
        ended.name = HOSTILE
        return agents_pb2.ListAgentsResponse(agents=[ended] if request.include_ended else [])

    def Wait(self, request: agents_pb2.WaitRequest, _context: Context) -> agents_pb2.WaitResponse:
        if request.HasField("timeout"):
            return agents_pb2.WaitResponse(agent=self.agent())
        return agents_pb2.WaitResponse(agent=self.agent(agents_pb2.AGENT_STATE_EXITED, exit_code=7))

    def Logs(self, request: agents_pb2.LogsRequest, _context: Context) -> Iterator[agents_pb2.LogsResponse]:
        del request
        yield agents_pb2.LogsResponse(stream=agents_pb2.OUTPUT_STREAM_STDOUT, data=b"out\x1b[31m\xff\n", offset=0)
        yield agents_pb2.LogsResponse(stream=agents_pb2.OUTPUT_STREAM_STDERR, data=b"err\n", offset=0)

    def Attach(
        self, requests: Iterator[agents_pb2.AttachRequest], context: Context
    ) -> Iterator[agents_pb2.AttachResponse]:
        start = next(requests).start
        self.attaches.append(start)
        yield agents_pb2.AttachResponse(started=agents_pb2.AttachStarted(agent_id=start.agent))
        for kind, value in self._program(list(self.launches[-1].spec.command), requests, context, start):
            if kind == "exit":
                yield agents_pb2.AttachResponse(exit=value)
            else:
                yield agents_pb2.AttachResponse(chunk=value)

    def Exec(self, requests: Iterator[agents_pb2.ExecRequest], context: Context) -> Iterator[agents_pb2.ExecResponse]:
        start = next(requests).start
        yield agents_pb2.ExecResponse(started=agents_pb2.ExecStarted(agent_id=start.agent))
        for kind, value in self._program(list(start.command), requests, context, agents_pb2.AttachStart()):
            if kind == "exit":
                yield agents_pb2.ExecResponse(exit=value)
            else:
                yield agents_pb2.ExecResponse(chunk=value)

    def _program(  # noqa: C901, PLR0912 - a list of commands, one after the other
        self,
        command: list[bytes],
        requests: Iterator[Any],
        context: Context,
        start: agents_pb2.AttachStart,
    ) -> Iterator[tuple[str, Any]]:
        def out(data: bytes, offset: int = 0, *, stderr: bool = False) -> tuple[str, Any]:
            stream = agents_pb2.OUTPUT_STREAM_STDERR if stderr else agents_pb2.OUTPUT_STREAM_STDOUT
            return "chunk", agents_pb2.OutputChunk(stream=stream, data=data, offset=offset)

        self.attached.set()
        code, number = 0, None
        match command:
            case [b"exit", how]:
                code = int(how)
            case [b"print"]:
                yield out(b"\x00\xffout\x1b[31m\n")
                yield out(b"err\xfe", stderr=True)
            case [b"count"]:  # ten bytes, one a chunk
                for at in range(start.stdout_offset, 10):
                    if self.drop_after == at and len(self.attaches) == 1:
                        context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
                    yield out(b"%d" % at, at)
            case [b"flood"]:
                while context.is_active() and not self.killed.is_set():
                    yield out(b"y\n" * 4096)
                number = 9
            case [b"cat"]:
                at = 0
                for request in requests:
                    if request.WhichOneof("input") == "stdin_eof":
                        break
                    if request.WhichOneof("input") == "stdin":
                        yield out(request.stdin, at)
                        at += len(request.stdin)
            case [b"hang"]:
                threading.Thread(target=self._collect, args=(requests,), daemon=True).start()
                yield out(b"ready\n")
                while number is None:
                    if self.killed.is_set():
                        number = 9
                        break
                    try:
                        request = self._inputs.get(timeout=0.02)
                    except queue.Empty:
                        if not context.is_active():
                            return
                        continue
                    match request.WhichOneof("input"):
                        case "signal":
                            self.signals.append(request.signal)
                            yield out(b"signal %d\n" % request.signal)
                            number = request.signal if request.signal != 2 else None
                        case "resize":
                            self.sizes.append((request.resize.rows, request.resize.cols))
                        case "stdin":
                            yield out(b"<" + request.stdin + b">")
        yield "exit", agents_pb2.ExitStatus(code=None if number else code, signal=number)

    def _collect(self, requests: Iterator[Any]) -> None:
        try:
            for request in requests:
                self._inputs.put(request)
        except grpc.RpcError:  # the client has gone
            return

    def Kill(self, request: agents_pb2.KillRequest, context: Context) -> agents_pb2.KillResponse:
        self.selectors.append(request.selector)
        if list(request.selector.agents) == ["mine-not"]:
            refuse(context, code_pb2.PERMISSION_DENIED, "cannot kill mine-not: not yours", "ROLE_TOO_LOW", "ask root")
        self.killed.set()
        receipt = agents_pb2.Receipt(
            receipt_id="rc_" + "b" * 26, agent_id=AGENT_ID, name="reader", verified_empty="stuck" not in request.reason,
            processes_killed=51, egress_cut_ms=0.4, dead_ms=12.5, reason=request.reason, left_pids=[4711],
        )  # fmt: skip
        return agents_pb2.KillResponse(receipts=[receipt])

    def Freeze(self, request: agents_pb2.FreezeRequest, _context: Context) -> agents_pb2.FreezeResponse:
        self.selectors.append(request.selector)
        return agents_pb2.FreezeResponse(agents=[self.agent(agents_pb2.AGENT_STATE_FROZEN)])

    def Hold(self, request: agents_pb2.HoldRequest, _context: Context) -> agents_pb2.HoldResponse:
        return agents_pb2.HoldResponse(
            hold=agents_pb2.HoldOrder(hold_id="ho_1", target=request.target, reason=request.reason)
        )


class Grants(grants_pb2_grpc.GrantServiceServicer):
    def __init__(self) -> None:
        self.requests: list[grants_pb2.GrantRequest] = []

    def Grant(self, request: grants_pb2.GrantRequest, context: Context) -> grants_pb2.GrantResponse:
        self.requests.append(request)
        if request.scope == "nonsense":
            refuse(
                context,
                code_pb2.INVALID_ARGUMENT,
                "cannot read scope 'nonsense': no kind",
                "INVALID_INPUT",
                "write llm:*",
            )
        made = grants_pb2.ScopeGrant(
            grant_id="gr_" + "c" * 26, agent_id=AGENT_ID, agent_name="reader", scope=request.scope,
            state=grants_pb2.GRANT_STATE_ACTIVE, uses_left=request.max_uses if request.HasField("max_uses") else None,
        )  # fmt: skip
        if request.HasField("ttl"):
            made.expires_at.seconds = STARTED + request.ttl.seconds
        return grants_pb2.GrantResponse(grant=made)


class Actions(actions_pb2_grpc.ActionServiceServicer):
    good = True

    def __init__(self) -> None:
        self.queries: list[actions_pb2.QueryActionsRequest] = []
        self.tails: list[actions_pb2.TailActionsRequest] = []

    def entry(self, seq: int) -> actions_pb2.Action:
        return actions_pb2.Action(
            seq=seq, time_unix_nanos=STARTED * 10**9 + 123_456_789, agent_id=AGENT_ID, actor="agent:" + AGENT_ID,
            verb="egress.request", object=HOSTILE, verdict="denied", reason="no-grant",
            details_json=b'{"scope": "http:GET:x"}',
        )  # fmt: skip

    def QueryActions(
        self, request: actions_pb2.QueryActionsRequest, context: Context
    ) -> actions_pb2.QueryActionsResponse:
        if request.agent == "nobody":
            refuse(context, code_pb2.NOT_FOUND, "cannot find agent 'nobody': there is none", "NOT_FOUND", "see status")
        kept = actions_pb2.QueryActionsRequest()
        kept.CopyFrom(request)
        self.queries.append(kept)
        if request.page_token:
            return actions_pb2.QueryActionsResponse(actions=[self.entry(2)])
        return actions_pb2.QueryActionsResponse(actions=[self.entry(1)], next_page_token="2")

    def TailActions(
        self, request: actions_pb2.TailActionsRequest, _context: Context
    ) -> Iterator[actions_pb2.TailActionsResponse]:
        self.tails.append(request)
        yield actions_pb2.TailActionsResponse(action=self.entry(request.after_seq + 1))

    def VerifyLog(self, request: actions_pb2.VerifyLogRequest, _context: Context) -> actions_pb2.VerifyLogResponse:
        del request
        problem = "" if self.good else "entry 17 in segment 3: its hash is not in the tree"
        return actions_pb2.VerifyLogResponse(ok=self.good, size=20, root=bytes(32), problem=problem)

    def Checkpoint(self, request: actions_pb2.CheckpointRequest, _context: Context) -> actions_pb2.CheckpointResponse:
        del request
        return actions_pb2.CheckpointResponse(note="stockade/default\n20\nAAAA\n\n— stockade Zm9v\n")


class Policies(policies_pb2_grpc.PolicyServiceServicer):
    def CheckPolicy(
        self, request: policies_pb2.CheckPolicyRequest, _context: Context
    ) -> policies_pb2.CheckPolicyResponse:
        if b"memroy" not in request.content:
            return policies_pb2.CheckPolicyResponse(ok=True)
        problem = policies_pb2.PolicyProblem(
            filename=request.filename, line=3, column=5, key="limits.memroy", message="unknown key", remedy="memory?"
        )
        return policies_pb2.CheckPolicyResponse(ok=False, problems=[problem])

    def Explain(self, request: policies_pb2.ExplainRequest, _context: Context) -> policies_pb2.ExplainResponse:
        return policies_pb2.ExplainResponse(allowed=False, reason="no grant covers it", remedy=f"grant {request.scope}")


class System(system_pb2_grpc.SystemServiceServicer):
    def Version(self, request: system_pb2.VersionRequest, _context: Context) -> system_pb2.VersionResponse:
        del request
        return system_pb2.VersionResponse(version="0.1.0", instance="test")

    def Doctor(self, request: system_pb2.DoctorRequest, _context: Context) -> system_pb2.DoctorResponse:
        del request
        finding = system_pb2.Finding(
            control="seccomp", present=False, how="prctl", remedy="another kernel", required=True
        )
        return system_pb2.DoctorResponse(ok=False, findings=[finding])

    def Ready(self, request: system_pb2.ReadyRequest, _context: Context) -> system_pb2.ReadyResponse:
        del request
        part = system_pb2.Component(name="gateway", ready=False, detail="breaker open: Connection refused")
        return system_pb2.ReadyResponse(ready=False, components=[part])


class Api:
    """What is served, to be looked at and changed by a test."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.target = f"unix:{socket}"
        self.agents, self.grants, self.actions = Agents(), Grants(), Actions()


@contextmanager
def scripted_api(socket: Path) -> Iterator[Api]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
    api = Api(socket)
    agents_pb2_grpc.add_AgentServiceServicer_to_server(api.agents, server)
    grants_pb2_grpc.add_GrantServiceServicer_to_server(api.grants, server)
    actions_pb2_grpc.add_ActionServiceServicer_to_server(api.actions, server)
    policies_pb2_grpc.add_PolicyServiceServicer_to_server(Policies(), server)
    system_pb2_grpc.add_SystemServiceServicer_to_server(System(), server)
    server.add_insecure_port(api.target)
    server.start()
    try:
        yield api
    finally:
        api.agents.killed.set()
        server.stop(None).wait()
