"""What is bound into an agent, as the launcher keeps it: enough to take each bind away, also after a restart."""

# ruff: noqa: PTH104, PTH123 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

import dataclasses
import errno
import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sandbox.running import Agent

GRANTS: Final = "/grants"
GRANT: Final = "fs:"  # how the name of a bind begins that is a grant, and not the workspace
# Directories of the sandbox itself: never removed, whatever was bound there.
STANDARD: Final = frozenset({"/workspace", "/home", "/home/agent", "/tmp", "/run", "/var", "/grants"})  # noqa: S108 - inside


@dataclass(slots=True, eq=False)
class Mounted:
    """A bind that an agent has.

    `place` is where the mount is, `target` where the agent was told: a link where they differ. `made` stands in the
    root file system for it, outermost first. `fd` is the mount itself, -1 after a restart.
    """

    target: str
    place: str
    name: str
    writable: bool
    mount_id: int
    made: tuple[str, ...] = ()
    fd: int = -1

    @property
    def linked(self) -> bool:
        """Whether a link of ours leads from the target to the place; from /var/tmp one of the sandbox's does."""
        return self.place == GRANTS + self.target

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "fd"}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Mounted":
        return cls(**(value | {"made": tuple(value["made"])}))


def mount_id(fd: int, fdinfo: str = "/proc/self/fdinfo") -> int:
    """Return the id of the mount that a descriptor is on; no other mount has it while that one is there (proc(5))."""
    with open(f"{fdinfo}/{fd}", "rb") as file:
        return field_of(file.read(4096), b"mnt_id:", 10)


def field_of(text: bytes, name: bytes, base: int) -> int:
    for line in text.splitlines():
        if line.startswith(name):
            return int(line.split()[1], base)
    raise OSError(errno.ENODATA, f"no {name.decode()} in fdinfo")


def launched(agent: "Agent", trees: list[int]) -> None:
    """Take note of the binds of the launch that are grants: their mounts are these descriptors, duplicated."""
    for bind, tree in zip(agent.plan.binds, trees, strict=True):
        if not bind.name.startswith(GRANT):
            continue
        made = () if bind.target in STANDARD else (bind.target,)
        agent.mounted[bind.target] = Mounted(
            bind.target, bind.target, bind.name, bind.writable, mount_id(tree), made, fd=os.dup(tree)
        )


def listed(agent: "Agent") -> list[dict[str, Any]]:
    """Return what is bound now, for people and for a daemon that compares."""
    return [
        {"target": m.target, "place": m.place, "name": m.name, "writable": m.writable} for m in agent.mounted.values()
    ]


def drop(agent: "Agent", mounted: Mounted) -> None:
    if agent.mounted.get(mounted.target) is mounted:
        del agent.mounted[mounted.target]
    if mounted.fd >= 0:
        os.close(mounted.fd)
        mounted.fd = -1


def save(agent: "Agent") -> None:
    """Leave what a later launcher needs to take these away."""
    path = f"{agent.directory}/binds.json"
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        json.dump({"mounted": [m.to_json() for m in agent.mounted.values()], "stubs": agent.stubs}, file)
    os.rename(f"{path}.new", path)


def restore(agent: "Agent") -> None:
    """Read it; the mounts are looked up, and known by their ids, when they are taken away."""
    try:
        with open(f"{agent.directory}/binds.json", encoding="utf-8") as file:
            kept = json.load(file)
    except FileNotFoundError:
        return
    agent.stubs = tuple(kept["stubs"])
    agent.mounted = {item["target"]: Mounted.from_json(item) for item in kept["mounted"]}


def forget(agent: "Agent") -> None:
    """Close what the agent's end makes useless: its mounts go with its namespace."""
    for mounted in list(agent.mounted.values()):
        drop(agent, mounted)
