#!/usr/bin/python3
"""Runs inside the guest: installs the units as `./bootstrap install` does, lives through restarts, writes what it saw.

Its argument is a directory of the host; facts.json in it is what test_systemd_units.py judges. Nothing is judged here: a
step that fails is a fact as well ("error"), and the steps after it still run.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

OUT = Path(sys.argv[1])
REPOSITORY = Path(str(Path(__file__).resolve()).removeprefix("/host")).parents[2]
PREFIX = Path("/opt/stockade")
AGENTS = Path("/sys/fs/cgroup/stockade.slice/stockade-agents.service/agents")
WORKSPACES = {name: Path("/srv/workspaces", name) for name in ("ticker", "seven", "nine")}
WAIT_SECONDS = 60.0
AGENT = "n=0; while :; do n=$((n+1)); echo $n > /workspace/ticks.new; mv /workspace/ticks.new /workspace/ticks; sleep 0.2; done"
FACTS: dict[str, Any] = {}


def run(*command: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=seconds
    )


def systemctl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run("systemctl", *arguments)


def properties(unit: str, *names: str) -> dict[str, str]:
    shown = systemctl("show", unit, *(f"--property={name}" for name in names)).stdout
    return dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)


def until(what: Callable[[], Any]) -> Any:
    """The first true answer, or the last one after the time is up."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            answer = what()
        except Exception as error:  # noqa: BLE001 - a daemon that is being restarted may fail in any way
            answer, last = None, error
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {WAIT_SECONDS:.0f} s: {locals().get('last', answer)}")
        time.sleep(0.1)


def ticks() -> int:
    return int((WORKSPACES["ticker"] / "ticks").read_text())


def goes_on() -> bool:
    """Whether the agent does anything from now on."""
    before = ticks()
    return bool(until(lambda: ticks() > before + 1))


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def processes(agent_id: str) -> list[int]:
    """Every process on this host whose uid lies in the agent's range: nothing else may have such a one."""
    first, size = FACTS["ids"][agent_id]
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                if first <= int(status_of(int(entry.name))["Uid"].split()[0]) < first + size:
                    found.append(int(entry.name))
    return sorted(found)


def confinement(agent_id: str) -> dict[str, Any]:
    """What holds the processes of an agent, as the kernel says it: equal before and after means nothing was loosened."""
    facts: dict[str, Any] = {}
    for pid in processes(agent_id):
        status = status_of(pid)
        if status["Name"] == "sleep":
            continue  # a new one each time
        facts[str(pid)] = {
            **{key: status[key] for key in ("NoNewPrivs", "Seccomp", "Seccomp_filters", "CapEff", "CapBnd", "Uid")},
            **{name: os.readlink(f"/proc/{pid}/ns/{name}") for name in ("net", "mnt", "pid", "user", "ipc", "uts")},
            "cgroup": Path(f"/proc/{pid}/cgroup").read_text().strip(),
        }
    return facts


def main_pid(unit: str) -> int:
    return int(properties(unit, "MainPID")["MainPID"])


def kill_main(unit: str) -> None:
    """SIGKILL to the unit's main process; returns when systemd has started another."""
    before = main_pid(unit)
    if before <= 0:
        raise RuntimeError(f"{unit} does not run")
    os.kill(before, signal.SIGKILL)
    until(lambda: main_pid(unit) not in {0, before})
    until(lambda: properties(unit, "ActiveState")["ActiveState"] == "active")


def step(function: Callable[[], Any]) -> None:
    started = time.monotonic()
    try:
        FACTS[function.__name__] = function()
    except Exception:  # noqa: BLE001 - a fact for the judge
        FACTS[function.__name__] = {"error": traceback.format_exc()}
    print(f"{function.__name__}: {time.monotonic() - started:.1f} s", flush=True)
    (OUT / "facts.json").write_text(json.dumps(FACTS, indent=1))


