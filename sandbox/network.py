"""Networks seen after the fact: what is in an agent's namespace, what a crash could have left. The cold path, pyroute2.

What can be left: nothing with a name. Namespaces of agents and gates are held by descriptors and by the processes and
sockets in them; both ends of each veth are born inside them and die with them. So they outlive a killed launcher only
while an agent lives (`sandbox.cgroups.reconcile` ends those nobody knows) or while an egress worker holds the listener
(the daemon ends left-over workers at its start). What `reconcile` removes is what people make by hand when they look
into a sandbox: a namespace named by `ip netns attach stockade-INSTANCE-AGENT`, a veth moved out of its gate.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyroute2 import IPRoute, netns  # type: ignore[import-untyped]  # ships no types

from sandbox.netpool import alias
from sandbox.syscalls import CLONE_NEWNET, setns

if TYPE_CHECKING:
    from collections.abc import Collection

NETNS_DIRECTORY: Final = Path("/run/netns")
_INSPECT_SECONDS_MAX: Final = 10
_MAIN_TABLE: Final = 254


class CannotInspect(RuntimeError):  # noqa: N818 - reads as what happened
    """A network namespace could not be looked into."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the kernel says is in a network namespace; `routes` are those of the main table."""

    interfaces: tuple[str, ...]
    addresses: tuple[str, ...]
    routes: tuple[str, ...]
    neighbours: tuple[str, ...]


def inspect(namespace: int) -> Inspection:
    """Look into the namespace behind a descriptor; raises `CannotInspect`.

    In a thread of its own, which enters the namespace and ends there: the caller never leaves its own.
    """
    answer: list[Inspection] = []
    failure: list[BaseException] = []

    def look() -> None:
        try:
            setns(namespace, CLONE_NEWNET)
            answer.append(_read())
        except BaseException as error:  # noqa: BLE001 - handed to the caller, whose thread this is not
            failure.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(_INSPECT_SECONDS_MAX)
    if answer:
        return answer[0]
    cause = failure[0] if failure else TimeoutError(f"no answer within {_INSPECT_SECONDS_MAX} s")
    raise CannotInspect(f"cannot look into network namespace {namespace}: {cause}") from cause


def _read() -> Inspection:
    with IPRoute() as route:
        names = {link["index"]: link.get("ifname") for link in route.get_links()}
        return Inspection(
            interfaces=tuple(sorted(str(name) for name in names.values())),
            addresses=tuple(
                sorted(
                    f"{item.get('address')}/{item['prefixlen']} dev {names[item['index']]}" for item in route.get_addr()
                )
            ),
            routes=tuple(
                f"{item.get('dst', 'default')} dev {names.get(item.get('oif'), '?')}"
                + (f" via {gateway}" if (gateway := item.get("gateway")) else "")
                for item in route.get_routes(table=_MAIN_TABLE)
            ),
            neighbours=tuple(
                f"{item.get('dst')} dev {names[item['ifindex']]} lladdr {item.get('lladdr')}"
                for item in route.get_neighbours()
            ),
        )


def reconcile(instance: str, live_ids: Collection[str]) -> tuple[str, ...]:
    """Remove what was named by hand for agents of this instance that are gone; says what it removed.

    Only exact names of this instance: a veth whose alias is ours in the caller's namespace, and
    `/run/netns/stockade-INSTANCE-AGENT` where AGENT is not in `live_ids`.
    """
    removed = []
    with IPRoute() as route:
        for link in route.get_links():
            info = link.get("linkinfo")
            kind = info.get("kind") if info is not None else None
            if kind == "veth" and link.get("ifalias") == alias(instance):
                route.link("del", index=link["index"])
                removed.append(f"veth {link.get('ifname')}")
    prefix = f"{alias(instance)}-"
    names = sorted(path.name for path in NETNS_DIRECTORY.iterdir()) if NETNS_DIRECTORY.is_dir() else []
    for name in names:
        agent_id = name.removeprefix(prefix)
        if name.startswith(prefix) and agent_id.startswith("ag_") and agent_id not in live_ids:
            netns.remove(name)
            removed.append(f"network namespace {name}")
    return tuple(removed)
