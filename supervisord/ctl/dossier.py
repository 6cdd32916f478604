"""What the action log says of a period, added up an entry at a time within bounds (pure).

Every figure of the report is made here, out of entries alone. Memory does not grow with the period: lists are cut at
ROWS_MAX and tallies at KEYS_MAX, and both say how much they leave out.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from supervisord.ctl.output import when

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from stockade.client.values import Action

    Row = dict[str, Any]

AGENTS_MAX: Final = 5000
ROWS_MAX: Final = 2000
KEYS_MAX: Final = 10_000
OTHERS: Final = "(others)"
MICRO: Final = 1_000_000
LIMIT_VERBS: Final = frozenset(
    {"agent.oom", "agent.pids_limit", "agent.throttled", "agent.pressure", "agent.flood", "agent.drift", "agent.adopt"}
)
REQUEST_DEEDS: Final = {
    ("request.create", "done"): "asked",
    ("request.deny", "done"): "denied",
    ("request.approve", "denied"): "tried to approve",
    ("request.expire", "denied"): "expired",
}
CHANGE_VERBS: Final = frozenset({"policy.load", "hold.create", "hold.release", "registry.add", "registry.deprecate"})
DAEMON_VERBS: Final = frozenset(
    {"daemon.start", "daemon.stop", "daemon.crash", "daemon.recover", "launcher.restart", "log.recover", "log.lost"}
)


class Rows:
    """A list that ends at ROWS_MAX and counts what came after."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.left_out = 0

    def add(self, row: Row) -> Row | None:
        """The row as it is kept, None where there are too many."""
        if len(self.rows) >= ROWS_MAX:
            self.left_out += 1
            return None
        self.rows.append(row)
        return row

    def document(self) -> Row:
        return {"rows": self.rows, "left_out": self.left_out}


class Tally:
    """How often each key came; keys beyond KEYS_MAX are one."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def add(self, key: str, times: int = 1) -> None:
        if key not in self.counts and len(self.counts) >= KEYS_MAX:
            key = OTHERS
        self.counts[key] += times

    def top(self, count: int, name: str) -> Row:
        """The most frequent keys, and how much the rest comes to."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        rest = ordered[count:]
        rows = [{name: key, "times": times} for key, times in ordered[:count]]
        return {"rows": rows, "left_out": len(rest), "left_out_times": sum(times for _, times in rest)}


