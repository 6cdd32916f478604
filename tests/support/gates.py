"""A packet capture in the gate of every agent that tests launch: what reaches it is for the proxy's port, or is shown.

A thread looks ten times a second which gates a launcher holds, and has the kernel sort out in each what may come there;
so it costs next to nothing, and what an agent sends in the first tenth of a second of a gate made for it on the spot
may go unseen. Gates are mostly made ahead.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, TextIO

from sandbox import doctor
from sandbox.netpool import AGENT_ADDRESS, GATE_ADDRESS, GATE_INTERFACE
from sandbox.syscalls import CLONE_NEWNET, setns
from sandbox.transparent import NAMES_NETWORK, NAMES_PORT

if TYPE_CHECKING:
    from collections.abc import Callable

EVERY_SECONDS: Final = 0.1
FRAMES_MAX: Final = 20
FRAME_BYTES: Final = 256
SHOWN_BYTES: Final = 64
PROXY_PORT: Final = 3128
_ETH_P_ALL: Final = 3
_SIOCGIFINDEX: Final = 0x8933
_SO_ATTACH_FILTER: Final = 26


def _program() -> bytes:
    """Shows the capture what is neither sent by the gate nor TCP from the agent to the proxy (classic BPF, bpf(4))."""
    agent, gate = (int.from_bytes(socket.inet_aton(address), "big") for address in (AGENT_ADDRESS, GATE_ADDRESS))
    word, half, byte, equal, answer = 0x20, 0x28, 0x30, 0x15, 0x06
    kind = 0xFFFFF004  # SKF_AD_PKTTYPE; PACKET_OUTGOING is 4
    # Jumps count from the next step; 14 shows the frame, 15 hides it.
    steps = [
        (word, 0, 0, kind), (equal, 13, 0, 4),
        (half, 0, 0, 12), (equal, 0, 10, 0x0800),
        (byte, 0, 0, 14), (equal, 0, 8, 0x45),
        (byte, 0, 0, 23), (equal, 0, 6, socket.IPPROTO_TCP),
        (word, 0, 0, 26), (equal, 0, 4, agent),
        (word, 0, 0, 30), (equal, 0, 2, gate),
        (half, 0, 0, 36), (equal, 1, 0, PROXY_PORT),
        (answer, 0, 0, FRAME_BYTES), (answer, 0, 0, 0),
    ]  # fmt: skip
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


PROGRAM: Final = _program()


@dataclass(slots=True)
class Gate:
    """One gate that is looked into."""

    capture: socket.socket
    routes: TextIO
    """Its /proc/net/fib_trie: a gate is made transparent after it was made."""

    def read(self) -> list[str]:
        """Gives the first bytes of what has come and should not have, of FRAMES_MAX frames at most."""
        found: list[str] = []
        while len(found) < FRAMES_MAX:
            try:
                frame = self.capture.recv(FRAME_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENETDOWN:  # told once, of a link that went down; frames may be left
                    raise
            else:
                if not (expected(frame) and self.transparent()):
                    found.append(frame[:SHOWN_BYTES].hex())
        return found

    def transparent(self) -> bool:
        self.routes.seek(0)
        return NAMES_NETWORK in self.routes.read()

    def close(self) -> None:
        self.capture.close()
        self.routes.close()

    def stands(self) -> bool:
        """Whether the agent's end of the link is still there; without it nothing comes any more."""
        try:
            fcntl.ioctl(self.capture, _SIOCGIFINDEX, struct.pack("16s16x", GATE_INTERFACE.encode()))
        except OSError:
            return False
        return True


def expected(frame: bytes) -> bool:
    """Tells whether a transparent gate is there for this frame: a look-up, or TCP to an address that one told."""
    if frame[12:15] != b"\x08\x00\x45" or frame[26:30] != socket.inet_aton(AGENT_ADDRESS):
        return False
    to, port = frame[30:34], int.from_bytes(frame[36:38], "big")
    if to == socket.inet_aton(GATE_ADDRESS):
        return port == NAMES_PORT and frame[23] in (socket.IPPROTO_UDP, socket.IPPROTO_TCP)
    return to[:2] == socket.inet_aton(NAMES_NETWORK)[:2] and frame[23] == socket.IPPROTO_TCP


