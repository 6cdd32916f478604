"""Who called, and what that caller may ask for.

Roles are decided once a connection, from what the kernel says of the peer (door.py), and checked once an RPC, from the
table below. A method that is not in the table is refused for everybody: a new one has to be given a role first.
"""

from __future__ import annotations

import contextlib
import contextvars
import enum
import pwd
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # googleapis ships no stubs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping


class Role(enum.IntEnum):
    """Ordered: a role may do what every lower one may."""

    READER = 1
    OPERATOR = 2
    ADMIN = 3


@dataclass(frozen=True, slots=True)
class Access:
    """Who has which role. Root is always an admin: refusing it would only send it round by ptrace."""

    admin_uids: frozenset[int] = frozenset({0})
    admin_gids: frozenset[int] = frozenset()
    operator_uids: frozenset[int] = frozenset()
    operator_gids: frozenset[int] = frozenset()
    reader_uids: frozenset[int] = frozenset()
    reader_gids: frozenset[int] = frozenset()
    everyone_reads: bool = False


def role(uid: int, gids: frozenset[int], access: Access) -> Role | None:
    """The highest role that a process of this user, primary and supplementary groups has; None: not to be served."""
    if uid == 0 or uid in access.admin_uids or gids & access.admin_gids:
        return Role.ADMIN
    if uid in access.operator_uids or gids & access.operator_gids:
        return Role.OPERATOR
    if access.everyone_reads or uid in access.reader_uids or gids & access.reader_gids:
        return Role.READER
    return None


@dataclass(frozen=True, slots=True)
class Caller:
    """The process at the other end of a connection, as the kernel saw it when it connected.

    For one that came over TCP, `certificate` is who it proved to be, and the ids are -1, which nobody has.
    """

    uid: int
    gid: int
    pid: int
    role: Role
    name: str
    certificate: str = ""

    @property
    def actor(self) -> str:
        """As the action log names it: `uid:0(root)`, `cn:orchestrator`."""
        return self.certificate or f"uid:{self.uid}({self.name})"


def certificate_names(auth_context: Mapping[str, Iterable[bytes]]) -> tuple[str, ...]:
    """What a verified client certificate says of its holder: `spiffe://…` URIs first, then `cn:NAME`."""
    if b"ssl" not in auth_context.get("transport_security_type", ()):
        return ()
    alternatives = [name.decode("utf-8", "replace") for name in auth_context.get("x509_subject_alternative_name", ())]
    common = [name.decode("utf-8", "replace") for name in auth_context.get("x509_common_name", ())]
    return (*(name for name in alternatives if name.startswith("spiffe://")), *(f"cn:{name}" for name in common))


def certified(auth_context: Mapping[str, Iterable[bytes]], roles: Mapping[str, Role]) -> Caller | None:
    """The caller behind a client certificate, where one of its names has a role."""
    for name in certificate_names(auth_context):
        if name in roles:
            return Caller(uid=-1, gid=-1, pid=-1, role=roles[name], name=name, certificate=name)
    return None