class Dossier:
    """The period so far; `feed` it the entries in order, then take `document`."""

    def __init__(self, *, running_before: bool = False) -> None:
        """`running_before`: the daemon's last start before the period was not followed by a stop."""
        self.agents: dict[str, Row] = {}
        self.agents_left_out: set[str] = set()
        self.first_seq = self.last_seq = self.entries = 0
        self.verbs = Tally()
        self.allowed, self.denied, self.reasons = Tally(), Tally(), Tally()
        self.grants, self.requests, self.kills = Rows(), Rows(), Rows()
        self.changes, self.daemon, self.limits = Rows(), Rows(), Rows()
        self.counts: Counter[str] = Counter()
        self._grants: dict[str, Row] = {}
        self._limits: dict[tuple[str, str, str], Row] = {}
        self._spend: dict[tuple[str, str], Row] = {}
        self._up = running_before

    def feed(self, action: Action) -> None:
        """Add one entry."""
        self.entries += 1
        self.first_seq = self.first_seq or action.seq
        self.last_seq = action.seq
        self.verbs.add(f"{action.verb} {action.verdict}")
        if action.verb in LIMIT_VERBS:
            self._limit(action)
        elif action.verb in CHANGE_VERBS:
            self.changes.add({**_base(action), "verb": action.verb, "object": action.object, "details": _facts(action)})
        elif action.verb in DAEMON_VERBS:
            self._daemon(action)
        match action.verb.partition("."):
            case ("agent", _, deed):
                self._agent_deed(deed, action)
            case ("grant" | "request", _, _):
                self._scope_deed(action)
            case ("egress", _, "request"):
                self._egress(action)
            case ("egress", _, "outcome"):
                self._outcome(action)
            case _:
                pass

    def unnamed(self) -> list[str]:
        """The agents that did something in the period and were launched before it."""
        return [agent_id for agent_id, row in self.agents.items() if not row["name"]]

    def name(self, action: Action) -> None:
        """Say who an agent is that was launched before the period, by the entry of its launch."""
        _describe(self._agent(action.agent_id), action)

    # --- an entry each

    def _agent(self, agent_id: str) -> Row:
        row = self.agents.get(agent_id)
        if row is None:
            row = _nobody(agent_id)
            if len(self.agents) < AGENTS_MAX:
                self.agents[agent_id] = row
            elif len(self.agents_left_out) < KEYS_MAX:
                self.agents_left_out.add(agent_id)
        return row

    def _agent_deed(self, deed: str, action: Action) -> None:
        row = self._agent(action.agent_id)
        match deed, action.verdict:
            case "launch", _:
                _describe(row, action)
                row["launched_at"], row["launched_by"] = when(action.time), action.actor
                self.counts["launched"] += 1
                self.counts["unregistered"] += not row["definition"]
            case "exec", "done":
                posture = action.details.get("posture")
                listed = posture.get("degraded") if isinstance(posture, dict) else None
                row["degraded"] = [str(item) for item in listed] if isinstance(listed, list) else []
                self.counts["degraded"] += bool(row["degraded"])
            case "fail", _:
                self._ended(row, action, "failed", action.reason)
            case "exit", _:
                details = action.details
                how = f"signal {details['signal']}" if details.get("signal") else f"exit {details.get('code')}"
                self._ended(row, action, "exited", "out of memory" if details.get("out_of_memory") else how)
            case "kill", _:
                self._kill(row, action)
            case _:
                pass

    def _ended(self, row: Row, action: Action, state: str, how: str) -> None:
        if not row["ended_at"]:
            row["ended_at"], row["end"], row["how"] = when(action.time), state, how
            self.counts[state] += 1

    def _kill(self, row: Row, action: Action) -> None:
        keys = (
            "receipt_id",
            "verified_empty",
            "processes_killed",
            "egress_cut_ms",
            "dead_ms",
            "already_dead",
            "signature",
        )
        receipt = {key: action.details.get(key) for key in keys}
        self.kills.add({**_base(action), "agent": action.object, **receipt})
        self.counts["kills"] += 1
        self.counts["kills_unverified"] += action.verdict != "done"
        if not action.details.get("already_dead"):
            self._ended(row, action, "killed", f"by {action.actor}: {action.reason}" if action.reason else action.actor)

    def _scope_deed(self, action: Action) -> None:
        row = {**_base(action), "scope": action.object}
        grant_id = str(action.details.get("grant_id") or "")
        match action.verb, action.verdict:
            case "request.approve", "done" if not grant_id:
                self._request(row, "agreed")  # one of several who have to approve
            case (("grant.create" | "request.approve"), "done"):
                self._granted(row, action, grant_id)
            case (("grant.revoke" | "grant.expire"), "done"):
                ended = "revoked" if action.verb == "grant.revoke" else "expired"
                self.counts[ended] += 1
                kept = self._grants.get(grant_id)
                if kept is not None:
                    kept["ended_at"] = when(action.time)
                    kept["ended"] = f"{ended} by {action.actor}"
            case deed if deed in REQUEST_DEEDS:
                self._request(row, REQUEST_DEEDS[deed])
            case _:
                pass

    def _granted(self, row: Row, action: Action, grant_id: str) -> None:
        people = action.details.get("approved_by")
        if isinstance(people, list):
            row["by"] = ", ".join(map(str, people))
        terms = {key: action.details.get(key) for key in ("ttl_seconds", "max_uses", "ticket")}
        kept = self.grants.add({**row, **terms, "grant_id": grant_id, "ended_at": None, "ended": ""})
        self.counts["granted"] += 1
        if kept is not None and grant_id:
            self._grants[grant_id] = kept
        if action.verb == "request.approve":
            self._request(row, "approved")

    def _request(self, row: Row, deed: str) -> None:
        self.counts[f"requests_{deed}"] += 1
        self.requests.add({**row, "deed": deed})

    def _egress(self, action: Action) -> None:
        row = self._agent(action.agent_id)
        host = host_of(action.object)
        if action.verdict == "allowed":
            self.allowed.add(host)
            row["allowed"] += 1
            self.counts["allowed"] += 1
        else:
            self.denied.add(host)
            self.reasons.add(action.reason.partition(":")[0])
            row["denied"] += 1
            self.counts["denied"] += 1

    def _outcome(self, action: Action) -> None:
        details = action.details
        model = details.get("model")
        self.counts["bytes_up"] += _whole(details.get("bytes_up"))
        self.counts["bytes_down"] += _whole(details.get("bytes_down"))
        if not isinstance(model, str):
            return
        key = (action.agent_id, model)
        if key not in self._spend and len(self._spend) >= KEYS_MAX:
            key = (OTHERS, OTHERS)
        row = self._spend.setdefault(key, _nothing_spent())
        cost = details.get("cost_usd")
        row["calls"] += 1
        row["input_tokens"] += _whole(details.get("input_tokens"))
        row["output_tokens"] += _whole(details.get("output_tokens"))
        row["cost_microusd"] += round(cost * MICRO) if isinstance(cost, int | float) else 0
        row["estimated"] |= details.get("cost_estimated") is True

    def _limit(self, action: Action) -> None:
        self.counts["limit_events"] += 1
        key = (action.agent_id, action.verb, action.object)
        row = self._limits.get(key)
        if row is None:
            row = {"agent_id": action.agent_id, "verb": action.verb, "object": action.object, "times": 0}
            row = self.limits.add({**row, "first": when(action.time), "reason": action.reason})
            if row is None:
                return
            self._limits[key] = row
        row["times"] += 1
        row["last"] = when(action.time)

    def _daemon(self, action: Action) -> None:
        note = ""
        if action.verb == "daemon.start":
            if self._up:
                note = "the daemon before it ended without stopping"
                self.counts["crashes"] += 1
            self._up = True
        elif action.verb == "daemon.stop":
            self._up = False
        self.daemon.add({**_base(action), "verb": action.verb, "note": note, "details": _facts(action)})

    # --- the whole

    def document(self, top: int) -> Row:
        """All but what is not in entries: period, definitions, the log's root and proofs."""
        names = {agent_id: row["name"] for agent_id, row in self.agents.items()}
        for rows in (self.grants, self.requests, self.kills, self.limits):
            for row in rows.rows:
                row["agent"] = row.get("agent") or names.get(row["agent_id"]) or row["agent_id"]
        spend = self._spends(names, top)
        return {
            "summary": self._summary(spend),
            "agents": {"rows": list(self.agents.values()), "left_out": len(self.agents_left_out)},
            "grants": self.grants.document(),
            "requests": self.requests.document(),
            "egress": {
                "allowed_by_host": self.allowed.top(top, "host"),
                "denied_by_host": self.denied.top(top, "host"),
                "denied_by_reason": self.reasons.top(top, "reason"),
            },
            "kills": self.kills.document(),
            "spend": spend,
            "limits": self.limits.document(),
            "changes": self.changes.document(),
            "daemon": self.daemon.document(),
            "entries": self.verbs.top(KEYS_MAX + 1, "verb"),
        }

    def _spends(self, names: Mapping[str, str], top: int) -> Row:
        def by(what: str, keyed: Iterable[tuple[Sequence[str], Row]]) -> Row:
            sums: dict[str, Row] = {}
            for keys, row in keyed:
                for key in keys:
                    _add_spend(sums.setdefault(key, {what: key, **_nothing_spent()}), row)
            ordered = sorted(sums.values(), key=lambda each: (-each["cost_microusd"], -each["output_tokens"]))
            for row in ordered:
                row["cost_usd"] = row.pop("cost_microusd") / MICRO
            return {"rows": ordered[:top], "left_out": max(0, len(ordered) - top)}

        items = list(self._spend.items())
        total = _nothing_spent()
        for (agent_id, _), row in items:
            _add_spend(total, row)
            if agent_id in self.agents:
                _add_spend(self.agents[agent_id]["spend"], row)
        for row in self.agents.values():
            row["spend"]["cost_usd"] = row["spend"].pop("cost_microusd") / MICRO
        total["cost_usd"] = total.pop("cost_microusd") / MICRO

        def labels(agent_id: str) -> Sequence[str]:
            row = self.agents.get(agent_id)
            found = row["labels"] if row else {}
            return [f"{key}={value}" for key, value in found.items()] or ["(no label)"]

        return {
            "total": total,
            "by_agent": by("agent", (([names.get(agent_id) or agent_id], row) for (agent_id, _), row in items)),
            "by_label": by("label", ((labels(agent_id), row) for (agent_id, _), row in items)),
            "by_model": by("model", (([model], row) for (_, model), row in items)),
        }

    def _summary(self, spend: Row) -> Row:
        keys = (
            "launched", "unregistered", "exited", "failed", "killed", "granted", "revoked", "expired",
            "requests_asked", "requests_approved", "requests_denied", "allowed", "denied", "bytes_up", "bytes_down",
            "kills", "kills_unverified", "degraded", "limit_events", "crashes",
        )  # fmt: skip
        counts = {key: self.counts[key] for key in keys}
        total = spend["total"]
        return {**counts, "cost_usd": total["cost_usd"], "entries": self.entries} | {
            key: total[key] for key in ("input_tokens", "output_tokens", "calls", "estimated")
        }


