"""./bootstrap bench: Stockade beside bubblewrap, crun and squid, interleaved in one run; medians and ratios.

Absolute times belong to the machine; what is compared is the ratio within this run. `--json FILE` writes everything,
`--rounds N` sets how many times each thing is done, `--check` fails where a promise of the README does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from stockade.client import Stockade

from tests.bench import action_log, peers
from tests.support.census import cgroups_of, launcher_pid, of_agent
from tests.support.instance import Instance, bin_dir

if TYPE_CHECKING:
    from collections.abc import Callable

    from stockade.client import Agent

HERE: Final = Path(__file__).resolve().parent
PAUSE_SECONDS: Final = 0.05  # between two measurements: teardown of the one must not slow the other
LOAD_SECONDS: Final = 2.0
LOAD_CONNECTIONS: Final = 4
IDLE_AGENTS: Final = 8
KILL_MANY: Final = 1000
WILD: Final = "trap '' TERM INT HUP; for i in $(seq {count}); do sleep 1000 & done; exec sleep 1000"
# The policy bounds a default agent to 256 pids; the tree of 1,000 needs more room.
CROWD_POLICY: Final = "kind: Policy\nname: crowd\nversion: 1\nlimits: {memory: 4GiB, cpus: 2, pids: 4096}\nscopes: []\n"
# name of the ratio, what it is of, its bound
PROMISES: Final = (
    ("launch_vs_bwrap", "launch RPC to exec / bubblewrap's bare true", 2.0),
    ("launch_vs_bwrap_veth", "launch RPC to exec / bubblewrap with a veth", 0.5),
    ("kill_1000_vs_bare", "kill RPC of 1,000 processes / cgroup.kill alone of the same", 1.5),
    ("squid_vs_worker", "squid's CONNECT requests/s / the worker's", 2.0),
)

Results = dict[str, list[float]]


def timed(results: Results, name: str, act: Callable[[], object]) -> None:
    """Do it, keep the milliseconds."""
    began = time.perf_counter()
    act()
    results.setdefault(name, []).append((time.perf_counter() - began) * 1000)
    time.sleep(PAUSE_SECONDS)


def starts(stockade: Instance, directory: Path, rounds: int) -> Results:
    """Start to exec, and start to exit, in turns."""
    results: Results = {}
    crun = peers.Crun(directory, f"{stockade.name}-crun")
    crun.configure("/usr/bin/true")
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        for number in range(rounds + 2):  # two to warm up
            current: Results = {} if number < 2 else results
            launched(current, client)
            timed(current, "bubblewrap true", peers.bwrap_true)
            timed(current, "stockadectl run -- true", lambda: stockade.ctl("run", "--", "true"))
            timed(current, "bubblewrap true with a veth", lambda: peers.bwrap_veth_true(f"{stockade.name}b"))
            timed(current, "the same by ip -batch", lambda: peers.bwrap_veth_batch_true(f"{stockade.name}b"))
            timed(current, "crun run true", crun.true)
            show_progress(f"starts {number + 1}/{rounds + 2}")
    crun.close()
    return results


def launched(results: Results, client: Stockade) -> None:
    """Launch, with the moment at which the daemon knew of the execve, and that of the answer."""
    began, clock = time.time(), time.perf_counter()
    agent = client.launch(command=["true"])
    results.setdefault("launch RPC to answer", []).append((time.perf_counter() - clock) * 1000)
    if agent.info.started_at is None:
        raise SystemExit("bench: an agent was launched and has not started")
    results.setdefault("launch RPC to exec", []).append((agent.info.started_at.timestamp() - began) * 1000)
    time.sleep(PAUSE_SECONDS)


def kills(stockade: Instance, directory: Path, rounds: int) -> Results:
    """Kill until nothing is left: one process, and a crowd that ignores signals."""
    results: Results = {}
    crun = peers.Crun(directory / "kill", f"{stockade.name}-crun")
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        for number in range(rounds):
            for count in (1, KILL_MANY):
                label = "1 process" if count == 1 else f"{count} processes"
                timed(results, f"kill of {label}", crowd(stockade, client, count).kill)
                results.setdefault(f"bare cgroup.kill of {label}", []).append(
                    bare_kill(stockade, crowd(stockade, client, count))
                )
                time.sleep(PAUSE_SECONDS)
                crun.configure("/usr/bin/sh", "-c", WILD.format(count=count - 1))
                with crun.running():
                    time.sleep(0.3 if count == 1 else 1.5)
                    timed(results, f"crun delete --force of {label}", crun.delete)
            show_progress(f"kills {number + 1}/{rounds}")
    crun.close()
    return results


def processes(stockade: Instance, agent_id: str) -> int:
    return int(stockade.json("status", agent_id)[0].get("pids") or 0)


def egress(directory: Path, rounds: int) -> Results:
    """Ping-pong through an established CONNECT: the worker from inside a sandbox, squid on loopback, no proxy."""
    results: Results = {}
    plain, behind = peers.Echo(speaks_connect=False), peers.Echo(speaks_connect=True)
    extra = (
        f'[gateway]\nkind = "openai"\nurl = "http://127.0.0.1:{plain.port}"\n'
        f'forward_proxy = "http://127.0.0.1:{behind.port}"\n'
    )
    scopes = ("--scope", f"fs:ro:{HERE}=/bench", "--scope", "tls:echo.example:443")
    load = ("python3", "-I", "/bench/load.py", "gateway.internal", "3128", "echo.example:443")
    amount = (str(LOAD_CONNECTIONS), str(LOAD_SECONDS))

    def keep(name: str, text: str) -> None:
        for key, value in json.loads(text).items():
            results.setdefault(f"{name}: {key}", []).append(value)

    def on_host(port: int, authority: str) -> str:
        command = ["/usr/bin/python3", "-I", str(HERE / "load.py"), "127.0.0.1", str(port), authority, *amount]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with (
        Instance.start(extra, policies={"crowd.yaml": CROWD_POLICY}) as stockade,
        peers.squid(directory, plain.port) as port,
    ):
        for number in range(rounds):
            done = stockade.ctl("run", "--policy", "crowd", *scopes, "--", *load, *amount)
            if done.code != 0:
                raise SystemExit(f"bench: the load inside failed: {done.out}{done.err}")
            keep("worker", done.out)
            keep("squid", on_host(port, f"127.0.0.1:{plain.port}"))
            keep("no proxy", on_host(behind.port, f"127.0.0.1:{behind.port}"))
            show_progress(f"egress {number + 1}/{rounds}")
    plain.close()
    behind.close()
    return results


def crowd(stockade: Instance, client: Stockade, count: int) -> Agent:
    """An agent with so many processes, that ignore what can be ignored."""
    agent = client.launch(command=["sh", "-c", WILD.format(count=count - 1)], policy="crowd")
    stockade.wait(lambda: processes(stockade, agent.agent_id) >= count, 30)
    if (found := processes(stockade, agent.agent_id)) < count:
        raise SystemExit(f"bench: only {found} of {count} processes could be started")
    return agent


def bare_kill(stockade: Instance, agent: Agent) -> float:
    """What the kernel needs for the same tree, in milliseconds: cgroup.kill by hand, while the launcher looks away."""
    launcher = launcher_pid(stockade)
    (first, *_) = of_agent({"posture": agent.info.posture})
    group = next(path for path in cgroups_of(first) if (path / "cgroup.kill").exists())
    while not group.parent.name.startswith("stockade-"):
        group = group.parent
    os.kill(launcher, signal.SIGSTOP)
    try:
        return peers.bare_cgroup_kill(group)
    finally:
        os.kill(launcher, signal.SIGCONT)


def memory(stockade: Instance) -> Results:
    """Give what an idle agent costs beside its own program: pid 1 of the sandbox, or bubblewrap's two processes."""
    results: Results = {}
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:
        for _ in range(IDLE_AGENTS):
            client.launch(command=["sleep", "1000"])
        time.sleep(0.5)
        for path in (stockade.run_dir / "agents").iterdir():
            state = json.loads((path / "state.json").read_text())
            if Path(f"/proc/{state['pid']}").exists():
                results.setdefault("idle agent, KiB PSS", []).append(float(peers.pss_kib(state["pid"])))
        stockade.ctl("kill", "--all")
    bwrap = [subprocess.Popen([*peers.BWRAP, "--die-with-parent", "sleep", "1000"]) for _ in range(IDLE_AGENTS)]
    time.sleep(0.5)
    for process in bwrap:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        results.setdefault("idle bubblewrap, KiB PSS", []).append(
            float(peers.pss_kib(process.pid) + sum(peers.pss_kib(int(child)) for child in children))
        )
        process.kill()
        process.wait()
    return results


