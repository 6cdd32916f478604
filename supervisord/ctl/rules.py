"""Verbs on what agents may do and did: grant, revoke, grants, requests, actions."""

from __future__ import annotations

import sys
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain, islice
from typing import TYPE_CHECKING, Final

from stockade.client.values import Grant

from supervisord.ctl.command import OK, Usage
from supervisord.ctl.output import (
    CELL_CHARACTERS_MAX,
    escape,
    moment,
    print_json,
    print_table,
    say,
    text,
)
from supervisord.ctl.words import moment as parse_moment

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Iterable, Sequence

    from stockade.client.sync import Stockade
    from stockade.client.values import Action, Request, Terms


def grant(stockade: Stockade, options: Namespace) -> int:
    made = stockade.grant(options.subject, options.scope, **_terms(options))
    show_grant(made, options)
    return OK


def _terms(options: Namespace) -> Terms:
    return {
        "ttl": options.ttl,
        "max_uses": options.max_uses,
        "max_bytes": options.max_bytes,
        "max_cost_usd": options.max_cost,
        "reason": options.reason,
        "ticket": options.ticket,
    }


def revoke(stockade: Stockade, options: Namespace) -> int:
    show_grant(stockade.revoke(options.subject, options.reason), options)
    return OK


def grants(stockade: Stockade, options: Namespace) -> int:
    found = stockade.grants(options.subject, include_ended=options.ended)
    if options.output == "json":
        print_json(found)
        return OK
    head = (
        "GRANT",
        "AGENT",
        "SCOPE",
        "STATE",
        "EXPIRES",
        "USES LEFT",
        "USED",
        "BYTES LEFT",
        "USD LEFT",
        "BY",
        "REASON",
        "TICKET",
    )
    print_table(head, [_grant_row(item) for item in found])
    return OK


def show_grant(item: Grant, options: Namespace) -> None:
    if options.output == "json":
        print_json(item)
        return
    until = f" until {moment(item.expires_at)}" if item.expires_at else ""
    uses = f", {item.uses_left} uses left" if item.uses_left is not None else ""
    say(f"{item.grant_id}: {item.state.lower()} for {item.agent_name or item.agent_id}: {item.scope}{until}{uses}")
    if item.warning:
        say(f"warning: {item.warning}")


def _grant_row(item: Grant) -> tuple[str | None, ...]:
    return (
        item.grant_id,
        item.agent_name,
        item.scope,
        item.state,
        moment(item.expires_at),
        text(item.uses_left),
        text(item.uses),
        text(item.bytes_left),
        text(item.cost_usd_left),
        item.granted_by,
        item.reason,
        item.ticket or None,
    )


def requests(stockade: Stockade, options: Namespace) -> int:
    if options.deed in ("approve", "deny") and not options.subject:
        raise Usage(f"`requests {options.deed}` needs the ID of a request", "stockadectl requests --help")
    match options.deed:
        case "approve":
            _approve(stockade, options)
        case "deny":
            denied = stockade.deny(options.subject, options.reason)
            if options.output == "json":
                print_json(denied)
            else:
                say(f"{denied.request_id}: denied to {denied.agent_name}: {denied.scope}")
        case "watch":
            _watch(stockade, options)
        case _:
            found = stockade.requests(options.subject, include_decided=options.decided)
            if options.output == "json":
                print_json(found)
                return OK
            print_table(_REQUEST_HEAD, [_request_row(item) for item in found])
    return OK


_REQUEST_HEAD: Final = ("REQUEST", "AGENT", "SCOPE", "STATE", "APPROVED", "ASKED", "REASON (the agent's words)")


def _request_row(item: Request) -> tuple[str | None, ...]:
    approved = f"{len(item.approved_by)} of {item.approvers}"
    return (item.request_id, item.agent_name, item.scope, item.state, approved, moment(item.asked_at), item.reason)


def _approve(stockade: Stockade, options: Namespace) -> None:
    """Approve what is shown here, or what `--digest` says was shown before."""
    if options.once and options.max_uses not in (None, 1):
        raise Usage("--once and --max-uses say two things", "stockadectl requests --help")
    digest = options.digest
    if not digest:
        shown = [item for item in stockade.requests(include_decided=True) if item.request_id == options.subject]
        digest = shown[0].digest if shown else ""
        if shown and options.output != "json":
            print_table(_REQUEST_HEAD, [_request_row(item) for item in shown])
    terms = _terms(options)
    if options.once:
        terms["max_uses"] = 1
    made = stockade.approve(options.subject, scope=options.scope, digest=digest, **terms)
    if isinstance(made, Grant):
        show_grant(made, options)
    elif options.output == "json":
        print_json(made)
    else:
        say(
            f"{made.request_id}: approved by {len(made.approved_by)} of {made.approvers}; others have to approve it too"
        )


def _watch(stockade: Stockade, options: Namespace) -> None:
    """A line a change, until interrupted; as JSON each has the token that `--after` goes on from."""
    for item, token in stockade.watch_requests(options.resume_token):
        if options.subject and options.subject not in (item.agent_id, item.agent_name):
            continue
        if options.output == "json":
            print_json({**asdict(item), "resume_token": token})
        else:
            cells = [escape(cell or "-", characters_max=CELL_CHARACTERS_MAX) for cell in _request_row(item)]
            sys.stdout.write("  ".join(cells) + "\n")
        sys.stdout.flush()


def actions(stockade: Stockade, options: Namespace) -> int:
    if options.follow and options.until:
        raise Usage("-f has no end, and --until is one: give one of them", "stockadectl actions --help")
    since = parse_moment(options.since, datetime.now(UTC)) if options.since else None
    until = parse_moment(options.until, datetime.now(UTC)) if options.until else None
    entries = stockade.actions(
        options.subject,
        verb=options.wanted_verb,
        verdict=options.verdict,
        since=since,
        until=until,
        labels=dict(options.labels),
        after_seq=options.after_seq,
        follow=options.follow,
    )
    show_actions(entries, as_json=options.output == "json")
    return OK


def show_actions(entries: Iterable[Action], *, as_json: bool) -> None:
    """A line an entry, as they come."""
    if as_json:
        for entry in entries:
            print_json(entry)
        return
    rest = iter(entries)
    first = list(islice(rest, 1))  # before the head, so that no answer has none
    say(_line(("SEQ", "TIME", "VERDICT", "VERB", "OBJECT", "ACTOR", "AGENT", "REASON")))
    for entry in chain(first, rest):
        cells = (
            str(entry.seq),
            moment(entry.time) or "-",
            entry.verdict,
            entry.verb,
            entry.object or "-",
            entry.actor,
            entry.agent_id or "-",
            entry.reason,
        )
        sys.stdout.write(_line([escape(cell, characters_max=CELL_CHARACTERS_MAX) for cell in cells]) + "\n")
        sys.stdout.flush()


def _line(cells: Sequence[str]) -> str:
    # A stream has no last line to measure columns by: widths that suit most, and more where needed.
    widths = (6, 20, 7, 15, 40, 12, 29, 0)
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
