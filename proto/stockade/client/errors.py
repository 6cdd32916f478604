"""What a call can fail with: one exception a kind, with the daemon's message, its reason code and what to do next."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Final

import grpc

if TYPE_CHECKING:
    from collections.abc import Mapping

DETAILS_KEY: Final = "grpc-status-details-bin"
DOMAIN: Final = "stockade"
GREETING_SECONDS_MAX: Final = 0.3


class StockadeError(Exception):
    """A call that failed. The message reads "cannot VERB OBJECT: cause"; `remedy` says what to do next, or is empty.

    `reason` is a stable code in upper case: `NOT_FOUND`, `ROLE_TOO_LOW`; `facts` go with it: the step of a launch and
    its errno with `CANNOT_LAUNCH`.
    """

    def __init__(
        self, message: str, *, remedy: str = "", reason: str = "", facts: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.reason = reason
        self.facts = dict(facts or {})


class NotFound(StockadeError):  # noqa: N818 - read at the except: `except NotFound`
    """There is no such agent, grant, request or policy."""


class NotPermitted(StockadeError):  # noqa: N818 - as NotFound
    """The caller may not do this."""


class Conflict(StockadeError):  # noqa: N818 - as NotFound
    """The thing is there but in another state, its name is taken, or a hold forbids it."""


class InvalidArgument(StockadeError):  # noqa: N818 - as NotFound
    """The request itself is wrong; the same one will never do."""


class Unreachable(StockadeError):  # noqa: N818 - as NotFound
    """No daemon answers."""


class Unavailable(StockadeError):  # noqa: N818 - as NotFound
    """The daemon answers, but a part of it does not; the same call may do later."""


class Failed(StockadeError):  # noqa: N818 - as NotFound
    """The daemon tried and could not, or the time was up."""


_KINDS: Final[dict[grpc.StatusCode, type[StockadeError]]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.PERMISSION_DENIED: NotPermitted,
    grpc.StatusCode.UNAUTHENTICATED: NotPermitted,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgument,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


def from_rpc(error: grpc.RpcError, target: str) -> StockadeError:
    """The exception for a failed RPC. May try the socket once more, to say why nobody answers."""
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    reason, remedy, facts = _details(error)
    if code is grpc.StatusCode.UNAVAILABLE and not reason:
        return _diagnose(target, message)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Failed("the daemon did not answer in time", remedy="try again, or look at its log", reason="DEADLINE")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return Failed(f"this daemon does not know the call: {message}", remedy="bring daemon and client to one version")
    return _KINDS.get(code, Failed)(message, remedy=remedy, reason=reason, facts=facts)


def _details(error: grpc.RpcError) -> tuple[str, str, dict[str, str]]:
    """(reason, remedy, facts) out of the google.rpc.Status trailer; empty where there is none."""
    metadata: Any = error.trailing_metadata()  # typed wrongly in the stubs
    trailer = {key: value for key, value in metadata or () if key == DETAILS_KEY}
    if not trailer:
        return "", "", {}
    # Imported here: only a failure has use for them.
    from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # noqa: PLC0415

    reason, remedy, facts = "", "", {}
    for packed in status_pb2.Status.FromString(trailer[DETAILS_KEY]).details:
        info, text = error_details_pb2.ErrorInfo(), error_details_pb2.LocalizedMessage()
        if packed.Unpack(info) and info.domain == DOMAIN:
            reason, facts = info.reason, dict(info.metadata)
        elif packed.Unpack(text):
            remedy = text.message
    return reason, remedy, facts


def _diagnose(target: str, message: str) -> StockadeError:
    """Why nobody answers at `target`. gRPC says UNAVAILABLE for a missing daemon and for a closed door alike."""
    if not target.startswith("unix:"):
        return Unreachable(f"no daemon answers at {target}: {message}", remedy="check the address and that it runs")
    path = target.removeprefix("unix:").removeprefix("//")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(GREETING_SECONDS_MAX)
        try:
            probe.connect(path)
            greeting = probe.recv(1)
        except PermissionError:
            greeting = b""
        except TimeoutError:
            return Unreachable(f"{path} accepts but says nothing", remedy="look at the log of stockaded")
        except OSError as error:
            return Unreachable(
                f"no daemon answers at {path}: {error.strerror}",
                remedy="start stockaded, or name another socket with --socket or STOCKADE_SOCKET",
            )
    if greeting:
        return Unreachable(f"the connection to {path} was lost: {message}", remedy="try again")
    return NotPermitted(
        f"the daemon at {path} does not serve this user",
        remedy="run as root, or have your user or group given a role in stockade.toml",
        reason="NO_ROLE",
    )