def log_rates(directory: Path, rounds: int) -> Results:
    """The action log, with the disk's own rate of syncs in turns."""
    results: Results = {}
    for number in range(rounds):
        (directory / f"log{number}").mkdir()
        for name, value in action_log.rates(directory / f"log{number}").items():
            results.setdefault(name, []).append(value)
        show_progress(f"action log {number + 1}/{rounds}")
    return results


def show_progress(text: str) -> None:
    if os.environ.get("CI") != "true":
        print(f"\r  {text}          ", end="", file=sys.stderr, flush=True)


def ratios(medians: dict[str, float]) -> dict[str, float]:
    """Give the ratios that the promises are about, and some more."""
    launch = medians["launch RPC to exec"]
    return {
        "launch_vs_bwrap": launch / medians["bubblewrap true"],
        "launch_vs_bwrap_veth": launch / medians["bubblewrap true with a veth"],
        "launch_vs_bwrap_veth_batch": launch / medians["the same by ip -batch"],
        "answer_vs_bwrap": medians["launch RPC to answer"] / medians["bubblewrap true"],
        "launch_vs_crun": launch / medians["crun run true"],
        "run_vs_crun": medians["stockadectl run -- true"] / medians["crun run true"],
        "kill_1000_vs_bare": medians[f"kill of {KILL_MANY} processes"]
        / medians[f"bare cgroup.kill of {KILL_MANY} processes"],
        "squid_vs_worker": medians["squid: requests_per_second"] / medians["worker: requests_per_second"],
    }


