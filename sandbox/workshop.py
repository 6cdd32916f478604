"""What every launch of a launcher draws on, and what this host lacks for a plan."""

# ruff: noqa: PTH123 - strings and descriptors: pathlib costs time on the launch path and knows no dir_fd

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sandbox import landlock
from sandbox.cgroups import Layout
from sandbox.guard import Guard
from sandbox.loop import Loop
from sandbox.netpool import Pool
from sandbox.plan import SandboxPlan
from sandbox.posture import degraded
from sandbox.running import EXEC_SECONDS_MAX, Agent
from sandbox.scratch import Image, Stock
from sandbox.starters import Starters
from sandbox.sweeper import Sweeper
from sandbox.sync import StepError
from sandbox.userns import Holders
from sandbox.watching import Watching


@dataclass(slots=True)
class Workshop:
    """What every launch draws on."""

    run_dir: str
    instance: str
    loop: Loop
    layout: Layout
    pool: Pool
    holders: Holders
    starters: Starters
    guard: Guard
    stock: Stock
    sweeper: Sweeper
    watching: Watching
    allow_weakened: bool
    exec_seconds: float = EXEC_SECONDS_MAX
    filters: dict[str, bytes] = field(default_factory=dict)

    leaving: dict[str, list[Callable[[], None]]] = field(default_factory=dict)

    @property
    def forks(self) -> int:
        """Count the processes made ahead: each shares this one's memory, which is copied when it is next written to."""
        return self.starters.made + self.holders.made

    def put_away(self, image: Image) -> None:
        """Let go of an image; until that is done, `when_free` of its path waits."""
        path = image.kept
        if not path:
            self.sweeper.put_away(image)
            return
        self.leaving.setdefault(path, [])

        def done() -> None:
            for call in self.leaving.pop(path, []):
                call()

        self.sweeper.put_away(image, done)

    def when_free(self, path: str, call: Callable[[], None]) -> None:
        """Call now, or when the image of this path has been written out."""
        if path in self.leaving:
            self.leaving[path].append(call)
        else:
            call()

    def check(self, plan: SandboxPlan, fds: list[int], agents: Iterable[Agent]) -> None:
        """Refuse what cannot be launched here; raises `StepError`."""
        if plan.instance != self.instance:
            raise StepError("check plan", 0, f"plan is of instance {plan.instance}, this launcher of {self.instance}")
        if plan.weaken and not self.allow_weakened:
            raise StepError("check plan", 0, "a weakened sandbox is for tests (--allow-weakened) only")
        for agent in agents:
            if agent.agent_id == plan.agent_id:
                raise StepError("check plan", 0, f"agent {plan.agent_id} is there already")
            if plan.home is not None and agent.plan.home == plan.home:
                raise StepError("check plan", 0, f"the home of {plan.home} is in use by {agent.agent_id}")
            if agent.plan.ids.start == plan.ids.start:
                raise StepError("check plan", 0, f"ids {plan.ids.start} are in use by {agent.agent_id}")
        if plan.fds_needed() > len(fds):
            raise StepError("check plan", 0, f"plan needs {plan.fds_needed()} descriptors, {len(fds)} came")
        if "seccomp" not in plan.weaken and plan.filter_digest not in self.filters:
            raise StepError("check plan", 0, f"filter {plan.filter_digest!r} is not known", "send it first (op filter)")
        degraded(plan, self.lacking(plan))

    def lacking(self, plan: SandboxPlan) -> dict[str, str]:
        """Return what this host and this plan do without, before anything is made, and how each shows."""
        found = {}
        if plan.landlock != "off" and not landlock.ABI:
            found["landlock"] = "this kernel has none"
        if not str(self.layout.facts()["swap"]).startswith("memory.") and _swaps():
            found["swap"] = "the host swaps, and swap is not accounted"
        if plan.scratch.disk != "off" and self.stock.lacking:
            found["disk-quota"] = self.stock.lacking
        if why := self.layout.io_unheld(plan.limits):
            found["io"] = why
        writable = [bind.target for bind in plan.binds if bind.writable]
        if writable:
            found["workspace-quota"] = f"{', '.join(writable)}: a writable bind has no limit on bytes or files"
        return found


def _swaps() -> bool:
    """Return whether the host swaps to anything (proc(5), /proc/swaps: a heading, then a line each)."""
    with open("/proc/swaps", "rb") as file:
        return len(file.read(4096).splitlines()) > 1
