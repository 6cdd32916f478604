"""The report as one HTML page (pure): no script, nothing from elsewhere, and every text escaped.

Agents choose many of these texts. What is not printable is shown as an escape, and the rest is text and never markup;
the page forbids itself scripts and loads besides, in case that is ever wrong.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any, Final

from supervisord.ctl.output import escape, size

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Row = Mapping[str, Any]
    Column = tuple[str, Callable[[Row], object]]

CELL_CHARACTERS_MAX: Final = 600
STYLE: Final = """
:root { color-scheme: light; --line: #d5d9e0; --soft: #f4f6f9; --dim: #5b6472; --ink: #1b2330; --warn: #8a3b00; }
* { box-sizing: border-box; }
body { font: 14px/1.45 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); background: #fff; margin: 0 auto;
  max-width: 1280px; padding: 28px 32px 60px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 34px 0 8px; border-bottom: 2px solid var(--ink);
  padding-bottom: 3px; } h3 { font-size: 14px; margin: 18px 0 6px; }
p { margin: 4px 0 8px; } .dim { color: var(--dim); }
nav { margin: 10px 0 4px; } nav a { color: #24518f; margin-right: 14px; text-decoration: none; }
.tiles { display: grid; grid-template-columns: repeat(6, 1fr); gap: 10px; margin: 16px 0; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: 9px 12px; background: var(--soft); }
.tile b { display: block; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { font-weight: 600; } .tile small { color: var(--dim); display: block; }
.attention { border-left: 4px solid #d98324; background: #fff7ec; padding: 8px 14px; margin: 12px 0; }
.attention.calm { border-color: #3d8b5f; background: #effaf3; } .attention ul { margin: 4px 0; padding-left: 20px; }
table { border-collapse: collapse; width: 100%; margin: 6px 0 4px; font-size: 12.5px; }
th { text-align: left; background: var(--soft); border-bottom: 1px solid #aab2bf; padding: 5px 8px; font-weight: 600;
  white-space: nowrap; } td { padding: 4px 8px; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.t { white-space: nowrap; } td.m, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 11.5px; }
td { min-width: 44px; } td.a { min-width: 100px; } td.s { min-width: 84px; } td.m { min-width: 150px; }
td.v { white-space: nowrap; font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 11.5px; }
td.w { color: var(--warn); font-weight: 600; }
pre { background: var(--soft); border: 1px solid var(--line); padding: 9px 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 6px 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 26px; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } nav { display: none; } h2 { break-after: avoid; }
  table { font-size: 9.5px; } thead { display: table-header-group; } tr { break-inside: avoid; }
  .tile, .attention, th, pre { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
@page { size: A4 landscape; margin: 14mm; }
@media (max-width: 800px) { .tiles { grid-template-columns: repeat(2, 1fr); } .pair { grid-template-columns: 1fr; } }
"""


def page(document: Mapping[str, Any]) -> str:
    """The whole page, of the document that the JSON file holds."""
    between = document["period"]
    title = f"Stockade report: {_time(between['since'])} to {_time(between['until'])}"
    parts = (
        _head(document, title),
        _agents(document),
        _definitions(document),
        _scopes(document),
        _egress(document),
        _kills(document),
        _spend(document),
        _limits(document),
        _changes(document),
        _log(document),
    )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _head(document: Mapping[str, Any], title: str) -> str:
    summary = document["summary"]
    tiles = (
        ("Agents launched", summary["launched"], f"{summary['unregistered']} by no definition"),
        (
            "Agents ended",
            summary["exited"] + summary["failed"] + summary["killed"],
            f"{summary['exited']} by themselves, {summary['killed']} killed, {summary['failed']} never ran",
        ),
        ("Kills", summary["kills"], f"{summary['kills'] - summary['kills_unverified']} with proof of death"),
        ("Scopes granted", summary["granted"], f"{summary['revoked']} taken back, {summary['expired']} expired"),
        (
            "Asked of people",
            summary["requests_asked"],
            f"{summary['requests_approved']} approved, {summary['requests_denied']} denied",
        ),
        ("Egress denied", summary["denied"], f"{summary['allowed']} allowed"),
        ("Spent", f"${summary['cost_usd']:.2f}", f"{summary['calls']} model calls"),
        (
            "Tokens",
            summary["input_tokens"] + summary["output_tokens"],
            f"{summary['input_tokens']} in, {summary['output_tokens']} out",
        ),
        ("Bytes out", size(summary["bytes_up"]), f"{size(summary['bytes_down'])} in"),
        ("Limits met", summary["limit_events"], f"{summary['degraded']} launches degraded"),
        ("Daemon crashes", summary["crashes"], "starts after no stop"),
        ("Log entries", summary["entries"], f"{document['log']['size']} in all"),
    )
    shown = "".join(
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(name)}</span><small>{_text(note)}</small></div>'
        for name, value, note in tiles
    )
    links = (
        ("agents", "Agents"), ("definitions", "Definitions"), ("scopes", "Scopes and requests"), ("egress", "Egress"),
        ("kills", "Kills"), ("spend", "Spend"), ("limits", "Limits"), ("changes", "Changes and daemon"),
        ("log", "Log and proof"),
    )  # fmt: skip
    nav = "".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in links)
    points = document["attention"]
    if points:
        listed = "".join(f"<li>{_text(point)}</li>" for point in points)
        box = f'<div class="attention"><strong>To look at</strong><ul>{listed}</ul></div>'
    else:
        box = '<div class="attention calm">Nothing in this period asks for a closer look.</div>'
    made = f"Instance {document['instance']}, made {_time(document['made_at'])} by Stockade {document['stockade']}."
    claim = "Every figure is counted from the action log; its signed root and the proofs are at the end."
    return (
        f'<h1>{_text(title)}</h1><p class="dim">{_text(made)} {claim}</p><nav>{nav}</nav>\n'
        f'<div class="tiles">{shown}</div>{box}'
    )


def _agents(document: Mapping[str, Any]) -> str:
    columns: tuple[Column, ...] = (
        ("Agent.a", lambda r: r["name"] or r["agent_id"]),
        ("Definition.s", lambda r: r["definition"] or "none"),
        ("Owner.s", lambda r: r["owner"]),
        ("Policy.s", lambda r: r["policy"]),
        ("Launched.t", lambda r: _time(r["launched_at"]) if r["launched_at"] else "before"),
        ("By.s", lambda r: r["launched_by"]),
        ("Ended.t", lambda r: _time(r["ended_at"]) if r["ended_at"] else "still there"),
        ("How.s", lambda r: f"{r['end']}: {r['how']}" if r["how"] else r["end"]),
        ("Allowed.n", lambda r: r["allowed"]),
        ("Denied.n", lambda r: r["denied"]),
        ("Cost.n", lambda r: f"${r['spend']['cost_usd']:.2f}"),
        ("Degraded", lambda r: "; ".join(r["degraded"])),
    )
    purposes: tuple[Column, ...] = (
        ("Agent.a", lambda r: r["name"] or r["agent_id"]),
        ("Id.v", lambda r: r["agent_id"]),
        ("Purpose", lambda r: r["purpose"]),
        ("Labels", lambda r: ", ".join(f"{key}={value}" for key, value in r["labels"].items())),
        ("Scopes at launch.m", lambda r: " · ".join(r["scopes"])),
    )
    return _section("agents", "Agents", _table(document["agents"], columns)) + _sub(
        "What they were for", _table(document["agents"], purposes)
    )


def _definitions(document: Mapping[str, Any]) -> str:
    columns: tuple[Column, ...] = (
        ("Definition.a", lambda r: r["reference"]),
        ("Owner.s", lambda r: r["owner"]),
        ("Contact", lambda r: r["contact"]),
        ("Purpose", lambda r: r["purpose"]),
        ("Class.s", lambda r: r["risk"] or "none said"),
        ("Policy.s", lambda r: r["policy"]),
        ("Models", lambda r: ", ".join(r["models"] or r["reach"]["models"])),
        ("Data", lambda r: ", ".join(r["data"])),
        ("May reach.m", lambda r: " · ".join((*r["reach"]["files"], *r["reach"]["hosts"], *r["reach"]["tools"]))),
        ("State.s", lambda r: f"deprecated: {r['deprecated']}" if r["deprecated"] else "current"),
    )
    rows = {"rows": document["definitions"], "left_out": 0}
    return _section("definitions", "Definitions in the registry", _table(rows, columns), "As of when this was made.")


def _scopes(document: Mapping[str, Any]) -> str:
    grants: tuple[Column, ...] = (
        ("Time.t", lambda r: _time(r["time"])),
        ("Agent.a", lambda r: r["agent"]),
        ("Scope.m", lambda r: r["scope"]),
        ("Granted by.s", lambda r: r["by"]),
        ("For.s", _terms),
        ("Reason", lambda r: f"{r['reason']} ({r['ticket']})" if r["ticket"] else r["reason"]),
        ("Ended.s", lambda r: f"{_time(r['ended_at'])} {r['ended']}" if r["ended_at"] else ""),
    )
    requests: tuple[Column, ...] = (
        ("Time.t", lambda r: _time(r["time"])),
        ("Agent.a", lambda r: r["agent"]),
        ("Deed.s", lambda r: r["deed"]),
        ("By.s", lambda r: r["by"]),
        ("Scope.m", lambda r: r["scope"]),
        ("Reason", lambda r: r["reason"]),
    )
    note = "Granted to agents that ran; what a policy or a launch gave is with the agent above."
    return _section("scopes", "Scopes granted", _table(document["grants"], grants), note) + _sub(
        "Asked of people, approved and denied", _table(document["requests"], requests)
    )


def _terms(row: Row) -> str:
    terms = [f"{row['ttl_seconds']:g} s"] if row["ttl_seconds"] else []
    terms += [f"{row['max_uses']} uses"] if row["max_uses"] else []
    return ", ".join(terms) or "the agent's life"


def _egress(document: Mapping[str, Any]) -> str:
    egress = document["egress"]

    def tally(name: str, key: str) -> tuple[Column, ...]:
        return ((f"{name}.m", lambda r: r[key]), ("Requests.n", lambda r: r["times"]))

    allowed = _sub("Allowed, by host", _table(egress["allowed_by_host"], tally("Host", "host")))
    denied = _sub("Denied, by host", _table(egress["denied_by_host"], tally("Host", "host")))
    why = _sub("Denied, by reason", _table(egress["denied_by_reason"], tally("Reason", "reason")))
    return _section("egress", "Egress", f'<div class="pair"><div>{denied}{why}</div><div>{allowed}</div></div>')


def _kills(document: Mapping[str, Any]) -> str:
    columns: tuple[Column, ...] = (
        ("Time.t", lambda r: _time(r["time"])),
        ("Agent.a", lambda r: r["agent"]),
        ("By.s", lambda r: r["by"]),
        ("Reason", lambda r: r["reason"]),
        ("Proven empty", lambda r: "yes" if r["verified_empty"] else "NO"),
        ("Processes.n", lambda r: r["processes_killed"]),
        ("Egress cut.n", lambda r: _milliseconds(r["egress_cut_ms"])),
        ("Dead.n", lambda r: _milliseconds(r["dead_ms"])),
        ("Receipt.v", lambda r: r["receipt_id"]),
    )
    note = "The signature of each receipt is in the JSON file."
    return _section("kills", "Kills, with receipts", _table(document["kills"], columns), note)


def _milliseconds(value: object) -> str:
    return f"{value:.1f} ms" if isinstance(value, int | float) else ""


def _spend(document: Mapping[str, Any]) -> str:
    def table(what: str) -> str:
        columns: tuple[Column, ...] = (
            (f"{what.capitalize()}.a", lambda r: r[what]),
            ("Calls.n", lambda r: r["calls"]),
            ("Tokens in.n", lambda r: r["input_tokens"]),
            ("Tokens out.n", lambda r: r["output_tokens"]),
            ("Cost.n", lambda r: f"${r['cost_usd']:.4f}{' est.' if r['estimated'] else ''}"),
        )
        return _sub(f"By {what}", _table(document["spend"][f"by_{what}"], columns))

    halves = f'<div class="pair"><div>{table("agent")}</div><div>{table("label")}{table("model")}</div></div>'
    return _section("spend", "Spend on models", halves, "est.: by price table, where the gateway said no cost.")


def _limits(document: Mapping[str, Any]) -> str:
    columns: tuple[Column, ...] = (
        ("Agent.a", lambda r: r["agent"]),
        ("What.v", lambda r: r["verb"]),
        ("Of.s", lambda r: r["object"]),
        ("Entries.n", lambda r: r["times"]),
        ("First.t", lambda r: _time(r["first"])),
        ("Last.t", lambda r: _time(r["last"])),
        ("Said", lambda r: r["reason"]),
    )
    return _section("limits", "Limits, memory, floods and drift", _table(document["limits"], columns))


def _changes(document: Mapping[str, Any]) -> str:
    changes: tuple[Column, ...] = (
        ("Time.t", lambda r: _time(r["time"])),
        ("What.v", lambda r: r["verb"]),
        ("Of.s", lambda r: r["object"]),
        ("By.s", lambda r: r["by"]),
        ("Verdict.s", lambda r: r["verdict"]),
        ("Reason", lambda r: r["reason"]),
        ("Details.m", lambda r: r["details"]),
    )
    daemon: tuple[Column, ...] = (
        ("Time.t", lambda r: _time(r["time"])),
        ("What.v", lambda r: r["verb"]),
        ("Note.w", lambda r: r["note"] or r["reason"]),
        ("Details.m", lambda r: r["details"]),
    )
    body = _table(document["changes"], changes)
    return _section("changes", "Changes of policies, holds and definitions", body) + _sub(
        "Starts, stops and recoveries of the daemon", _table(document["daemon"], daemon)
    )


def _log(document: Mapping[str, Any]) -> str:
    log = document["log"]
    facts = (
        ("Entries of this period", f"{log['first_seq']} to {log['last_seq']}"),
        ("Entries in the log", log["size"]),
        ("Root (RFC 6962, SHA-256)", log["root"]),
    )
    rows = "".join(f'<tr><th>{_text(name)}</th><td class="m">{_text(value)}</td></tr>' for name, value in facts)
    before = _proof(
        "That the period continues the log of before", log["before_to_end"], "The log begins in this period."
    )
    after = _proof("That the log went on from the period's end", log["end_to_checkpoint"], "")
    verbs: tuple[Column, ...] = (("Verb and verdict.m", lambda r: r["verb"]), ("Entries.n", lambda r: r["times"]))
    note = "`stockadectl log verify` checks all of it again; whoever kept a checkpoint from before finds a rollback."
    return (
        _section("log", "The action log", f"<table>{rows}</table>", note)
        + _sub("Signed checkpoint (C2SP tlog-checkpoint)", f"<pre>{_lines(log['checkpoint'])}</pre>")
        + before
        + after
        + _sub("All entries of the period", _table(document["entries"], verbs))
    )


def _proof(title: str, proof: Row | None, otherwise: str) -> str:
    if proof is None:
        return _sub(title, f"<p>{_text(otherwise)}</p>")
    lines = (
        f"{proof['old_size']} entries, root {proof['old_root']}",
        f"{proof['size']} entries, root {proof['root']}",
        *(f"  {node}" for node in proof["path"]),
    )
    return _sub(title, f"<pre>{_text('RFC 6962 section 2.1.2')}\n" + "\n".join(map(_text, lines)) + "</pre>")


def _section(anchor: str, title: str, body: str, note: str = "") -> str:
    shown = f'<p class="dim">{_text(note)}</p>' if note else ""
    return f'<h2 id="{anchor}">{_text(title)}</h2>{shown}{body}'


def _sub(title: str, body: str) -> str:
    return f"<h3>{_text(title)}</h3>{body}"


def _table(found: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """A table.

    A column's name may end in the class of its cells: `.n` numbers, `.m` code, `.t` times, `.a` names,
    `.s` short words, `.v` verbs and ids.
    """
    if not found["rows"]:
        return '<p class="dim">None.</p>'
    named = [(name.rpartition(".") if "." in name else (name, "", ""), value) for name, value in columns]
    head = "".join(f'<th class="{css}">{_text(name)}</th>' for (name, _, css), _ in named)
    body = "".join(
        "<tr>" + "".join(f'<td class="{css}">{_text(value(row))}</td>' for (_, _, css), value in named) + "</tr>\n"
        for row in found["rows"]
    )
    rest = found["left_out"]
    left = f'<p class="dim">and {rest} more, which are in the action log.</p>' if rest else ""
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{left}"


def _text(value: object) -> str:
    """A value as text of the page: nothing unprintable, no markup, and bounded."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}".replace(",", "\u202f")
    return html.escape(escape("" if value is None else str(value), characters_max=CELL_CHARACTERS_MAX), quote=True)


def _lines(text: str) -> str:
    return "\n".join(map(_text, text.split("\n")))


def _time(value: str | None) -> str:
    """`2026-01-31 12:00:00Z` of a time in RFC 3339."""
    return "" if not value else f"{value[:10]} {value[11:19]}Z"
