"""What agents changed in overlay workspaces: which layers there are, and looking at, applying and discarding them.

A layer is an image that the launcher keeps (`<state_dir>/scratch/layers/AGENT_ID.img`) beside a record of ours of the
same name: of which directory it is, whose, and since when. Both outlive the agent, this daemon and the host's next
start. The bytes in it are read by a confined process (sandbox/changes_worker.py); what comes back is bounded.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Final, Literal, cast

import structlog

import sandbox
from supervisord.actions.types import Action
from supervisord.callers import Role
from supervisord.channel import close_all
from supervisord.errors import Conflict, NotFound, PermissionDenied, StockadeError, Unavailable
from supervisord.hostfiles import open_path
from supervisord.ids import is_agent_id, shown
from supervisord.processes import spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from supervisord.actions.log import ActionLog
    from supervisord.actions.types import JSON
    from supervisord.agents import Agent, Agents
    from supervisord.callers import Caller
    from supervisord.launcher_link import LauncherLink
    from supervisord.plan import OpenedFile

log = structlog.get_logger()

WORKER: Final = Path(sandbox.__file__ or "").resolve().parent / "changes_worker.py"
ENTRIES_MAX: Final = 100_000
READ_BYTES_MAX: Final = 8 << 30
REPORT_BYTES_MAX: Final = 24 << 20
PATCH_BYTES_MAX: Final = 1 << 20
LINE_BYTES_MAX: Final = 2 << 20
WORK_SECONDS_MAX: Final = 600.0
RECORD_BYTES_MAX: Final = 64 << 10
PATHS_MAX: Final = 4096
PATHS_LOGGED_MAX: Final = 64
_CLOCK_REALTIME_COARSE: Final = 5  # clock_gettime(2); the time module has no name for it
EXPIRY_SECONDS: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Layer:
    """One kept layer."""

    agent_id: str
    name: str
    workspace: str
    device: int
    inode: int
    uid: int
    gid: int
    since_ns: int

    @classmethod
    def read(cls, path: Path) -> Layer:
        """The layer of a record; raises OSError or ValueError."""
        with path.open("rb") as file:
            value = json.loads(file.read(RECORD_BYTES_MAX))
        if not isinstance(value, dict) or value.keys() != {field.name for field in fields(cls)}:
            raise ValueError(f"{path.name} is not a record of this version")
        return cls(**value)


@dataclass(frozen=True, slots=True)
class Change:
    """One path, as the worker reports it; `outcome` and `why` are of an apply."""

    path: bytes
    kind: str
    type: str
    size: int
    mode: int
    sha256: str
    link: bytes
    notes: tuple[str, ...]
    conflict: str
    refused: str
    patch: bytes = b""
    outcome: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What there is to say of a layer; `digest` names all of its changes, whichever were asked for."""

    layer: Layer
    changes: tuple[Change, ...]
    digest: str
    kept: bool = True


