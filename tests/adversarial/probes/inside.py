"""What the probes have in common: how each says how far it came, and the loop that makes them all, one child each.

This runs inside a sandbox, under the sandbox's own Python, as text that came on the command line. A probe returns when
it was stopped, with why; it raises `Reached` when it came past the border that should have stopped it. Probes are
harmless where the border fails: pointers that fault, descriptors that are none, files opened and never written.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

BAD: Final = 1  # an address that faults
SECONDS_MAX: Final = 20
# What the seccomp filter answers; any other errno means that the kernel looked at the arguments.
FILTERED: Final = ("EPERM", "ENOSYS")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# What a probe may know of the host and of where it runs; set by the loop.
facts: dict[str, Any] = {"open": False}


class Reached(Exception):  # noqa: N818 - reads as what happened
    """The border was passed; the text says where to."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One attempt.

    `twin` is the weakened sandbox in which it must be found: "open" (root of the host in namespaces of its own, nothing
    covered) or "shared" (ids, network and IPC of the host). `absent` are the answers that say that this kernel or host
    has no such thing: there it cannot be found. With `untwinned`, no plan leaves the control out; the text says why.
    """

    name: str
    run: Callable[[], str]
    twin: str = "open"
    absent: frozenset[str] = frozenset()
    untwinned: str = ""
    needs: str = ""  # what the default sandbox must have for this: "nftables"
    capability: int = -1  # that root of the host must have for the twin to find it


PROBES: Final[dict[str, Probe]] = {}


def add(name: str, run: Callable[[], str], *, absent: Iterable[str] = (), capability: int = -1, **fields: str) -> None:
    if name in PROBES:
        raise ValueError(f"two probes are called {name}")
    PROBES[name] = Probe(name, run, absent=frozenset(absent), capability=capability, **fields)


def probe(
    name: str, *, absent: Iterable[str] = (), capability: int = -1, **fields: str
) -> Callable[[Callable[[], str]], Callable[[], str]]:
    def register(run: Callable[[], str]) -> Callable[[], str]:
        add(name, run, absent=absent, capability=capability, **fields)
        return run

    return register


# --- for probes ---


def name_of(number: int) -> str:
    return errno.errorcode.get(number, str(number))


def call(number: int, *arguments: int) -> tuple[int, str]:
    """Make a system call; gives its result and the name of its error."""
    ctypes.set_errno(0)
    words = [ctypes.c_ulong(value % 2**64) for value in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    return result, name_of(ctypes.get_errno()) if result < 0 else ""


def judge(answer: tuple[int, str], by: Iterable[str] = FILTERED) -> str:
    """Give why a call was stopped; raises `Reached` where it was not, or not by one of these."""
    result, error = answer
    if result >= 0 or error not in by:
        raise Reached(error or result)
    return error


def judged(by: Iterable[str], number: int, *arguments: int) -> str:
    """Make a call and give why it was stopped, as `judge`."""
    return judge(call(number, *arguments), by)


def text(value: str | bytes) -> int:
    """Give the address of a string that stays."""
    buffer = ctypes.create_string_buffer(value if isinstance(value, bytes) else value.encode())
    _kept.append(buffer)
    return ctypes.addressof(buffer)


_kept: list[Any] = []


def refused(act: Callable[[], object], by: Iterable[str] = ()) -> str:
    """Give the error that stopped an act; raises `Reached` where there was none, or (with `by`) another."""
    try:
        result = act()
    except OSError as error:
        name = name_of(error.errno) if error.errno is not None else type(error).__name__
        if by and name not in by:
            raise Reached(name) from None
        return name
    raise Reached(result)


RESOURCE: Final = 24  # CAP_SYS_RESOURCE
NICE: Final = 23


def opens(path: str, flags: int) -> str:
    """Open and close a file; gives why it does not open."""
    return refused(lambda: os.close(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)))


# --- the loop ---


def _one(item: Probe) -> dict[str, str]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        signal.alarm(SECONDS_MAX)
        if facts["open"]:
            _libc.unshare(0x20000)  # what it mounts or takes away, only it sees
        try:
            said = {"outcome": "refused", "detail": str(item.run())}
        except Reached as how:
            said = {"outcome": "reached", "detail": str(how)}
        except BaseException as error:  # noqa: BLE001 - a probe that breaks has tried nothing
            said = {"outcome": "broken", "detail": f"{type(error).__name__}: {error}"}
        os.write(write, json.dumps(said).encode()[:4000])
        os._exit(0)
    os.close(write)
    answer = b""
    # Not to end-of-file: what a probe started may hold the other end.
    while select.select([read], [], [], SECONDS_MAX + 5)[0]:
        part = os.read(read, 65536)
        answer += part
        if not part or answer.endswith(b"}"):
            break
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if answer:
        return dict(json.loads(answer))
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGALRM:
        return {"outcome": "refused", "detail": f"signal {os.WTERMSIG(status)}"}
    return {"outcome": "broken", "detail": f"no answer, status {status}"}


def main(given: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Make all attempts, or these; writes a line for each."""
    facts.update(given)
    for prepare in PREPARATIONS:
        prepare()
    for item in [PROBES[name] for name in names] if names is not None else PROBES.values():
        began = time.monotonic()
        said = _one(item)
        line = {"probe": item.name, **said, "seconds": round(time.monotonic() - began, 3)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    os._exit(0)


# What an open sandbox needs so that there is something to find.
PREPARATIONS: Final[list[Callable[[], None]]] = []
