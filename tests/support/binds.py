"""Files of the host, shown to a sandbox that runs and taken away, the way the daemon does it."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox.plan import Bind
from supervisord.hostfiles import open_path

if TYPE_CHECKING:
    from tests.support.inside import Inside

OWNER = 1000
DENIED = {"EPERM", "EACCES"}


@dataclass
class Shared:
    """A directory on the host that belongs to somebody."""

    path: Path

    def add(self, name: str, text: str, mode: int = 0o644) -> Path:
        file = self.path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        for each in (file, file.parent):
            os.chown(each, OWNER, OWNER)
        file.chmod(mode)
        return file


def show(inside: Inside, path: Path, target: str, **bind: Any) -> dict[str, Any]:
    """Show a host path the way the daemon does; refuses what it refuses."""
    fd = open_path(path)  # type: ignore[arg-type]  # a pure path is enough
    try:
        wanted = Bind(0, target, writable=bind.pop("writable", False), owner_uid=OWNER, owner_gid=OWNER)
        order = dataclasses.asdict(dataclasses.replace(wanted, **bind))
        return inside.launcher.request("show", [fd], agent_id=inside.agent.agent_id, bind=order)
    finally:
        os.close(fd)


def take(inside: Inside, target: str) -> dict[str, Any]:
    return inside.launcher.request("take", agent_id=inside.agent.agent_id, target=target)


def mounts(inside: Inside) -> list[str]:
    """Mount points of the agent, as the host sees them."""
    lines = Path(f"/proc/{inside.agent.pid}/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines]
