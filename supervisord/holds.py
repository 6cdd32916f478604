"""Holds: durable orders that a name, label, policy or root file system must not run until somebody else says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from supervisord.errors import Held, NotFound, PermissionDenied
from supervisord.ids import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


Kind: TypeAlias = Literal["name", "label", "policy", "rootfs_digest"]


@dataclass(frozen=True, slots=True)
class Hold:
    """One order. `subject` is a name, `key=value`, a policy's name or an image's digest, by `kind`."""

    hold_id: str
    kind: Kind
    subject: str
    reason: str
    held_by: str
    held_at_ns: int
    ticket: str = ""


class Holds:
    """The holds in force; who keeps them on disk puts them back at start."""

    def __init__(self, holds: Iterable[Hold] = ()) -> None:
        self._holds = {hold.hold_id: hold for hold in holds}

    def all(self) -> list[Hold]:
        return list(self._holds.values())

    def add(self, hold: Hold) -> None:
        self._holds[hold.hold_id] = hold

    def get(self, hold_id: str) -> Hold:
        hold = self._holds.get(hold_id)
        if hold is None:
            raise NotFound(f"cannot find hold {shown(hold_id)}: there is none", remedy="see `stockadectl holds`")
        return hold

    def releasable(self, hold_id: str, *, actor: str) -> Hold:
        """The hold, if this actor may release it: whoever made it may not (DESIGN section 6)."""
        hold = self.get(hold_id)
        if hold.held_by == actor:
            raise PermissionDenied(
                f"cannot release {hold_id}: you made it, and a different person has to release it",
                remedy="ask another operator",
            )
        return hold

    def remove(self, hold_id: str) -> None:
        self._holds.pop(hold_id, None)

    def check(self, *, name: str, labels: Mapping[str, str], policy: str, rootfs_digest: str = "") -> None:
        """Raises Held where any hold means such an agent."""
        for hold in self._holds.values():
            subjects = {
                "name": {name},
                "policy": {policy},
                "label": {f"{key}={value}" for key, value in labels.items()},
                "rootfs_digest": {rootfs_digest},
            }
            if hold.subject in subjects[hold.kind]:
                raise Held(
                    f"cannot launch {name}: {hold.kind} {hold.subject} is on hold by {hold.held_by}"
                    + (f": {hold.reason}" if hold.reason else "")
                    + (f" ({hold.ticket})" if hold.ticket else ""),
                    remedy=f"somebody else than {hold.held_by} can `stockadectl release {hold.hold_id}`",
                )
