"""The values of the action log: what is recorded, what comes back, what can go wrong (pure)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, TypeAlias

from supervisord.errors import CannotRecord, ErrorCode, StockadeError

__all__ = [
    "ENTRY_BYTES_MAX",
    "FIELD_BYTES_MAX",
    "JSON",
    "Action",
    "BadNote",
    "CannotOpenLog",
    "CannotReadLog",
    "CannotRecord",
    "DamagedLog",
    "Durability",
    "Entry",
    "Proof",
    "Report",
]

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Durability: TypeAlias = Literal["batched", "strict"]

# Bounds of what one entry may hold: part of what comes here was chosen by an agent.
FIELD_BYTES_MAX = 4096
ENTRY_BYTES_MAX = 32 * 1024


@dataclass(frozen=True, slots=True)
class Action:
    """Something an agent or an operator did or tried.

    Strings may come from an agent: each is cut at FIELD_BYTES_MAX with a mark, and bytes that are not UTF-8
    (as surrogate escapes) are kept. Never a prompt, a token or a header value: digests of them.
    """

    agent_id: str  # "" when no agent is meant
    actor: str  # "uid:0(root)", "agent:<id>", "daemon", "cn:<name>"
    verb: str  # "agent.launch", "egress.request", ...
    object: str
    verdict: str  # "allowed", "denied", "done", "failed", "notice"
    reason: str = ""
    details: Mapping[str, JSON] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Entry:
    """One recorded action. `seq` counts from 1; its leaf in the RFC 6962 tree has index `seq - 1`."""

    seq: int
    time_ns: int  # Unix time
    action: Action  # as it was recorded, that is: with strings cut where they were too long
    leaf_hash: bytes


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found. `problem` is "" when ok, else it names file, offset and entry."""

    ok: bool
    size: int  # entries that were found good, counted from the start
    root: str  # base64 of the tree's root at `size`
    problem: str
    sealed: int = 0  # entries that a signed checkpoint covers
    origin: str = ""
    first_seq: int = 1  # the oldest entry that is there: those before it were retired
    redacted: int = 0  # entries whose content a recorded `log.redact` took away


@dataclass(frozen=True, slots=True)
class Proof:
    """An inclusion proof (RFC 6962 section 2.1.1) of entry `seq` in the tree of `size` entries."""

    seq: int
    size: int
    entry: bytes  # its canonical bytes, which `leaf_hash` is over
    leaf_hash: bytes
    root: bytes
    path: tuple[bytes, ...]
    checkpoint: str = ""  # a signed one of this size and root, where the caller named no size


class CannotOpenLog(StockadeError):  # noqa: N818 - read at the raise, as in supervisord.errors
    """The directory cannot be taken as a log: damaged, in use, or another key's."""


class DamagedLog(CannotOpenLog):
    """The directory holds what no crash explains: it is evidence, and nobody may write on in it."""


class CannotReadLog(StockadeError):  # noqa: N818 - as CannotOpenLog
    """An entry that the log should hold cannot be read back."""


class BadNote(StockadeError):  # noqa: N818 - as CannotOpenLog
    """A signed note, checkpoint, key or receipt is malformed, or its signature is wrong."""

    code: ClassVar[ErrorCode] = ErrorCode.INVALID_INPUT
