"""An entry of the action log in the words of others: JSON lines, RFC 5424, OCSF, OTLP (pure).

Agents chose some of these strings. Each form is JSON with everything beyond printable ASCII escaped, on one line, so
that no string begins a line, a field or a record of its own; where a form has fields outside the JSON they hold words
of a fixed alphabet only.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

Record = Mapping[str, Any]  # as the daemon sends it: seq, time_ns, leaf_hash (hex), and the fields of an action

VENDOR: Final = "Stockade"
OCSF_VERSION: Final = "1.8.0"
LOG_AUDIT: Final = 13  # facility "log audit", RFC 5424 section 6.2.1
SYSLOG_BYTES_MAX: Final = 60_000  # below what UDP takes
_SEQUENCE_ID_MAX: Final = 2**31 - 1  # RFC 5424 section 7.3.1
_SHOWN_CHARACTERS: Final = 256
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._:/-]")
# verdict: syslog severity, OpenTelemetry's severity number and text, OCSF severity
_SEVERITIES: Final = {"denied": (4, 13, "WARN", 3), "failed": (3, 17, "ERROR", 3), "notice": (5, 10, "INFO2", 2)}
_USUAL: Final = (6, 9, "INFO", 1)
_NANOS: Final = 10**9
_METHODS: Final = {
    name: number
    for number, name in enumerate(("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "POST", "PUT", "TRACE"), start=1)
}
_CREATES: Final = frozenset({"create", "grant", "start", "load", "approve"})
_ENDS: Final = frozenset({"revoke", "release", "expire", "deny", "stop", "discard", "retire"})
_OTHER: Final = 99


def line(record: Record) -> str:
    """One JSON object with the keys that `stockadectl -o json actions` has, and the entry's leaf hash."""
    document = {
        "seq": record["seq"],
        "time": rfc3339(record["time_ns"]),
        "agent_id": record["agent_id"],
        "actor": record["actor"],
        "verb": record["verb"],
        "object": record["object"],
        "verdict": record["verdict"],
        "reason": record["reason"],
        "details": record["details"],
        "leaf_hash": record["leaf_hash"],
    }
    return dump(document)


def dump(document: Any, *, sort_keys: bool = False) -> str:
    """JSON on one line, in printable ASCII."""
    return json.dumps(document, separators=(",", ":"), sort_keys=sort_keys).replace("\x7f", "\\u007f")


def rfc3339(time_ns: int) -> str:
    seconds, nanos = divmod(time_ns, _NANOS)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanos // 1000:06d}Z"


def syslog(record: Record, *, host: str, pid: int) -> bytes:
    """One RFC 5424 message; what does not fit a datagram loses its details, and says so."""
    severity = _SEVERITIES.get(record["verdict"], _USUAL)[0]
    head = (
        f"<{LOG_AUDIT * 8 + severity}>1 {rfc3339(record['time_ns'])} {word(host, 255)} stockade {pid} "
        f'{word(record["verb"], 32)} [meta sequenceId="{record["seq"] % _SEQUENCE_ID_MAX + 1}"] '
    )
    message = line(record)
    if len(message) > SYSLOG_BYTES_MAX:
        short = {key: cut(record[key]) for key in ("agent_id", "actor", "verb", "object", "verdict", "reason")}
        message = line({**record, **short, "details": {"cut": True}})
    return (head + message).encode("ascii")


def word(text: str, characters_max: int) -> str:
    """The text as a header field: printable, without spaces, never empty."""
    return _UNSAFE.sub("?", text)[:characters_max] or "-"


def cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "[cut]"


def otlp(records: Sequence[Record], *, host: str, instance: str) -> bytes:
    """An ExportLogsServiceRequest in OTLP's JSON encoding (opentelemetry-proto 1.x)."""
    resource = {"service.name": "stockade", "service.instance.id": instance, "host.name": host}
    document = {
        "resourceLogs": [
            {
                "resource": {"attributes": _attributes(resource)},
                "scopeLogs": [{"scope": {"name": "stockade.actions"}, "logRecords": list(map(_log_record, records))}],
            }
        ]
    }
    return dump(document).encode("ascii")


