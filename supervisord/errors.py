"""Every error that Stockade raises on purpose: what could not be done, why, and what to do next."""

from enum import Enum
from typing import ClassVar


class ErrorCode(Enum):
    """The kind of an error; the RPC layer maps each to one gRPC status in one table."""

    NOT_FOUND = "not_found"
    PERMISSION_DENIED = "permission_denied"
    CONFLICT = "conflict"
    HELD = "held"
    INVALID_INPUT = "invalid_input"
    EXHAUSTED = "exhausted"
    UNAVAILABLE = "unavailable"
    CANNOT_LAUNCH = "cannot_launch"
    CANNOT_RECORD = "cannot_record"
    INTERNAL = "internal"


class StockadeError(Exception):
    """An error whose message reads "cannot VERB OBJECT: cause" and whose remedy says what to do next."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}; {self.remedy}" if self.remedy else self.message


class NotFound(StockadeError):  # noqa: N818 - read at the raise: `raise NotFound(...)`; the base carries the suffix
    code = ErrorCode.NOT_FOUND


class PermissionDenied(StockadeError):  # noqa: N818 - as NotFound
    code = ErrorCode.PERMISSION_DENIED


class Conflict(StockadeError):  # noqa: N818 - as NotFound
    """The thing exists, but not in a state where this can be done."""

    code = ErrorCode.CONFLICT


class Held(StockadeError):  # noqa: N818 - as NotFound
    """A hold forbids it until a different person releases it."""

    code = ErrorCode.HELD


class InvalidInput(StockadeError):  # noqa: N818 - as NotFound
    code = ErrorCode.INVALID_INPUT


class Exhausted(StockadeError):  # noqa: N818 - as NotFound
    """A limit, a budget or a number of uses is used up."""

    code = ErrorCode.EXHAUSTED


class Unavailable(StockadeError):  # noqa: N818 - as NotFound
    """A part of Stockade does not answer; the same call may work later."""

    code = ErrorCode.UNAVAILABLE


class CannotLaunch(StockadeError):  # noqa: N818 - as NotFound
    """A step of a launch failed and everything before it was undone.

    `step` names the step of the plan ("bind workspace"), `errno` is the kernel's answer or 0.
    """

    code = ErrorCode.CANNOT_LAUNCH

    def __init__(self, message: str, *, remedy: str = "", step: str = "", errno: int = 0) -> None:
        super().__init__(message, remedy=remedy)
        self.step = step
        self.errno = errno


class CannotRecord(StockadeError):  # noqa: N818 - as NotFound
    """The action log did not take the entry, so the act must not happen."""

    code = ErrorCode.CANNOT_RECORD


class CannotRevoke(StockadeError):  # noqa: N818 - as NotFound
    """A grant of files could not be proven to be gone: it is still there, and its agent is frozen."""