def _capture() -> socket.socket:
    """A capture in the gate that this thread is in; it hears nothing before it has its filter."""
    capture = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        program = ctypes.create_string_buffer(PROGRAM, len(PROGRAM))
        filters = struct.pack("HL", len(PROGRAM) // 8, ctypes.addressof(program))
        capture.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filters)
        capture.bind((GATE_INTERFACE, _ETH_P_ALL))
        capture.setblocking(False)
    except BaseException:
        capture.close()
        raise
    return capture


class Gates:
    """All gates of one launcher, from `start` to `close`."""

    def __init__(self, launcher: Callable[[], int]) -> None:
        """`launcher` gives its pid, 0 where there is none now."""
        self._launcher = launcher
        self._pid = 0
        self._gates: dict[str, Gate] = {}
        self._known: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="gates", daemon=True)
        self.seen = 0
        self._found: list[str] = []
        self.failure: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop; raises AssertionError where a gate met what it is not for, or where looking failed."""
        self._ended.set()
        self._thread.join(10)
        assert not self._thread.is_alive(), "looking into the gates hangs"
        if self.failure is not None:
            raise AssertionError("looking into the gates failed") from self.failure
        assert self.frames() == [], "frames that are not for the proxy reached a gate"

    def frames(self) -> list[str]:
        """Gives what was seen until now, and forgets it: for who wants frames to come."""
        found, self._found = self._found, []
        return found

    def _look(self) -> None:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            while not self._ended.wait(EVERY_SECONDS):
                self._find(home)
                self._read()
            self._read(last=True)
        except BaseException as error:  # noqa: BLE001 - told by close()
            self.failure = error
        finally:
            os.close(home)

    def _find(self, home: int) -> None:
        held = set()
        for path in self._descriptors():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                name = str(path.readlink())
                if name.startswith("net:["):
                    held.add(name)
                    if name not in self._known:
                        self._open(name, path, home)
        self._known &= held | set(self._gates)

    def _descriptors(self) -> list[Path]:
        """Gives what the launcher holds; asks again who it is where there is none of that number any more."""
        for _ in range(2):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if found := list(Path(f"/proc/{self._pid}/fd").iterdir()):
                    return found
            self._pid = self._launcher()
        return []

    def _open(self, name: str, path: Path, home: int) -> None:
        try:
            namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # the launcher closed it, or has something else there by now
        try:
            if str(Path(f"/proc/self/fd/{namespace}").readlink()) != name:
                return
            setns(namespace, CLONE_NEWNET)
            try:
                links = {link for _, link in socket.if_nameindex()}
                if GATE_INTERFACE not in links:
                    # An agent's side, or a gate that is being made; the host's has more than that.
                    if links != {"lo"}:
                        self._known.add(name)
                    return
                try:
                    capture = _capture()
                except OSError as error:
                    if error.errno == errno.ENODEV:
                        return  # the link went away since it was listed
                    raise
                routes = Path("/proc/thread-self/net/fib_trie").open()  # noqa: SIM115 - the gate closes it
            finally:
                setns(home, CLONE_NEWNET)
        finally:
            os.close(namespace)
        self._gates[name] = Gate(capture, routes)
        self._known.add(name)
        self.seen += 1

    def _read(self, *, last: bool = False) -> None:
        for name, gate in list(self._gates.items()):
            stands = gate.stands()
            self._found += gate.read()
            if last or not stands:
                gate.close()
                del self._gates[name]
        del self._found[FRAMES_MAX:]


@functools.cache
def _second_layer() -> bool:
    """Whether this kernel has what keeps an agent's frames from its gate (User-Mode Linux has not)."""
    return next(item.present for item in doctor.probe() if item.control == "nftables")


def watched(launcher: Callable[[], int]) -> Gates | None:
    """Begin to look into the gates of a launcher, where this user may and the kernel filters at all."""
    if os.geteuid() != 0 or not _second_layer():
        return None
    gates = Gates(launcher)
    gates.start()
    return gates