def host_of(text: str) -> str:
    """The host that a request's line in the log names; the line itself where it names none."""
    method, _, target = text.partition(" ")
    if method == "CONNECT":
        return target
    try:
        return urlsplit(target).netloc or text
    except ValueError:
        return text


def attention(summary: Mapping[str, Any]) -> list[str]:
    """What somebody should look at first, a sentence each."""
    said = (
        ("kills_unverified", "Kills that could not be proven, so that processes may have been left"),
        ("crashes", "Starts of the daemon after an end without a stop (a crash, a kill, a loss of power)"),
        ("unregistered", "Launches by no definition of the registry"),
        ("degraded", "Launches without a control that their policy allows to be missing"),
        ("limit_events", "Entries of agents that met a limit, were out of memory or flooded"),
    )
    found = [f"{text}: {summary[key]}." for key, text in said if summary[key]]
    if summary["estimated"]:
        found.append("A part of the cost is an estimate by price table, not what the gateway said.")
    return found


def _nobody(agent_id: str) -> Row:
    words = ("name", "owner", "purpose", "policy", "definition", "launched_by", "end", "how")
    return {
        "agent_id": agent_id,
        **dict.fromkeys(words, ""),
        "labels": {},
        "scopes": [],
        "launched_at": None,
        "ended_at": None,
        "degraded": [],
        "allowed": 0,
        "denied": 0,
        "spend": _nothing_spent(),
    }


def _describe(row: Row, action: Action) -> None:
    details = action.details
    for key in ("name", "owner", "purpose", "policy", "definition"):
        row[key] = str(details.get(key) or "")
    labels, scopes = details.get("labels"), details.get("scopes")
    row["labels"] = {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}
    row["scopes"] = [str(scope) for scope in scopes] if isinstance(scopes, list) else []


def _base(action: Action) -> Row:
    return {
        "seq": action.seq,
        "time": when(action.time),
        "agent_id": action.agent_id,
        "by": action.actor,
        "verdict": action.verdict,
        "reason": action.reason,
    }


def _facts(action: Action) -> str:
    return ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in action.details.items()
    )


def _nothing_spent() -> Row:
    return {"calls": 0, "input_tokens": 0, "output_tokens": 0, "cost_microusd": 0, "estimated": False}


def _add_spend(into: Row, row: Row) -> None:
    for key in ("calls", "input_tokens", "output_tokens", "cost_microusd"):
        into[key] += row[key]
    into["estimated"] |= row["estimated"]


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0


def period(since: datetime, until: datetime) -> Row:
    return {"since": when(since), "until": when(until)}