def main() -> int:
    """Measure, print a table, and with --check judge."""
    parser = argparse.ArgumentParser(prog="bootstrap bench", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    results: Results = {}
    with tempfile.TemporaryDirectory(prefix="sktest-bench-", dir="/var/tmp") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "kill").mkdir()
        with Instance.start(policies={"crowd.yaml": CROWD_POLICY}, capture=False) as stockade:
            results |= starts(stockade, directory, options.rounds)
            results |= kills(stockade, directory, max(options.rounds // 10, 7))
            results |= memory(stockade)
        results |= egress(directory, max(options.rounds // 10, 3))
        results |= log_rates(directory, max(options.rounds // 10, 3))
    medians = {key: statistics.median(values) for key, values in results.items()}
    show_progress("")
    print(f"\n{'measured (median)':44} {'value':>12}   {'best':>10}")
    for key, values in results.items():
        unit = "" if ":" in key or "KiB" in key else " ms"
        best = max(values) if "per_second" in key else min(values)
        print(f"{key:44} {medians[key]:>12,.2f}{unit:3} {best:>10,.2f}")
    found = ratios(medians)
    print()
    for key, value in found.items():
        print(f"{key:44} {value:>12.2f}")
    if options.json:
        options.json.write_text(json.dumps({"medians": medians, "ratios": found, "all": results}, indent=1))
    broken = [(what, found[key], bound) for key, what, bound in PROMISES if found[key] > bound]
    for what, value, bound in broken:
        print(f"NOT HELD: {what} is {value:.2f}, promised are {bound:.2f} at most")
    print(f"\ncommands: {bin_dir()}; one run on {os.cpu_count()} cores, kernel {os.uname().release}")
    return 1 if options.check and broken else 0


if __name__ == "__main__":
    sys.exit(main())
