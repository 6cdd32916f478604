"""Homes that outlive their agents: whose each is (`<state_dir>/scratch/homes/NAME.json`, beside the image)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from supervisord.callers import Role
from supervisord.errors import PermissionDenied, Unavailable

if TYPE_CHECKING:
    from pathlib import Path

    from supervisord.callers import Caller
    from supervisord.ids import AgentName

RECORD_BYTES_MAX: Final = 4096


class Homes:
    """A name's home belongs to whoever launched it first: anybody else would read what is in it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def claim(self, name: AgentName, caller: Caller) -> None:
        """Make the home of this name the caller's, or find that it is; raises PermissionDenied, Unavailable."""
        path = self._directory / f"{name}.json"
        try:
            try:
                with path.open("x") as file:
                    json.dump({"owner": caller.actor}, file)
            except FileExistsError:
                with path.open("rb") as file:
                    owner = str(json.loads(file.read(RECORD_BYTES_MAX))["owner"])
            else:
                return
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Unavailable(
                f"cannot use the home of {name}: {error}", remedy=f"see {path}; an admin may remove it"
            ) from error
        if owner != caller.actor and caller.role is not Role.ADMIN:
            raise PermissionDenied(
                f"cannot use the home of {name}: it belongs to {owner}", remedy="choose another name for the agent"
            )
