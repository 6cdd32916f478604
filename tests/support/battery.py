"""Many attempts in one sandbox: the probes of tests/adversarial/probes as one program, and what came of each.

The program goes in as text on a command line, so that the same attempts run where there is nothing else to bring them
in: in a sandbox of a private launcher, by exec into one that runs, under every shipped policy, and in another kernel.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import secrets
import socket
import zlib
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tests.adversarial.probes import calls, files, identity, inside, network, sockets
from tests.support.attempt import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from tests.adversarial.probes.inside import Probe

PROBES: Final = inside.PROBES
_MODULES: Final = (inside, calls, sockets, network, files, identity)

# Root of the host in namespaces of its own, with nothing covered; addresses and services are put there by the program.
OPEN: Final[dict[str, Any]] = ROOT | {
    "weaken": (*ROOT["weaken"], "hidden_proc", "devices", "read_only_root", "mount_flags", "rlimits")
}
# With the ids, processes, network and IPC of the host: only for probes that look and touch nothing.
SHARED: Final[dict[str, Any]] = ROOT | {
    "weaken": (*ROOT["weaken"], "hidden_proc", "network", "private_ipc", "private_pid")
}


@dataclass(frozen=True, slots=True)
class Result:
    outcome: str  # reached, refused or broken
    detail: str
    seconds: float = 0.0


def program(given: Mapping[str, Any], names: Iterable[str] | None = None) -> list[str]:
    """Give the command that makes the attempts."""
    sources = {module.__name__: Path(str(module.__file__)).read_text() for module in _MODULES}
    text = (
        "import sys, types\n"
        "for name in ('tests', 'tests.adversarial', 'tests.adversarial.probes'):\n"
        "    sys.modules[name] = types.ModuleType(name); sys.modules[name].__path__ = []\n"
        f"for name, source in {sources!r}.items():\n"
        "    module = sys.modules[name] = types.ModuleType(name)\n"
        "    exec(compile(source, name, 'exec'), module.__dict__)\n"
        f"sys.modules[{inside.__name__!r}].main({dict(given)!r}, {None if names is None else list(names)!r})\n"
    )
    packed = base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    return ["/usr/bin/python3", "-I", "-c", f"import base64,zlib;exec(zlib.decompress(base64.b64decode('{packed}')))"]


def results(output: str) -> dict[str, Result]:
    """Read what the program wrote."""
    found = {}
    for line in output.splitlines():
        if line.startswith('{"probe"'):
            item = json.loads(line)
            found[item["probe"]] = Result(item["outcome"], item["detail"], item["seconds"])
    return found


def twins(kind: str) -> list[str]:
    return [item.name for item in PROBES.values() if item.twin == kind and not item.untwinned]


def expected(item: Probe, twin: Result | None) -> str:
    """Say how it went for a twin: "found", "absent" where this kernel has no such thing, or what is wrong."""
    if twin is None:
        return "untwinned" if item.untwinned else "did not run"
    if twin.outcome == "reached":
        return "found"
    if twin.outcome == "refused" and (twin.detail in item.absent or _lacks(item.capability)):
        return "absent"
    return f"not found: {twin.outcome} {twin.detail}"


def _lacks(capability: int) -> bool:
    """Whether root of this host is without a capability, as in some virtual machines."""
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff"))
    return capability >= 0 and not int(held.split()[1], 16) >> capability & 1


# --- things of the host that are to be found, or not ---


@contextmanager
def bait() -> Iterator[dict[str, Any]]:
    """Make objects of every kind on the host, harmless ones; gives what the probes must know of them."""
    token = secrets.token_hex(6)
    libc = ctypes.CDLL(None, use_errno=True)
    key = secrets.randbelow(1 << 30) + 1
    with ExitStack() as undo:
        server = undo.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = undo.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0sktest-{token}")
        abstract.listen(16)
        segment = libc.shmget(key, 4096, 0o1000 | 0o600)
        undo.callback(libc.shmctl, segment, 0, None)
        messages = libc.msgget(key, 0o1000 | 0o600)
        undo.callback(libc.msgctl, messages, 0, None)
        semaphores = libc.semget(key, 1, 0o1000 | 0o600)
        undo.callback(libc.semctl, semaphores, 0, 0)
        small = (ctypes.c_long * 8)(0, 1, 8, 0)  # RLIMIT_MSGQUEUE may be tight
        queue = libc.mq_open(f"/sktest-{token}".encode(), os.O_RDWR | os.O_CREAT, 0o600, small)
        assert min(segment, messages, semaphores, queue) >= 0, os.strerror(ctypes.get_errno())
        undo.callback(libc.mq_unlink, f"/sktest-{token}".encode())
        undo.callback(os.close, queue)
        kinds = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
        yield {
            "open": False,
            "port": server.getsockname()[1],
            "abstract": f"sktest-{token}",
            "key": key,
            "queue": f"sktest-{token}",
            "pid": os.getpid(),
            "hostname": os.uname().nodename,
            "namespaces": {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in kinds},  # noqa: PTH115 - no path
        }
