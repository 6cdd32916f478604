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
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

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
    needs: str = ""  # what the default sandbox must have for this: "nftables", "compat" (32-bit calls)
    capability: int = -1  # that root of the host must have for the twin to find it
    apart: str = "never"  # "always", or "open": it needs a process of its own, where it succeeds or in any case


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


def fresh(kind: str) -> str:
    """Give a path in /tmp that nobody had yet."""
    _paths.append(kind)
    return f"/tmp/{kind}-{os.getpid()}-{len(_paths)}"


_paths: list[str] = []


RESOURCE: Final = 24  # CAP_SYS_RESOURCE
NICE: Final = 23


def opens(path: str, flags: int) -> str:
    """Open and close a file; gives why it does not open."""
    return refused(lambda: os.close(os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)))


# --- the loop ---


def _attempt(item: Probe) -> dict[str, str | float]:
    began = time.monotonic()
    try:
        outcome, detail = "refused", str(item.run())
    except Reached as how:
        outcome, detail = "reached", str(how)
    except BaseException as error:  # noqa: BLE001 - a probe that breaks has tried nothing
        outcome, detail = "broken", f"{type(error).__name__}: {error}"
    seconds = round(time.monotonic() - began, 3)
    return {"probe": item.name, "outcome": outcome, "detail": detail[:1000], "seconds": seconds}


def _together(items: Sequence[Probe]) -> Iterator[dict[str, str | float]]:
    """Make these attempts in one child; when one of them ends it, the rest are made in another."""
    while items:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read)
            if facts["open"]:
                _libc.unshare(0x20000)  # what it mounts or takes away, only it sees
            for item in items:
                signal.alarm(SECONDS_MAX)
                os.write(write, json.dumps(_attempt(item)).encode() + b"\n")
            os._exit(0)
        os.close(write)
        answer, done, late = b"", 0, False
        # Not to end-of-file: what a probe started may hold the other end.
        while done < len(items) and not late:
            late = not select.select([read], [], [], SECONDS_MAX + 5)[0]
            part = b"" if late else os.read(read, 65536)
            if not part:
                break
            *lines, answer = (answer + part).split(b"\n")
            for line in lines:
                yield json.loads(line)
            done += len(lines)
        os.close(read)
        if late:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if done < len(items):
            yield {"probe": items[done].name, "seconds": 0.0, **_ended(status, late=late)}
        items = items[done + 1 :]


def _ended(status: int, *, late: bool) -> dict[str, str]:
    """Say what it means that a child ended without a word: a signal for the attempt is a refusal."""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGALRM and not late:
        return {"outcome": "refused", "detail": f"signal {os.WTERMSIG(status)}"}
    return {"outcome": "broken", "detail": f"no answer, status {status}"}


def _groups(items: Iterable[Probe]) -> Iterator[list[Probe]]:
    """Put together what leaves the process as it was; where everything succeeds, that is less."""
    together: list[Probe] = []
    for item in items:
        if item.apart == "always" or (item.apart == "open" and facts["open"]):
            yield [item]
        else:
            together.append(item)
    yield together


def main(given: Mapping[str, Any], names: Iterable[str] | None = None) -> None:
    """Make all attempts, or these; writes a line for each."""
    facts.update(given)
    for prepare in PREPARATIONS:
        prepare()
    for items in _groups([PROBES[name] for name in names] if names is not None else PROBES.values()):
        for said in _together(items):
            sys.stdout.write(json.dumps(said) + "\n")
            sys.stdout.flush()
    os._exit(0)


# What an open sandbox needs so that there is something to find.
PREPARATIONS: Final[list[Callable[[], None]]] = []