class Layers:
    """Every layer of this instance."""

    def __init__(
        self,
        directory: Path,
        *,
        agents: Agents,
        actions: ActionLog,
        launcher: LauncherLink,
        keep_seconds: float,
        now: Callable[[], float],
        entries_max: int = ENTRIES_MAX,
    ) -> None:
        self._directory = directory
        self._agents = agents
        self._actions = actions
        self._launcher = launcher
        self._keep_seconds = keep_seconds
        self._now = now
        self._entries_max = entries_max
        self._locks: dict[str, asyncio.Lock] = {}
        self._kept: set[str] = set()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._kept |= {path.stem for path in directory.glob("*.json")}

    def kept(self, agent_id: str) -> bool:
        """Whether what this agent changed is there to be looked at."""
        return agent_id in self._kept

    def add(self, agent: Agent, file: OpenedFile, *, fd: int) -> None:
        """Write down a layer that is about to be made; from now on a change to the workspace is a conflict."""
        facts = os.fstat(fd)
        # By the clock that file systems stamp with: one that is finer would be ahead of them.
        since_ns = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
        layer = Layer(
            agent_id=agent.agent_id,
            name=agent.name,
            workspace=str(file.wanted.path),
            device=facts.st_dev,
            inode=facts.st_ino,
            uid=facts.st_uid,
            gid=facts.st_gid,
            since_ns=since_ns,
        )
        path = self._record(agent.agent_id)
        fresh = path.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(asdict(layer)))
            fresh.replace(path)
        except OSError as error:
            raise Unavailable(f"cannot write {path}: {error.strerror}", remedy="make room on that disk") from error
        self._kept.add(agent.agent_id)

    def forget(self, agent_id: str) -> None:
        self._record(agent_id).unlink(missing_ok=True)
        self._kept.discard(agent_id)
        self._locks.pop(agent_id, None)

    def find(self, name_or_id: str) -> Layer:
        """The layer of an agent, also of one that this daemon no longer remembers; raises NotFound."""
        agent_id = name_or_id if is_agent_id(name_or_id) else ""
        with contextlib.suppress(NotFound):
            agent_id = self._agents.find(name_or_id).agent_id
        if not self.kept(agent_id):
            found = [layer for layer in self._all() if layer.name == name_or_id]
            agent_id = max(found, key=lambda layer: layer.since_ns).agent_id if found and not agent_id else agent_id
        try:
            return Layer.read(self._record(agent_id)) if self.kept(agent_id) else self._missing(name_or_id)
        except (OSError, ValueError) as error:
            raise NotFound(
                f"cannot read the layer of {shown(name_or_id)}: {error}", remedy="launch the agent anew"
            ) from error

    def _missing(self, name: str) -> Layer:
        raise NotFound(
            f"cannot find changes of {shown(name)}: it has no overlay workspace, or they were applied or discarded",
            remedy="launch with --workspace DIR:overlay",
        )

    def _all(self) -> list[Layer]:
        found = []
        for path in self._directory.glob("*.json"):
            try:
                found.append(Layer.read(path))
            except (OSError, ValueError) as error:
                log.warning("cannot read the record of a layer", record=str(path), cause=str(error))
        return found

    def _record(self, agent_id: str) -> Path:
        return self._directory / f"{agent_id}.json"

    # --- look, apply, discard

    async def diff(self, name: str, *, paths: Sequence[bytes], patch: bool, caller: Caller) -> Outcome:
        """What the agent changed so far; raises StockadeError."""
        layer = self._of(name, caller)
        async with self._lock(layer):
            return await self._work(layer, "diff", paths=paths, patch=patch)

    async def apply(
        self, name: str, *, paths: Sequence[bytes], force: bool, digest: str, reason: str, caller: Caller
    ) -> Outcome:
        """Make changes real; a layer of which nothing is left to decide is let go of. Raises StockadeError."""
        layer = self._of(name, caller)
        self._check_ended(layer, "apply")
        # To its end, whether the caller waits for it or not: half of an apply without an entry would be the worst.
        task = asyncio.ensure_future(
            self._apply(layer, paths=paths, force=force, digest=digest, reason=reason, caller=caller)
        )
        return await asyncio.shield(task)

    async def _apply(
        self, layer: Layer, *, paths: Sequence[bytes], force: bool, digest: str, reason: str, caller: Caller
    ) -> Outcome:
        async with self._lock(layer):
            asked: dict[str, JSON] = {"workspace": layer.workspace, "force": force, "digest": digest}
            asked["paths"] = [_printable(path) for path in paths[:PATHS_LOGGED_MAX]]
            await self._actions.record(_action(layer, caller.actor, "changes.apply", "allowed", reason, asked))
            try:
                outcome = await self._work(layer, "apply", paths=paths, force=force, digest=digest)
            except StockadeError as error:
                await self._actions.note(
                    _action(layer, caller.actor, "changes.apply", "failed", error.message, asked), durable=True
                )
                raise
            done = [change for change in outcome.changes if change.outcome == "applied"]
            whole = not paths and len(done) == len(outcome.changes)
            facts: dict[str, JSON] = {
                "workspace": layer.workspace,
                "digest": outcome.digest,
                "applied": len(done),
                "left": len(outcome.changes) - len(done),
                "files": [
                    {"path": _printable(change.path), "kind": change.kind, "sha256": change.sha256}
                    for change in done[:PATHS_LOGGED_MAX]
                ],
            }
            verdict = "done" if len(done) == len(outcome.changes) else "failed"
            done_action = _action(layer, caller.actor, "changes.apply", verdict, reason, facts)
            await self._actions.note(done_action, durable=True)
            if whole:
                await self._drop(layer)
            return Outcome(layer, outcome.changes, outcome.digest, kept=not whole)

    async def discard(self, name: str, *, reason: str, caller: Caller) -> Layer:
        """Let go of what the agent changed; raises StockadeError."""
        layer = self._of(name, caller)
        self._check_ended(layer, "discard")
        async with self._lock(layer):
            await self._discard(layer, actor=caller.actor, reason=reason)
        return layer

    async def _discard(self, layer: Layer, *, actor: str, reason: str) -> None:
        facts: dict[str, JSON] = {"workspace": layer.workspace}
        await self._actions.record(_action(layer, actor, "changes.discard", "allowed", reason, facts))
        await self._drop(layer)
        await self._actions.note(_action(layer, actor, "changes.discard", "done", reason, facts))

    async def _drop(self, layer: Layer) -> None:
        if self._image(layer.agent_id).exists():
            await self._launcher.call("drop", agent_id=layer.agent_id)
        self.forget(layer.agent_id)

    def _image(self, agent_id: str) -> Path:
        return self._directory / f"{agent_id}.img"

    def _of(self, name: str, caller: Caller) -> Layer:
        """The layer, where its files are the caller's to decide on; raises PermissionDenied."""
        layer = self.find(name)
        if caller.role is not Role.ADMIN and caller.uid != layer.uid:
            raise PermissionDenied(
                f"cannot use the changes of {layer.name}: {layer.workspace} is owned by uid {layer.uid}, not by you",
                remedy="ask its owner, or root",
            )
        return layer

    def _check_ended(self, layer: Layer, verb: str) -> None:
        agent = self._agents.get(layer.agent_id)
        if agent is not None and agent.live:
            raise Conflict(
                f"cannot {verb} the changes of {agent.name}: it is {agent.state.value} and may change more",
                remedy=f"`stockadectl wait {agent.name}`, or kill it, first",
            )

    def _lock(self, layer: Layer) -> asyncio.Lock:
        return self._locks.setdefault(layer.agent_id, asyncio.Lock())

    # --- the worker

    async def _work(
        self,
        layer: Layer,
        op: Literal["diff", "apply"],
        *,
        paths: Sequence[bytes],
        patch: bool = False,
        force: bool = False,
        digest: str = "",
    ) -> Outcome:
        order = {
            "op": op,
            "uid": layer.uid,
            "gid": layer.gid,
            "since_ns": layer.since_ns,
            "paths": [base64.b64encode(path.strip(b"/")).decode() for path in paths],
            "patch": patch,
            "force": force,
            "digest": digest,
            "entries_max": self._entries_max,
            "read_bytes_max": READ_BYTES_MAX,
            "report_bytes_max": REPORT_BYTES_MAX,
            "patch_bytes_max": PATCH_BYTES_MAX,
        }
        lines = await self._run(layer, json.dumps(order).encode())
        if not lines or lines[-1].get("done") is not True:
            raise Unavailable(
                f"cannot {op} the changes of {layer.name}: the process that reads them ended early",
                remedy="they may be too many; discard them, or see the journal",
            )
        last = lines.pop()
        if last.get("problem"):
            raise Conflict(
                f"cannot {op} the changes of {layer.name}: {last['problem']}",
                remedy="what an agent leaves is bounded; discard it, or copy what you need by path",
            )
        if last.get("stale"):
            raise Conflict(
                f"cannot apply the changes of {layer.name}: they are not those of {digest}",
                remedy=f"look again: `stockadectl diff {layer.name}`",
            )
        if last.get("missing"):
            missing = base64.b64decode(str(last["missing"])).decode("utf-8", "surrogateescape")
            raise NotFound(
                f"cannot apply {shown(missing)}: {layer.name} changed no such path",
                remedy=f"see `stockadectl diff {layer.name}`",
            )
        return Outcome(layer, tuple(_change(line) for line in lines), str(last["digest"]))

    async def _run(self, layer: Layer, order: bytes) -> list[dict[str, object]]:
        """Run the worker on one order; gives its lines."""
        held: list[int] = []
        try:
            held.append(self._workspace(layer))
            reply = await self._launcher.call("layer", agent_id=layer.agent_id)
            held += reply.fds
            held.append(_memory(order))
            read, write = os.pipe2(os.O_CLOEXEC)
            held.append(write)
            lower, upper, asked, report = held
            try:
                child = spawn(
                    "changes worker",
                    [sys.executable, "-I", "-S", "-E", str(WORKER)],
                    fds={3: upper, 4: lower, 5: asked, 6: report},
                    new_session=True,
                )
            except Unavailable:
                os.close(read)
                raise
        finally:
            close_all(held)  # the worker's copies are the last ones: what it has mounted goes with it
        try:
            async with asyncio.timeout(WORK_SECONDS_MAX):
                return await _lines(read)
        except TimeoutError as error:
            raise Unavailable(
                f"cannot look at the changes of {layer.name}: not done in {WORK_SECONDS_MAX:g} s", remedy="discard them"
            ) from error
        finally:
            await child.end()

    def _workspace(self, layer: Layer) -> int:
        fd = open_path(PurePosixPath(layer.workspace))
        facts = os.fstat(fd)
        if (facts.st_dev, facts.st_ino) != (layer.device, layer.inode):
            os.close(fd)
            raise Conflict(
                f"cannot use the changes of {layer.name}: {layer.workspace} is another directory than at its launch",
                remedy="put the directory back, or discard the changes",
            )
        return fd

    # --- what is left

    async def reconcile(self) -> None:
        """Let go of images of agents that never ran, and of records of images that are gone."""
        live = {agent.agent_id for agent in self._agents.live()}
        for path in sorted(self._directory.glob("*")):
            agent_id = path.stem
            if agent_id in live:
                continue
            if path.suffix == ".img" and not self.kept(agent_id):
                with contextlib.suppress(StockadeError):
                    await self._launcher.call("drop", agent_id=agent_id)
            elif path.suffix == ".new" or (path.suffix == ".json" and not self._image(agent_id).exists()):
                path.unlink(missing_ok=True)
                self._kept.discard(agent_id)

    async def expire_forever(self) -> None:
        """Discard what nobody decided on in time, for ever."""
        while True:
            try:
                await self.expire()
            except StockadeError as error:
                log.error("cannot let go of old layers", cause=error.message)
            await asyncio.sleep(EXPIRY_SECONDS)

    async def expire(self) -> None:
        for layer in self._all():
            agent = self._agents.get(layer.agent_id)
            if agent is not None and agent.live:
                continue
            with contextlib.suppress(FileNotFoundError):
                age = self._now() - self._image(layer.agent_id).stat().st_mtime
                if age > self._keep_seconds:
                    async with self._lock(layer):
                        await self._discard(layer, actor="daemon", reason="nobody applied it in time")


