"""A round of points on one instance: deeds under way, somebody dies, and what is there afterwards is judged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from stockade.client import Selector, State, Stockade, StockadeError

from supervisord.actions.verify import verify
from tests.chaos.points import Deed, Point, Victim
from tests.support.census import (
    GONE,
    IDS_PER_AGENT,
    directories,
    launcher_pid,
    networks,
    processes,
    slots,
    started,
    text,
)
from tests.support.instance import Instance
from tests.support.log_lives import Lives
from tests.support.site import Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from stockade.client import Agent

NAME: Final = "status.example"
CALLERS: Final = {Deed.LAUNCH: 4, Deed.GRANT: 3, Deed.EGRESS: 0}
BACK_SECONDS_MAX: Final = 30.0
QUIET_SECONDS: Final = 2.0
# One process that calls, by the proxy of its environment: a curl for each call takes more time than the deaths. Seldom
# but where it is asked to be busy, for each call is work for everybody.
BUSY: Final = "busy"
CALLS: Final = f"""
import itertools, os, time, urllib.request
for number in itertools.count(1):
    try:
        with urllib.request.urlopen("http://{NAME}/" + str(number), timeout=10) as answer:
            print(answer.status, number, flush=True)
    except OSError as error:
        print(error, flush=True)
    time.sleep(0.01 if os.path.exists("/workspace/{BUSY}") else 0.25)