def user_name(uid: int) -> str:
    """The login name of `uid`, or `?` where it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return "?"


_READER_METHODS: Final = {
    "AgentService": ("GetAgent", "ListAgents", "WatchAgents", "Wait", "ListHolds", "ListBudgets"),
    "GrantService": ("ListGrants",),
    "RequestService": ("ListRequests", "WatchRequests"),
    "ActionService": ("QueryActions", "TailActions", "Prove", "ProveConsistency", "LogStatus"),
    "PolicyService": ("ListPolicies", "GetPolicy", "CheckPolicy", "Explain"),
    "RegistryService": ("GetDefinition", "ListDefinitions", "Review", "ListRunning"),
    "SystemService": ("Version", "Ready"),
}
# Logs and Attach show what an agent printed, which may be secret; VerifyLog and Doctor cost the host real work.
_OPERATOR_METHODS: Final = {
    "AgentService": (
        "Launch",
        "Logs",
        "Attach",
        "Exec",
        "Kill",
        "Freeze",
        "Thaw",
        "Renew",
        "KillExec",
        "Hold",
        "Release",
    ),
    "GrantService": ("Grant", "Revoke"),
    "RequestService": ("Approve", "Deny"),
    "ActionService": ("VerifyLog", "Checkpoint"),
    "ChangeService": ("Diff", "Apply", "Discard"),
    "SystemService": ("Doctor",),
}
# A policy that takes registered agents only would mean nothing if whoever launches could register too.
_ADMIN_METHODS: Final = {
    "ActionService": ("RotateKey", "RedactAction"),
    "RegistryService": ("RegisterDefinition", "DeprecateDefinition"),
    "SystemService": ("Backup",),  # all that there is, what readers may not see too
}
_HEALTH: Final = "/grpc.health.v1.Health/"

METHOD_ROLES: Final[Mapping[str, Role]] = {
    **{f"/stockade.v1.{service}/{m}": Role.READER for service, methods in _READER_METHODS.items() for m in methods},
    **{f"/stockade.v1.{service}/{m}": Role.OPERATOR for service, methods in _OPERATOR_METHODS.items() for m in methods},
    **{f"/stockade.v1.{service}/{m}": Role.ADMIN for service, methods in _ADMIN_METHODS.items() for m in methods},
    **{_HEALTH + method: Role.READER for method in ("Check", "List", "Watch")},
}

CALLS_PER_READER_MAX: Final = 16
CALLS_PER_CALLER_MAX: Final = 512

_current: contextvars.ContextVar[Caller] = contextvars.ContextVar("stockade_caller")


def current_caller() -> Caller:
    """Who made the RPC that is being served; raises LookupError outside one."""
    return _current.get()


@dataclass(frozen=True, slots=True)
class Refusal:
    code: grpc.StatusCode
    message: str
    reason: str
    remedy: str


def judge(method: str, caller: Caller | None) -> Refusal | None:
    """Why `caller` may not call `method` (a full name: /package.Service/Method); None: it may."""
    if caller is None:
        return Refusal(
            grpc.StatusCode.UNAUTHENTICATED,
            f"cannot call {method}: neither the control socket nor a certificate says who is calling",
            "UNKNOWN_CALLER",
            "connect to control.sock in the daemon's run_dir, or with a certificate that has a role in stockade.toml",
        )
    needed = METHOD_ROLES.get(method)
    if needed is not None and caller.role >= needed:
        return None
    wanted = "no role may" if needed is None else f"it needs the role {needed.name.lower()}"
    return Refusal(
        grpc.StatusCode.PERMISSION_DENIED,
        f"cannot call {method} as {caller.actor} with the role {caller.role.name.lower()}: {wanted}",
        "ROLE_TOO_LOW",
        "ask an operator, or have the daemon's administrator give your user or group that role in stockade.toml",
    )


def status_trailer(refusal: Refusal) -> tuple[str, bytes]:
    """The refusal as the google.rpc.Status trailer that clients read the reason and the remedy from."""
    details = []
    for message in (
        error_details_pb2.ErrorInfo(reason=refusal.reason, domain="stockade"),
        error_details_pb2.LocalizedMessage(locale="en", message=refusal.remedy),
    ):
        packed = AnyMessage()
        packed.Pack(message)
        details.append(packed)
    status = status_pb2.Status(code=refusal.code.value[0], message=refusal.message, details=details)
    return ("grpc-status-details-bin", status.SerializeToString())


async def _too_many(context: Context, caller: Caller) -> NoReturn:
    refusal = Refusal(
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        f"cannot serve {caller.actor}: it has too many calls open",
        "TOO_MANY_CALLS",
        "end some of them first",
    )
    await context.abort(refusal.code, refusal.message, (status_trailer(refusal),))
    raise AssertionError("abort returned")


# What grpc leaves untyped: a handler has one of four shapes, and messages are whatever its service says.
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = Any


class CallerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Names the caller of every RPC, and turns away those whose role is too low.

    `peers` maps the path that a connection's socket is bound to (the door makes these) to who is behind it;
    `certificates` maps names in client certificates (`cn:NAME`, `spiffe://…`) to roles.
    """

    def __init__(self, peers: Mapping[str, Caller], certificates: Mapping[str, Role] | None = None) -> None:
        self._peers = peers
        self._certificates = dict(certificates or {})
        self._calls: Counter[str] = Counter()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        # None: a method that nobody registered; grpc then answers UNIMPLEMENTED by itself.
        handler = await continuation(handler_call_details)
        return None if handler is None else self._guarded(handler_call_details.method, handler)

    @contextlib.contextmanager
    def _counted(self, caller: Caller) -> Iterator[bool]:
        """Whether this call is within what the caller may have open at once; each costs the daemon memory.

        Root is not counted: nothing may keep an operator from the kill switch.
        """
        most = CALLS_PER_READER_MAX if caller.role is Role.READER else CALLS_PER_CALLER_MAX
        self._calls[caller.actor] += 1
        try:
            yield caller.uid == 0 or self._calls[caller.actor] <= most
        finally:
            self._calls[caller.actor] -= 1
            if not self._calls[caller.actor]:
                del self._calls[caller.actor]

    async def _admit(self, method: str, context: Context) -> Caller:
        peer = context.peer()
        if peer.startswith("unix:"):
            caller = self._peers.get(peer.removeprefix("unix:"))
        else:
            caller = certified(context.auth_context(), self._certificates)
        refusal = judge(method, caller)
        if refusal is not None:
            await context.abort(refusal.code, refusal.message, (status_trailer(refusal),))
        assert caller is not None  # noqa: S101 - judge() refuses whoever has no name
        # A task serves one RPC from here to its end, so the variable is that RPC's own.
        _current.set(caller)
        return caller

    def _guarded(self, method: str, inner: Handler) -> Handler:
        """`inner` behind _admit, in its own shape: grpc has four, by who streams."""

        async def unary(request: object, context: Context) -> object:
            caller = await self._admit(method, context)
            with self._counted(caller) as admitted:
                if not admitted:
                    await _too_many(context, caller)
                return await (inner.stream_unary or inner.unary_unary)(request, context)

        async def stream(request: object, context: Context) -> AsyncIterator[object]:
            caller = await self._admit(method, context)
            with self._counted(caller) as admitted:
                if not admitted:
                    await _too_many(context, caller)
                answer = (inner.stream_stream or inner.unary_stream)(request, context)
                if hasattr(answer, "__aiter__"):
                    async for message in answer:
                        yield message
                else:  # a handler that writes with context.write()
                    await answer

        make: Any
        behaviour: Any
        match inner.request_streaming, inner.response_streaming:
            case False, False:
                make, behaviour = grpc.unary_unary_rpc_method_handler, unary
            case True, False:
                make, behaviour = grpc.stream_unary_rpc_method_handler, unary
            case False, True:
                make, behaviour = grpc.unary_stream_rpc_method_handler, stream
            case _:
                make, behaviour = grpc.stream_stream_rpc_method_handler, stream
        return make(behaviour, inner.request_deserializer, inner.response_serializer)