def _memory(content: bytes) -> int:
    fd = os.memfd_create("order", os.MFD_CLOEXEC)
    os.write(fd, content)
    return fd


async def _lines(fd: int) -> list[dict[str, object]]:
    """Every line that the worker writes until it ends; what is beyond its bounds ends it."""
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb")
    )
    lines: list[dict[str, object]] = []
    left = REPORT_BYTES_MAX
    try:
        while line := await reader.readline():
            left -= len(line)
            if left < 0:
                return []
            value = json.loads(line)
            lines.append(value if isinstance(value, dict) else {})
    except ValueError:
        return []
    finally:
        transport.close()
    return lines


def _change(line: dict[str, object]) -> Change:
    size, mode = line["size"], line["mode"]
    notes = cast("list[object]", line["notes"])
    return Change(
        path=base64.b64decode(str(line["path"])),
        kind=str(line["kind"]),
        type=str(line["type"]),
        size=size if isinstance(size, int) else 0,
        mode=mode if isinstance(mode, int) else 0,
        sha256=str(line["sha256"]),
        link=base64.b64decode(str(line["link"])),
        notes=tuple(str(note) for note in notes),
        conflict=str(line["conflict"]),
        refused=str(line["refused"]),
        patch=base64.b64decode(str(line.get("patch", ""))),
        outcome=str(line.get("outcome", "")),
        why=str(line.get("why", "")),
    )


def _printable(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


def _action(  # noqa: PLR0917 - the fields of an entry, in their order
    layer: Layer, actor: str, verb: str, verdict: str, reason: str, details: dict[str, JSON]
) -> Action:
    return Action(layer.agent_id, actor, verb, layer.name, verdict, reason, details)
