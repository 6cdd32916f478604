"""`stockadectl report`: a period's evidence out of the action log, as one JSON file and one HTML file."""

from __future__ import annotations

import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stockade.client import convert, methods
from stockade.v1 import actions_pb2, system_pb2

from supervisord.ctl.command import OK, Usage
from supervisord.ctl.dossier import Dossier, attention, period
from supervisord.ctl.dossier_html import page
from supervisord.ctl.output import plain, print_json, say
from supervisord.ctl.words import moment

if TYPE_CHECKING:
    from argparse import Namespace

    from stockade.client.sync import Stockade

FORMAT: Final = 1
TOP_MAX: Final = 1000


def report(stockade: Stockade, options: Namespace) -> int:
    now = datetime.now(UTC)
    since = moment(options.since, now)
    until = moment(options.until, now) if options.until else now
    if since >= until:
        raise Usage("the period is empty: --since is not before --until", "stockadectl report --help")
    if not 1 <= options.top <= TOP_MAX:
        raise Usage(f"--top is not from 1 to {TOP_MAX}", "stockadectl report --help")
    document = collect(stockade, since, until, top=options.top, now=now)
    written = {
        "html": write(Path(options.out), "report.html", page(document)),
        "json": write(Path(options.out), "report.json", json.dumps(document, indent=1) + "\n"),
    }
    if options.output == "json":
        print_json({**written, "summary": document["summary"], "attention": document["attention"]})
    else:
        say(f"{document['summary']['entries']} entries: {written['html']}, {written['json']}")
    return OK


def collect(stockade: Stockade, since: datetime, until: datetime, *, top: int, now: datetime) -> dict[str, Any]:
    """Everything that the report says, as JSON has it; reads the log a page at a time."""
    dossier = Dossier(running_before=_ran_before(stockade, since))
    for action in stockade.actions(since=since, until=until):
        dossier.feed(action)
    for agent_id in dossier.unnamed():
        for launched in stockade.actions(agent_id, verb="agent.launch"):
            dossier.name(launched)
            break
    version = convert.version(stockade.call(methods.VERSION, system_pb2.VersionRequest()))
    found = dossier.document(top)
    return {
        "format": FORMAT,
        "instance": version.instance,
        "stockade": version.version,
        "made_at": plain(now),
        "period": period(since, until),
        "attention": attention(found["summary"]),
        **found,
        "definitions": [{"reference": each.reference, **plain(each)} for each in stockade.definitions()],
        "log": _evidence(stockade, dossier),
    }


def _ran_before(stockade: Stockade, since: datetime) -> bool:
    """Whether the daemon's last start before the period was followed by no stop."""
    running = False
    for action in stockade.actions(verb="daemon.", until=since):
        if action.verb in ("daemon.start", "daemon.stop"):
            running = action.verb == "daemon.start"
    return running


def _evidence(stockade: Stockade, dossier: Dossier) -> dict[str, Any]:
    """A signed root, and proofs that tie the period's entries to it and to what was there before."""
    last = dossier.last_seq or 1
    proof = convert.proof(stockade.call(methods.PROVE, actions_pb2.ProveRequest(seq=last)))
    _, size, root = proof.checkpoint.split("\n")[:3]
    evidence: dict[str, Any] = {
        "first_seq": dossier.first_seq,
        "last_seq": dossier.last_seq,
        "size": int(size),
        "root": root,
        "checkpoint": proof.checkpoint,
        "last_entry": {"leaf_index": proof.leaf_index, "audit_path": plain(proof.audit_path)},
        "before_to_end": None,
        "end_to_checkpoint": plain(stockade.prove_consistency(last, int(size))),
    }
    if dossier.first_seq > 1:
        evidence["before_to_end"] = plain(stockade.prove_consistency(dossier.first_seq - 1, last))
    return evidence


def write(directory: Path, name: str, text: str) -> str:
    """The path of the file, which is there as a whole or not at all; readable by its owner: it names people."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=directory, prefix=f".{name}-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            Path(scratch).replace(directory / name)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise Usage(f"cannot write {directory / name}: {error.strerror}") from error
    return str(directory / name)
