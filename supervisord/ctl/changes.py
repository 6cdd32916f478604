"""Verbs on what agents changed in overlay workspaces: diff, apply, discard."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from supervisord.ctl.command import CONFLICT, FAILED, OK
from supervisord.ctl.output import escape_lines, print_json, print_table, say, size

if TYPE_CHECKING:
    from argparse import Namespace

    from stockade.client.sync import Stockade
    from stockade.client.values import Change, Changes


def diff(stockade: Stockade, options: Namespace) -> int:
    found = stockade.diff(options.subject, options.paths, patch=options.patch)
    if options.output == "json":
        print_json(found)
        return OK
    if options.patch:
        for change in found.changes:
            _show_patch(change)
    else:
        _table(found, ("", "TYPE", "SIZE", "PATH", "NOTE"), _row)
    if found.changes:
        say(f"{len(found.changes)} changes of {found.agent_name} in {found.workspace}, {found.digest}")
    else:
        say(f"{found.agent_name} changed nothing in {found.workspace}")
    return OK


def apply(stockade: Stockade, options: Namespace) -> int:
    done = stockade.apply(
        options.subject, options.paths, force=options.force, digest=options.digest, reason=options.reason
    )
    outcomes = [change.outcome for change in done.changes]
    if options.output == "json":
        print_json(done)
    else:
        _table(done, ("", "TYPE", "SIZE", "PATH", "OUTCOME"), _outcome_row)
        kept = "; the rest is kept" if done.kept else "; nothing is left to decide"
        say(f"{outcomes.count('applied')} of {len(outcomes)} applied to {done.workspace}{kept}")
    if "conflict" in outcomes:
        return CONFLICT
    return OK if all(outcome == "applied" for outcome in outcomes) else FAILED


def discard(stockade: Stockade, options: Namespace) -> int:
    stockade.discard(options.subject, options.reason)
    if options.output == "json":
        print_json({"agent": options.subject, "discarded": True})
    else:
        say(f"what {options.subject} changed is discarded")
    return OK


def _table(found: Changes, head: tuple[str, ...], row: object) -> None:
    if found.changes and callable(row):
        print_table(head, [row(change) for change in found.changes])


_LETTERS = {"added": "A", "modified": "M", "deleted": "D"}


def _row(change: Change) -> tuple[str | None, ...]:
    notes = [note for note in (change.refused, change.conflict, *change.notes) if note]
    return (*_start(change), "; ".join(notes))


def _outcome_row(change: Change) -> tuple[str | None, ...]:
    return (*_start(change), f"{change.outcome}: {change.why}" if change.why else change.outcome)


def _start(change: Change) -> tuple[str | None, ...]:
    path = f"{change.path} -> {change.link}" if change.link else change.path
    return (_LETTERS.get(change.kind, "?"), change.type, size(change.size_bytes) if change.type == "file" else "", path)


def _show_patch(change: Change) -> None:
    """A patch as it is for a program, escaped for a terminal: it is the agent's text."""
    if not change.patch:
        say(f"{_LETTERS.get(change.kind, '?')} {change.type} {_start(change)[3]}")
    elif sys.stdout.isatty():
        sys.stdout.write(escape_lines(change.patch))
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(change.patch)
        sys.stdout.buffer.flush()
