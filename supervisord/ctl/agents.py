"""Verbs on agents as wholes: launch, status, inspect, wait, top, kill, freeze, thaw, hold, release, holds."""

from __future__ import annotations

import math
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stockade.client.errors import NotFound
from stockade.client.values import AgentInfo, Selector

from supervisord.ctl.command import FAILED, OK, Usage
from supervisord.ctl.launching import launch_options
from supervisord.ctl.output import (
    amount,
    complain,
    escape,
    moment,
    plain,
    print_facts,
    print_json,
    print_table,
    say,
    size,
    text,
)

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from stockade.client.sync import Stockade
    from stockade.client.values import BudgetUse, Hold

DEFINITION_BYTES_MAX: Final = 1 << 20
CLEAR_SCREEN: Final = "\x1b[H\x1b[2J"
SPENT: Final = ("TOKENS", "COST", "BUDGET")


def launch(stockade: Stockade, options: Namespace) -> int:
    if not options.command and not options.file and "registered" not in options:
        raise Usage(
            "there is nothing to launch: give a command after --, a file with -f or a definition with --agent",
            "stockadectl launch --help",
        )
    if options.file and "registered" in options:
        raise Usage("-f and --agent each name what to launch: give one", "stockadectl launch --help")
    wanted = launch_options(options)
    if options.file:
        wanted["definition"] = read_file(options.file)
        wanted["definition_path"] = options.file
    if options.dry_run:
        return show_plan(stockade.plan(options.command, **wanted), options)
    agent = stockade.launch(options.command, **wanted)
    if options.wait:
        agent.wait()
    if options.output == "json":
        print_json(agent_document(agent.info))
    else:
        say(agent.agent_id)
    return OK


def show_plan(plan: str, options: Namespace) -> int:
    if options.output == "json":
        print_json({"plan": plan.splitlines()})
    else:
        for line in plan.splitlines():
            say(line)
    return OK


def read_file(name: str) -> bytes:
    """The file's bytes (`-` is stdin); raises Usage where it cannot be read or is too long to be meant."""
    try:
        if name == "-":
            content = sys.stdin.buffer.read(DEFINITION_BYTES_MAX + 1)
        else:
            with Path(name).open("rb") as file:
                content = file.read(DEFINITION_BYTES_MAX + 1)
    except OSError as error:
        raise Usage(f"cannot read {name}: {error.strerror}") from error
    if len(content) > DEFINITION_BYTES_MAX:
        raise Usage(f"cannot read {name}: it is longer than {DEFINITION_BYTES_MAX} bytes")
    return content


def agent_document(info: AgentInfo) -> dict[str, Any]:
    """The agent in JSON: all of its fields; its command as text, which is what people wrote."""
    document: dict[str, Any] = plain(info)
    document["degraded"] = degraded(info)
    if not document["effective"]:
        del document["effective"]
    document["command"] = [argument.decode("utf-8", "backslashreplace") for argument in info.command]
    return document


def degraded(info: AgentInfo) -> list[str]:
    """The names of the controls that the agent does without."""
    listed = info.posture.get("degraded")
    return [str(item).partition(":")[0] for item in listed] if isinstance(listed, list) else []


def status(stockade: Stockade, options: Namespace) -> int:
    selector = Selector(agents=tuple(options.subject)) if options.subject else None
    found = [agent.info for agent in stockade.agents(selector, include_ended=not options.live)]
    show_agents(found, options)
    return OK


def show_agents(found: Sequence[AgentInfo], options: Namespace) -> None:
    if options.output == "json":
        print_json([{k: v for k, v in agent_document(info).items() if k != "counters"} for info in found])
        return
    head = ("NAME", "STATE", "POLICY", "EXIT", "STARTED", "MEMORY", "PIDS", "DEFINITION", "AGENT_ID", "DEGRADED")
    if "wide" in options and options.wide:
        print_table((*head, "CPU", *SPENT), [(*agent_row(info), cpu_time(info), *spent_row(info)) for info in found])
    else:
        print_table(head, [agent_row(info) for info in found])


def how_it_ended(info: AgentInfo) -> str | None:
    return text(info.exit_code) if info.exit_signal is None else f"signal {info.exit_signal}"


def agent_row(info: AgentInfo) -> tuple[str | None, ...]:
    return (
        info.name,
        info.state.value,
        info.policy,
        how_it_ended(info),
        moment(info.started_at),
        size(info.memory_bytes),
        text(info.pids),
        info.definition,
        info.agent_id,
        ", ".join(degraded(info)),
    )