def install() -> dict[str, Any]:
    REPOSITORY.mkdir(parents=True, exist_ok=True)
    run("mount", "-t", "hostfs", "-o", str(REPOSITORY), "none", str(REPOSITORY))
    PREFIX.mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (PREFIX / name).symlink_to(REPOSITORY / ".venv" / name)
    (PREFIX / "site").symlink_to(REPOSITORY)
    units = REPOSITORY / "supervisord/systemd"
    for unit in [*units.glob("*.service"), *units.glob("*.socket")]:
        shutil.copy(unit, "/etc/systemd/system")
    shutil.copy(units / "stockade.sysusers.conf", "/usr/lib/sysusers.d/stockade.conf")
    shutil.copy(units / "stockade.tmpfiles.conf", "/usr/lib/tmpfiles.d/stockade.conf")
    run("systemd-sysusers")
    run("systemd-tmpfiles", "--create", "stockade.conf")
    Path("/etc/stockade/policies").mkdir(parents=True)
    shutil.copy(REPOSITORY / "supervisord/stockade.example.toml", "/etc/stockade/stockade.toml")
    for path in WORKSPACES.values():
        path.mkdir(parents=True)
        os.chown(path, 1000, 1000)
    systemctl("daemon-reload")
    verified = run("systemd-analyze", "verify", "--man=no", "stockaded.service", "stockaded.socket")
    return {"verify": verified.stderr, "controllers": Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()}


def start() -> dict[str, Any]:
    started = systemctl("start", "stockaded.service")
    socket = Path("/run/stockade/control.sock").stat()
    return {
        "stderr": started.stderr,
        "journal": ""
        if started.returncode == 0
        else run("journalctl", "-b", "--no-pager", "-u", "stockade*", "-n", "80").stdout,
        "states": {
            unit: properties(unit, "ActiveState")["ActiveState"]
            for unit in (
                "stockaded.socket",
                "stockaded.service",
                "stockade-launcher.service",
                "stockade-agents.service",
            )
        },
        "control_mode": oct(socket.st_mode & 0o7777),
        "control_group": run("getent", "group", str(socket.st_gid)).stdout.split(":")[0],
        "delegated": (AGENTS / "cgroup.subtree_control").read_text().split(),
    }


def ids(agent: Any) -> list[int]:
    return [int(agent.posture["ids"]["start"]), int(agent.posture["ids"]["size"])]


def effective(group: Path, name: str) -> list[str]:
    """What limits a group: its own value and those of the groups above it, up to where all agents live."""
    chain = [group, *(parent for parent in group.parents if AGENTS in (parent, *parent.parents))]
    return [value for place in chain if (value := (place / name).read_text().strip()).split()[0] != "max"]


def launch() -> dict[str, Any]:
    from stockade.client import Stockade, Workspace

    with Stockade() as stockade:
        agent = stockade.launch(
            ["sh", "-c", AGENT],
            name="ticker",
            workspace=Workspace(str(WORKSPACES["ticker"]), "rw"),
            memory_bytes=64 << 20,
            pids=50,
        )
        FACTS["ticker"] = agent.agent_id
        FACTS["ids"] = {agent.agent_id: ids(agent)}
        for name, code in (("seven", 7), ("nine", 9)):
            wait = f"while [ ! -e /workspace/end-{name} ]; do sleep 0.1; done; exit {code}"
            other = stockade.launch(["sh", "-c", wait], name=name, workspace=Workspace(str(WORKSPACES[name]), "rw"))
            FACTS[name] = other.agent_id
            FACTS["ids"][other.agent_id] = ids(other)
    until(lambda: ticks() > 1)
    groups = {Path(f"/proc/{pid}/cgroup").read_text().strip() for pid in processes(FACTS["ticker"])}
    group = Path("/sys/fs/cgroup" + min(groups, key=len).removeprefix("0::"))
    limits = {name: effective(group, name) for name in ("memory.max", "pids.max", "cpu.max")}
    return {
        "groups": sorted(groups),
        "state": agent.state,
        "posture": {key: str(value) for key, value in agent.posture.items()},
        "limits": limits,
        "confinement": confinement(FACTS["ticker"]),
    }


def seen() -> dict[str, Any]:
    """How the agents look to a client and to the kernel, once the daemon answers."""
    from stockade.client import Selector, Stockade

    def states() -> dict[str, Any]:
        with Stockade() as stockade:
            agents = stockade.agents(
                Selector(agents=(FACTS["ticker"], FACTS["seven"], FACTS["nine"])), include_ended=True
            )
            return {agent.name: [agent.state, agent.exit_code] for agent in agents}

    return {"states": until(states), "goes_on": goes_on(), "confinement": confinement(FACTS["ticker"])}


def restart_daemon() -> dict[str, Any]:
    before = main_pid("stockaded.service")
    done = systemctl("restart", "stockaded.service")
    return {"restarted": done.returncode == 0 and main_pid("stockaded.service") != before, **seen()}