"""
MARK: Final = "chaos"


class Wrong(AssertionError):  # noqa: N818 - a finding
    """Something is not as promised after a death."""


@dataclass
class Answered:
    """What callers were told while a deed was under way; whatever is in here has to be there afterwards."""

    launched: list[str] = field(default_factory=list)
    granted: list[str] = field(default_factory=list)
    revoking: list[str] = field(default_factory=list)  # asked for; what became of it is known where it is in `revoked`
    revoked: list[str] = field(default_factory=list)


class Round:
    """One instance with an agent that calls out without end, and a log writer's directory."""

    def __init__(self, stockade: Instance, site: Site) -> None:
        self._stockade = stockade
        self._site = site
        self._lives = Lives(Path(tempfile.mkdtemp(prefix="writer-", dir=stockade.directory)))
        self._seq = 0
        self._launched: set[str] = set()
        self._granted: set[str] = set()
        self._called: set[str] = set()
        self._workspace = stockade.workspace()
        with self._client() as client:
            agent = client.launch(["python3", "-c", CALLS], name="steady", workspace=str(self._workspace))
            self._steady = agent.agent_id
            client.grant(self._steady, f"http:GET:http://{NAME}/**")
        self._wait(lambda: "200" in self._output(), "the agent calls out")
        self._reference = self._settled()

    @classmethod
    @contextmanager
    def begin(cls) -> Iterator[Round]:
        with Site() as site:
            hosts = f'[gateway]\nkind = "embedded"\n[gateway.hosts]\n"{NAME}" = "127.0.0.1:{site.port}"\n'
            with Instance.start(hosts) as stockade:
                yield cls(stockade, site)

    def keep(self) -> Path:
        """A copy of the evidence that outlives the round."""
        kept = Path(tempfile.mkdtemp(prefix="stockade-chaos-", dir="/var/tmp"))
        shutil.copytree(self._stockade.directory / "state" / "log", kept / "log")
        shutil.copytree(self._lives.directory, kept / "writer")
        (kept / "stockaded.log").write_text(self._stockade.daemon_log())
        return kept

    def come_to(self, point: Point) -> None:
        """Raises AssertionError where anything is not as it has to be."""
        if point.deed is Deed.APPEND:
            self._lives.end_one(point.delay_seconds, point.number)
            return
        if point.deed is Deed.EGRESS:
            self._call_busily()
        answered = self._deeds(point)
        self._judge(point, answered)
        # Before what is left is counted: a launcher makes ahead only while nobody's output keeps it busy.
        (self._workspace / BUSY).unlink(missing_ok=True)
        self._clear(point)

    def end(self) -> None:
        """What the log is to somebody who has nothing but its files."""
        self._stockade.down()
        state = self._stockade.directory / "state"
        report = verify(state / "log", state / "keys" / "log.key.pub")
        _must(report.ok, f"the log does not verify offline: {report.problem}")
        self._stockade.up()

    # --- what is under way

    def _call_busily(self) -> None:
        (self._workspace / BUSY).touch()
        length = len(self._output())
        self._wait(lambda: len(self._output()) > length, "the agent calls out")

    def _client(self) -> Stockade:
        return Stockade(f"unix:{self._stockade.run_dir}/control.sock")

    def _deeds(self, point: Point) -> Answered:
        answered, over = Answered(), threading.Event()
        deed = {Deed.LAUNCH: self._launch, Deed.GRANT: self._grant}.get(point.deed)
        callers = [
            threading.Thread(target=self._call, args=(deed, f"{point.number}-{number}", answered, over))
            for number in range(CALLERS[point.deed])
        ]
        for caller in callers:
            caller.start()
        try:
            time.sleep(point.delay_seconds)
            self._kill(point.victim, over)
        finally:
            over.set()
            for caller in callers:
                caller.join()
        return answered

    def _call(
        self, deed: Callable[[Stockade, str, Answered], None], name: str, answered: Answered, over: threading.Event
    ) -> None:
        turn = 0
        with self._client() as client:
            while not over.is_set():
                turn += 1
                try:
                    deed(client, f"{name}-{turn}", answered)
                except StockadeError:
                    over.wait(0.01)

    def _launch(self, client: Stockade, _name: str, answered: Answered) -> None:
        answered.launched.append(client.launch(["sleep", "1000"], labels={MARK: "launch"}).agent_id)

    def _grant(self, client: Stockade, name: str, answered: Answered) -> None:
        grant = client.grant(self._steady, f"llm:{name}").grant_id
        answered.granted.append(grant)
        if int(name.rpartition("-")[2]) % 2:
            answered.revoking.append(grant)
            client.revoke(grant)
            answered.revoked.append(grant)

    # --- who dies

    def _kill(self, victim: Victim, over: threading.Event) -> None:
        """Kill it, and come back when there is another one in its place."""
        stockade = self._stockade
        if victim is Victim.DAEMON:
            stockade.down(signal.SIGKILL)
            over.set()
            stockade.up()
            return
        pid = self._pid_of(victim)
        _must(pid != 0, f"there is no {victim} to kill")
        os.kill(pid, signal.SIGKILL)
        over.set()
        self._wait(
            lambda: started(pid) == GONE and self._pid_of(victim) not in (0, pid), f"another {victim} is started"
        )
        self._wait(self._runs, "an agent runs again")

    def _runs(self) -> bool:
        try:
            with self._client() as client:
                return client.launch(["true"]).wait().exit_code == 0
        except StockadeError:
            return False

    def _pid_of(self, victim: Victim) -> int:
        if victim is Victim.LAUNCHER:
            return launcher_pid(self._stockade)
        words = text(self._stockade.run_dir / "processes" / f"{victim}.json")
        return int(json.loads(words)["pid"]) if words else 0

    # --- what is there afterwards

    def _judge(self, point: Point, answered: Answered) -> None:
        seen = set(map(_path, self._site.seen))  # before the entries are read, for the agent goes on calling
        with self._client() as client:
            self._read(client)
            agents = {agent.agent_id: agent for agent in client.agents()}
            running = {each for each, agent in agents.items() if agent.state is State.RUNNING}
            grants = {grant.grant_id for grant in client.grants(self._steady)}
            report = client.verify_log()
        _must(report.ok, f"the log does not verify: {report.problem}")
        _must(self._steady in running, "the agent that was there does not run any more")
        _all_in(answered.launched, running, "launched, as its caller was told, and does not run")
        _all_in(running, self._launched, "runs, and no entry says that it was launched")
        _all_in(answered.granted, self._granted, "granted, as the caller was told, and no entry says so")
        _all_in(set(answered.granted) - set(answered.revoking), grants, "granted, and not in force")
        _all_in(answered.revoked, self._granted - grants, "revoked, and in force again")
        _all_in(seen, self._called, "left, and no entry says so")
        self._confined([agents[each] for each in running])
        if point.deed is Deed.EGRESS:
            length = len(self._output())
            self._wait(lambda: "200" in self._output()[length:], "the agent's calls are answered again")

    def _read(self, client: Stockade) -> None:
        """The entries since the last time."""
        for action in client.actions(after_seq=self._seq):
            self._seq = action.seq
            if action.verb == "agent.launch":
                self._launched.add(action.agent_id)
            elif action.verb == "grant.create":
                self._granted.add(str(action.details.get("grant_id", "")))
            elif action.verb == "egress.request":
                self._called.add(_path(action.object))

    def _confined(self, agents: list[Agent]) -> None:
        """Every process with an id of a running agent is confined; those of no running agent are none."""
        ranges = {int(agent.posture["ids"]["start"]): agent.agent_id for agent in agents}  # type: ignore[index]
        host = Path("/proc/self/ns/net").readlink()
        found: dict[str, int] = dict.fromkeys(ranges.values(), 0)
        for process in processes():
            facts = dict(line.split(":\t", 1) for line in text(process / "status").splitlines() if ":\t" in line)
            if "Uid" not in facts or facts.get("State", "").startswith("Z"):
                continue
            uid = int(facts["Uid"].split()[1])
            agent_id = next((name for start, name in ranges.items() if start <= uid < start + IDS_PER_AGENT), "")
            if not agent_id:
                continue
            found[agent_id] += 1
            try:
                network = (process / "ns/net").readlink()
            except OSError:
                continue  # it has just ended
            kept = (facts["Seccomp"], facts["NoNewPrivs"], int(facts["CapEff"], 16), network != host)
            _must(kept == ("2", "1", 0, True), f"process {process.name} of {agent_id} is not confined: {kept}")
        _must(all(found.values()), f"agents run and have no process: {[name for name, n in found.items() if not n]}")

    def _clear(self, point: Point) -> None:
        with self._client() as client:
            for receipt in client.kill_all(Selector(labels={MARK: "launch"}), "the point is over"):
                _must(receipt.verified_empty, f"{receipt.agent_id} cannot be killed")
            for grant in client.grants(self._steady):
                if grant.scope.startswith("llm:"):
                    client.revoke(grant.grant_id)
        if point.victim is Victim.LAUNCHER:
            # Those that it left are no children of the next one, and so not in the count of its networks.
            groups_and_slots = self._reference[:-1]
            self._wait(lambda: self._lasting()[:-1] == groups_and_slots, "nothing is left behind")
            self._reference = (*groups_and_slots, self._settled()[-1])
        elif point.deed is Deed.LAUNCH:
            self._wait(lambda: self._lasting() == self._reference, "nothing is left behind")

    def _lasting(self) -> tuple[int, ...]:
        """What is left of agents, without what a census does besides: it is counted at every point."""
        of = self._stockade
        return sum(1 for _ in directories(of.name)), slots(of), len(networks(launcher_pid(of)))

    def _settled(self) -> tuple[int, ...]:
        """The same once what is made ahead of need has been made: a launcher beside others takes its time."""
        last, since = self._lasting(), time.monotonic()
        while time.monotonic() < since + QUIET_SECONDS:
            time.sleep(QUIET_SECONDS / 10)
            if (seen := self._lasting()) != last:
                last, since = seen, time.monotonic()
        return last

    def _output(self) -> str:
        return text(self._stockade.run_dir / "agents" / self._steady / "stdout.log")

    def _wait(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + BACK_SECONDS_MAX
        while not condition():
            _must(time.monotonic() < deadline, f"not within {BACK_SECONDS_MAX:.0f} seconds: {what}")
            time.sleep(0.05)


def _path(target: str) -> str:
    """The path of `GET /x` as the site saw it, and of `GET http://name/x` as the log has it."""
    return "/" + target.rpartition("/")[2]


def _must(holds: object, message: str) -> None:
    if not holds:
        raise Wrong(message)


def _all_in(these: Iterable[str], those: Iterable[str], what: str) -> None:
    missing = sorted(set(these) - set(those))
    _must(not missing, f"{what}: {missing[:5]}")