def _log_record(record: Record) -> dict[str, Any]:
    _, number, text, _ = _SEVERITIES.get(record["verdict"], _USUAL)
    names = ("agent_id", "actor", "verb", "object", "verdict", "reason", "leaf_hash")
    facts = {f"stockade.{name}": record[name] for name in names if record[name]}
    return {
        "timeUnixNano": str(record["time_ns"]),
        "observedTimeUnixNano": str(record["time_ns"]),
        "severityNumber": number,
        "severityText": text,
        "eventName": record["verb"],
        "body": {"stringValue": summary(record)},
        "attributes": [
            *_attributes(facts),
            {"key": "stockade.seq", "value": {"intValue": str(record["seq"])}},
            {"key": "stockade.details", "value": {"stringValue": dump(record["details"])}},
        ],
    }


def summary(record: Record) -> str:
    return " ".join(filter(None, (record["verb"], record["verdict"], record["object"], record["reason"])))


def _attributes(facts: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"key": key, "value": {"stringValue": value}} for key, value in facts.items()]


def ocsf(record: Record, *, origin: str, key: str, host: str) -> str:
    """One OCSF event: process, HTTP, network or API activity, with the profile `record_integrity`.

    `attestation` says which log the event is an entry of and fingerprints the event itself; `unmapped` has what proves
    the entry: its number and leaf hash in the log's tree, as `stockadectl log prove` takes them.
    """
    class_uid, activity, special = _classified(record)
    document: dict[str, Any] = {
        "activity_id": activity,
        "category_uid": class_uid // 1000,
        "class_uid": class_uid,
        "type_uid": class_uid * 100 + activity,
        "time": record["time_ns"] // 1_000_000,
        "severity_id": _SEVERITIES.get(record["verdict"], _USUAL)[3],
        "status_id": 2 if record["verdict"] in ("denied", "failed") else 1,
        "status_detail": record["reason"],
        "message": summary(record),
        "metadata": {
            "version": OCSF_VERSION,
            "product": {"name": VENDOR, "vendor_name": VENDOR},
            "profiles": ["record_integrity", "security_control"],
            "uid": f"{origin}/{record['seq']}",
            "sequence": record["seq"],
            "log_name": origin,
            "event_code": record["verb"],
        },
        "action_id": 2 if record["verdict"] == "denied" else 1,
        "device": {"hostname": host, "type_id": 1},
        "actor": {"user": {"name": record["actor"]}, "app_name": VENDOR, "app_uid": record["agent_id"]},
        "unmapped": {
            "stockade": {
                "seq": record["seq"],
                "leaf_hash": record["leaf_hash"],
                "agent_id": record["agent_id"],
                "object": record["object"],
                "verdict": record["verdict"],
                "details": record["details"],
            }
        },
        "attestation": {"uid": str(record["seq"]), "authority_uid": key, "chain_uid": origin},
        **special,
    }
    canonical = dump(document, sort_keys=True).encode("ascii")
    fingerprint = {"algorithm_id": 3, "algorithm": "SHA-256", "value": hashlib.sha256(canonical).hexdigest()}
    document["attestation"]["fingerprint"] = fingerprint
    return dump(document)


def _classified(record: Record) -> tuple[int, int, dict[str, Any]]:
    """Class, activity and what that class wants beside the base."""
    area, _, deed = record["verb"].partition(".")
    target = record["object"]
    if area == "egress":
        method, _, rest = target.partition(" ")
        if method == "CONNECT":
            host, _, port = rest.rpartition(":")
            endpoint: dict[str, Any] = {"hostname": host or rest}
            if port.isascii() and port.isdigit() and len(port) <= 5:  # noqa: PLR2004 - digits of a port
                endpoint["port"] = int(port)
            refused = record["verdict"] == "denied"
            return 4001, 5 if refused else 1, {"dst_endpoint": endpoint, "connection_info": {"direction_id": 2}}
        special = {"http_request": {"http_method": method, "url": {"url_string": rest}}}
        return 4002, _METHODS.get(method, _OTHER), special
    if area in ("agent", "exec"):
        activity = {"launch": 1, "start": 1, "kill": 2, "exit": 2, "end": 2}.get(deed, _OTHER)
        process = {"name": record["agent_id"], "cmd_line": target}
        return 1007, activity, {"process": process}
    activity = 1 if deed in _CREATES else 4 if deed in _ENDS else _OTHER
    return 6003, activity, {"api": {"operation": record["verb"]}, "resources": [{"name": target}]}