def inspect(stockade: Stockade, options: Namespace) -> int:
    document = agent_document(stockade.agent(options.subject, examine=True).info)
    effective = document.get("effective", {})
    if options.output == "json":
        print_json(document)
    else:
        print_facts({**document, "command": shlex.join(document["command"])})
    for item in effective.get("drift", ()):
        complain(f"stockadectl: {options.subject} is not confined as planned: {item}")
    if "unreadable" in effective:
        complain(f"stockadectl: cannot read what is in force for {options.subject}: {effective['unreadable']}")
    return OK


def wait(stockade: Stockade, options: Namespace) -> int:
    agent = stockade.agent(options.subject)
    try:
        agent.wait(options.timeout)
    except TimeoutError as error:
        complain(f"stockadectl: cannot wait {options.subject}: {error}")
        return FAILED
    if options.output == "json":
        print_json(agent_document(agent.info))
    else:
        say(how_it_ended(agent.info) or agent.state.value)
    return OK


def top(stockade: Stockade, options: Namespace) -> int:
    """The live agents by what they use; on a terminal again and again, elsewhere once unless told how often."""
    on_terminal = sys.stdout.isatty() and options.output == "table"
    times = (0 if on_terminal else 1) if options.count is None else options.count
    shown, before, began = 0, dict[str, float](), time.monotonic()
    while True:
        found = sorted((agent.info for agent in stockade.agents()), key=lambda info: -(info.memory_bytes or 0))
        now = time.monotonic()
        if on_terminal:
            sys.stdout.write(CLEAR_SCREEN)
        if options.output == "json":
            show_agents(found, options)
        else:
            rows = [top_row(info, before.get(info.agent_id), now - began) for info in found]
            print_table(("NAME", "STATE", "CPU%", "CPU", "MEMORY", *SPENT), rows)
        before, began = {info.agent_id: info.cpu_seconds or 0.0 for info in found}, now
        shown += 1
        if times and shown >= times:
            return OK
        time.sleep(options.delay)


def top_row(info: AgentInfo, cpu_before: float | None, seconds: float) -> tuple[str | None, ...]:
    """One line; the share of a CPU is that of the time since the line before, so the first has none."""
    share = None
    if cpu_before is not None and info.cpu_seconds is not None and seconds > 0:
        share = f"{max(info.cpu_seconds - cpu_before, 0.0) / seconds * 100:.0f}%"
    return (info.name, info.state.value, share, cpu_time(info), size(info.memory_bytes), *spent_row(info))


def cpu_time(info: AgentInfo) -> str | None:
    return None if info.cpu_seconds is None else f"{info.cpu_seconds:.1f}s"


def spent_row(info: AgentInfo) -> tuple[str | None, ...]:
    """Tokens, cost (`~` where it is partly from a price table) and the bound that is nearest to its end."""
    spend = info.spend
    cost = f"{'~' if spend.estimated else ''}${spend.cost_usd:.4f}"
    return (str(spend.input_tokens + spend.output_tokens), cost, nearest_bound(info.budget))


def nearest_bound(uses: Sequence[BudgetUse]) -> str | None:
    """`85% requests` of the bound of which most is spent; None where nothing bounds the agent."""
    if not uses:
        return None
    use = max(uses, key=_spent_part)
    return f"{part(use)} {use.bound}" + (f" of {use.label}" if use.label else "")


def part(use: BudgetUse) -> str:
    """How much of a bound is spent; 100% is said of nothing less."""
    return f"{math.floor(_spent_part(use) * 100)}%"


def _spent_part(use: BudgetUse) -> float:
    return use.spent / use.limit if use.limit else 1.0


def selected(options: Namespace) -> Selector:
    """Whom the command line means; raises Usage where it means nobody."""
    if not (options.subject or options.labels or options.policy or options.owner or options.all):
        raise Usage(
            "nobody is selected: give names, --label, --policy, --owner or --all", f"stockadectl {options.verb} --help"
        )
    return Selector(
        agents=tuple(options.subject),
        labels=dict(options.labels),
        policy=options.policy,
        owner=options.owner,
        all=options.all,
    )


