"""Verbs on the inventory of agents: registry add, list, show, deprecate, review, running."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from supervisord.ctl.agents import agent_document, degraded, read_file
from supervisord.ctl.command import FAILED, OK, PROGRAM, Usage
from supervisord.ctl.output import (
    amount,
    escape,
    escape_lines,
    moment,
    plain,
    print_facts,
    print_json,
    print_table,
    say,
    size,
)

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping

    from stockade.client.sync import Stockade
    from stockade.client.values import Definition, Grant, RunningAgent

NO_RATE: Final = 1 << 50  # as the daemon says that a rate is not bounded


def registry(stockade: Stockade, options: Namespace) -> int:
    deeds = {
        "add": _add,
        "list": _list,
        "show": _show,
        "deprecate": _deprecate,
        "review": _review,
        "running": _running,
    }
    if options.deed in ("show", "deprecate") and not options.subject:
        raise Usage(f"`registry {options.deed}` needs a definition", f"{PROGRAM} registry --help")
    return deeds[options.deed](stockade, options)


def _add(stockade: Stockade, options: Namespace) -> int:
    if not options.file:
        raise Usage("`registry add` needs a file: -f agent.yaml", f"{PROGRAM} registry --help")
    made = stockade.register(read_file(options.file), options.file)
    if options.output == "json":
        print_json(_document(made))
    else:
        say(f"{made.reference}: registered, {made.digest}")
    return OK


def _list(stockade: Stockade, options: Namespace) -> int:
    found = stockade.definitions(options.subject)
    if options.output == "json":
        print_json([_document(each) for each in found])
        return OK
    head = ("DEFINITION", "OWNER", "CLASS", "POLICY", "MODELS", "STATE", "REGISTERED", "BY", "PURPOSE")
    rows = [
        (
            each.reference,
            each.owner,
            each.risk,
            each.policy,
            ", ".join(each.models or each.reach.models),
            _state(each),
            moment(each.registered_at),
            each.registered_by,
            each.purpose,
        )
        for each in found
    ]
    print_table(head, rows)
    return OK


def _state(definition: Definition) -> str:
    if definition.problem:
        return "unusable"
    return "deprecated" if definition.deprecated else "current"


def _document(definition: Definition) -> dict[str, Any]:
    return {"reference": definition.reference, **plain(definition)}


def _show(stockade: Stockade, options: Namespace) -> int:
    found, content = stockade.definition(options.subject)
    document = _document(found)
    if options.output == "json":
        print_json({**document, "content": content.decode("utf-8", "backslashreplace")})
        return OK
    print_facts(document)
    sys.stdout.write("\n" + escape_lines(content))
    sys.stdout.flush()
    return OK


def _deprecate(stockade: Stockade, options: Namespace) -> int:
    found = stockade.deprecate(options.subject, options.reason)
    if options.output == "json":
        print_json(_document(found))
    else:
        say(f"{found.reference}: deprecated: {found.deprecated}")
    return OK


def _review(stockade: Stockade, options: Namespace) -> int:
    found = stockade.review(options.unused)
    if options.output == "json":
        print_json(found)
    elif found:
        head = ("KIND", "SUBJECT", "OWNER", "DETAIL", "REMEDY")
        print_table(head, [(each.kind, each.subject, each.owner, each.detail, each.remedy) for each in found])
    else:
        say("nothing to look at")
    return FAILED if found and options.strict else OK


def _running(stockade: Stockade, options: Namespace) -> int:
    found = stockade.running()
    if options.output == "json":
        print_json([_running_document(each) for each in found])
        return OK
    for at, each in enumerate(found):
        if at:
            say("")
        _tell(each)
    if not found:
        say("no agent is running")
    return OK


def _running_document(running: RunningAgent) -> dict[str, Any]:
    document = plain(running)
    document["agent"] = agent_document(running.agent)
    return {"name": running.agent.name, "agent_id": running.agent.agent_id, **document}


def _tell(running: RunningAgent) -> None:
    """An agent in a few lines: who it is, what it may do, what bounds it."""
    info = running.agent
    definition = info.definition or "not registered"
    if running.deprecated:
        definition += f" (deprecated: {running.deprecated})"
    say(f"{info.name}  {info.state.value}  {info.agent_id}")
    policy = f"{info.policy} (for {running.policy_risk or 'no class'})"
    print_facts(
        {
            "definition": definition,
            "owner": info.owner,
            "purpose": info.purpose,
            "class": running.risk,
            "contact": running.contact,
            "policy": policy,
            "launched": f"{moment(info.started_at)} by {info.launched_by}",
            "workspace": f"{info.workspace.mode}:{info.workspace.path}" if info.workspace else "",
            "limits": _limits(info.posture),
            "budget left": _left(running),
            "degraded": degraded(info),
        },
        indent=2,
    )
    say("  scopes in force:" if running.grants else "  scopes in force: none")
    for grant in running.grants:
        sys.stdout.write(f"    {escape(_scope(grant))}\n")
    sys.stdout.flush()


def _limits(posture: Mapping[str, object]) -> str:
    limits = posture.get("limits")
    if not isinstance(limits, dict):
        return ""
    shown = []
    for key, value in limits.items():
        if key.endswith("_bytes_per_second"):
            if value < NO_RATE:
                shown.append(f"{key.removesuffix('_bytes_per_second')} {size(int(value))}/s")
        elif key.endswith("_bytes"):
            shown.append(f"{key.removesuffix('_bytes')} {size(int(value))}")
        else:
            shown.append(f"{key} {value}")
    return ", ".join(sorted(shown))


def _left(running: RunningAgent) -> str:
    if not running.budget:
        return "no budget"
    return ", ".join(
        f"{key} {amount(key, running.budget_left.get(key, 0))} of {amount(key, most)}"
        for key, most in running.budget.items()
    )


def _scope(grant: Grant) -> str:
    until = f", until {moment(grant.expires_at)}" if grant.expires_at else ""
    uses = f", {grant.uses_left} uses left" if grant.uses_left is not None else ""
    return f"{grant.scope}  by {grant.granted_by}{until}{uses}, used {grant.uses} times"