def end_while_daemon_is_away() -> dict[str, Any]:
    from stockade.client import Stockade

    systemctl("stop", "stockaded.service", "stockaded.socket")
    alive = goes_on()
    (WORKSPACES["seven"] / "end-seven").touch()
    until(lambda: not processes(FACTS["seven"]))
    systemctl("start", "stockaded.socket", "stockaded.service")

    def ended() -> bool:
        with Stockade() as stockade:
            return stockade.agent(FACTS["seven"]).state.ended

    until(ended)
    return {"alive_without_daemon": alive, **seen()}


def kill_daemon() -> dict[str, Any]:
    kill_main("stockaded.service")
    return seen()


def restart_launcher() -> dict[str, Any]:
    before = main_pid("stockade-launcher.service")
    daemon = main_pid("stockaded.service")
    done = systemctl("restart", "stockade-launcher.service")
    return {
        "restarted": done.returncode == 0 and main_pid("stockade-launcher.service") != before,
        "same_daemon": main_pid("stockaded.service") == daemon,
        **seen(),
    }


def end_after_launcher_restart() -> dict[str, Any]:
    """An agent that the first launcher started ends under the second; its exit code is not lost. Exec works too."""
    from stockade.client import Stockade

    (WORKSPACES["nine"] / "end-nine").touch()

    def nine() -> list[Any]:
        with Stockade() as stockade:
            agent = stockade.agent(FACTS["nine"])
            return [agent.state, agent.exit_code] if agent.state.ended else []

    ended = until(nine)
    with Stockade() as stockade:
        done = stockade.agent("ticker").exec(["sh", "-c", "id -u; pwd"])
    return {"nine": ended, "exec": done.stdout.decode().split(), "exec_code": done.status.code}


def kill_launcher() -> dict[str, Any]:
    kill_main("stockade-launcher.service")
    return seen()


def verify_log() -> dict[str, Any]:
    from stockade.client import Stockade

    with Stockade() as stockade:
        verified = until(stockade.verify_log)
        verbs = [action.verb for action in stockade.actions()]
    return {"ok": verified.ok, "problem": verified.problem, "verbs": verbs}


def stop_agents() -> dict[str, Any]:
    """The one stop that ends agents."""
    before = processes(FACTS["ticker"])
    systemctl("stop", "stockade-agents.service")
    return {
        "before": before,
        "left": [pid for pid in before if Path(f"/proc/{pid}").exists()],
        "result": properties("stockade-agents.service", "Result", "ActiveState"),
    }


def one_unit_for_everything() -> dict[str, Any]:
    """What the three units avoid, done on purpose: a delegated unit with KillMode=process cannot restart on cgroup v2."""
    script = Path("/run/one")
    script.write_text(
        "g=/sys/fs/cgroup$(cut -c4- /proc/self/cgroup); mkdir -p $g/daemon $g/agent\n"
        "echo $$ > $g/daemon/cgroup.procs; echo +pids > $g/cgroup.subtree_control\n"
        "sleep 1000 & echo $! > $g/agent/cgroup.procs\n"
        "exec sleep 1000\n"
    )
    Path("/run/systemd/system/one.service").write_text(
        "[Service]\nType=exec\nDelegate=yes\nKillMode=process\nExecStart=/bin/sh /run/one\n"
    )
    systemctl("daemon-reload")
    systemctl("start", "one.service")
    until(lambda: len(list(Path("/sys/fs/cgroup/system.slice/one.service").glob("agent"))) == 1)
    systemctl("restart", "one.service")
    until(lambda: properties("one.service", "ActiveState")["ActiveState"] == "failed")
    return properties("one.service", "Result", "ExecMainStatus")


def main() -> None:
    # The project's client needs the project's packages; what runs this may be the guest's plain python.
    if Path(sys.executable).parent != PREFIX / "bin":
        step(install)
        (OUT / "facts.json").write_text(json.dumps(FACTS))
        os.execv(PREFIX / "bin/python3", [str(PREFIX / "bin/python3"), "-B", __file__, str(OUT)])  # noqa: S606
    FACTS.update(json.loads((OUT / "facts.json").read_text()))
    for function in (
        *(start, launch, restart_daemon, end_while_daemon_is_away, kill_daemon),
        *(restart_launcher, end_after_launcher_restart, kill_launcher, verify_log, stop_agents),
        one_unit_for_everything,
    ):
        step(function)
    (OUT / "journal").write_text(run("journalctl", "-b", "--no-pager", "-o", "short-monotonic").stdout)


if __name__ == "__main__":
    main()