def kill(stockade: Stockade, options: Namespace) -> int:
    if options.stream:
        return _kill_exec(stockade, options)
    receipts = stockade.kill_all(selected(options), sayable(options.reason))
    if options.output == "json":
        print_json(receipts)
    else:
        head = ("NAME", "EMPTY", "PROCESSES", "EGRESS CUT", "DEAD", "AGENT_ID", "RECEIPT")
        rows = [
            (
                receipt.name,
                "verified" if receipt.verified_empty else "NO",
                text(receipt.processes_killed),
                f"{receipt.egress_cut_ms:.1f} ms",
                f"{receipt.dead_ms:.1f} ms",
                receipt.agent_id,
                receipt.receipt_id,
            )
            for receipt in receipts
        ]
        print_table(head, rows)
    survivors = [receipt for receipt in receipts if not receipt.verified_empty]
    for receipt in survivors:
        left = list(receipt.left_pids)
        what = f"processes {left} are still there" if left else "nobody can say yet that nothing of it is left"
        complain(f"stockadectl: cannot kill {receipt.name}: {what}")
    return FAILED if survivors else OK


def sayable(reason: str) -> str:
    """The reason as a message can carry it: nobody lives on for a byte in it that is no text."""
    return reason.encode("utf-8", "replace").decode()


def _kill_exec(stockade: Stockade, options: Namespace) -> int:
    if len(options.subject) != 1 or options.labels or options.policy or options.owner or options.all:
        raise Usage("an exec is one agent's: give its name, and no selection", "stockadectl kill NAME --exec STREAM")
    killed = stockade.agent(options.subject[0]).kill_exec(options.stream, sayable(options.reason))
    if options.output == "json":
        print_json(killed)
    else:
        left = "none is left" if killed.verified_empty else "NOT empty"
        say(f"{options.stream}: {killed.processes_killed} processes, {left}")
    return OK if killed.verified_empty else FAILED


def renew(stockade: Stockade, options: Namespace) -> int:
    show_agents([stockade.agent(options.subject).renew().info], options)
    return OK


def freeze(stockade: Stockade, options: Namespace) -> int:
    show_agents(stockade.freeze_all(selected(options), sayable(options.reason)), options)
    return OK


def thaw(stockade: Stockade, options: Namespace) -> int:
    show_agents(stockade.thaw_all(selected(options), options.reason), options)
    return OK


def hold(stockade: Stockade, options: Namespace) -> int:
    made = stockade.hold(
        name=options.subject,
        label=options.label,
        policy=options.policy,
        rootfs_digest=options.rootfs_digest,
        reason=options.reason,
        ticket=options.ticket,
    )
    show_holds([made], options, one=True)
    return OK


def release(stockade: Stockade, options: Namespace) -> int:
    released = [stockade.release(hold_id, options.reason) for hold_id in _meant(stockade, options)]
    show_holds(released, options, one=len(released) == 1)
    return OK


def _meant(stockade: Stockade, options: Namespace) -> list[str]:
    """The holds that are to be released: one by its id, or all that hold a name, label, policy or image."""
    wanted = {"label": options.label, "policy": options.policy, "rootfs_digest": options.rootfs_digest}
    kind, value = next(((kind, value) for kind, value in wanted.items() if value), ("name", options.subject))
    found = [each.hold_id for each in stockade.holds() if (each.kind, each.value) == (kind, value)]
    if kind == "name":
        return found or [value]  # an id, or what the daemon then says is not there
    if not found:
        raise NotFound(f"cannot find a hold on {kind} {value}: there is none", remedy="see `stockadectl holds`")
    return found


def holds(stockade: Stockade, options: Namespace) -> int:
    show_holds(stockade.holds(), options)
    return OK


def budgets(stockade: Stockade, options: Namespace) -> int:
    found = stockade.budgets()
    if options.output == "json":
        print_json(found)
        return OK
    head = ("LABEL", "SINCE", "BOUND", "SPENT", "UNDER WAY", "LIMIT", "USED")
    rows = [
        (
            use.label,
            use.since,
            use.bound,
            *(amount(use.bound, of) for of in (use.spent, use.reserved, use.limit)),
            part(use),
        )
        for use in found
    ]
    print_table(head, rows)
    return OK


def show_holds(found: Sequence[Hold], options: Namespace, *, one: bool = False) -> None:
    if options.output == "json":
        print_json(found[0] if one else found)
    elif one:
        say(f"{found[0].hold_id}: {found[0].kind} {escape(found[0].value)}")
    else:
        head = ("HOLD", "KIND", "VALUE", "BY", "SINCE", "TICKET", "REASON")
        rows = [(h.hold_id, h.kind, h.value, h.held_by, moment(h.held_at), h.ticket, h.reason) for h in found]
        print_table(head, rows)
