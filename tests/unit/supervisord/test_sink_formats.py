"""What an entry becomes for others, and that no string of an agent's becomes a line or a record of its own."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import pytest

from supervisord.sinks import formats

HOSTILE = 'x\n{"seq": 999}\r\n<13>1 forged\x1b[2J\x7f\u202e\u2028 "]\\'
SYSLOG = re.compile(rb'<(\d+)>1 (\S+) (\S+) stockade (\d+) (\S+) \[meta sequenceId="(\d+)"\] (\{.*\})')


def record(**changed: Any) -> dict[str, Any]:
    usual = {
        "seq": 7,
        "time_ns": 1_790_000_000_123_456_789,
        "leaf_hash": "ab" * 32,
        "agent_id": "ag_a",
        "actor": "agent:ag_a",
        "verb": "egress.request",
        "object": "GET https://a.example/x",
        "verdict": "allowed",
        "reason": "",
        "details": {"n": 1},
    }
    return usual | changed


def hostile() -> dict[str, Any]:
    texts = ("agent_id", "actor", "verb", "object", "verdict", "reason")
    return record(details={HOSTILE: [HOSTILE]}, **dict.fromkeys(texts, HOSTILE))


def test_a_line_has_the_keys_of_actions_and_the_hash() -> None:
    document = json.loads(formats.line(record()))
    keys = ["seq", "time", "agent_id", "actor", "verb", "object", "verdict", "reason", "details", "leaf_hash"]
    assert list(document) == keys
    assert document["time"] == "2026-09-21T14:13:20.123456Z"


def test_a_syslog_message_is_rfc_5424() -> None:
    found = SYSLOG.fullmatch(formats.syslog(record(verdict="denied"), host="h.example", pid=4))
    assert found is not None
    assert found[1] == b"%d" % (13 * 8 + 4)
    assert found.groups()[2:6] == (b"h.example", b"4", b"egress.request", b"8")
    assert json.loads(found[7])["verdict"] == "denied"


@pytest.mark.parametrize("of", ["line", "syslog", "ocsf", "otlp"])
def test_strings_of_an_agent_forge_nothing(of: str) -> None:
    made = {
        "line": lambda: formats.line(hostile()).encode(),
        "syslog": lambda: formats.syslog(hostile(), host="h", pid=1),
        "ocsf": lambda: formats.ocsf(hostile(), origin="o", key="k", host="h").encode(),
        "otlp": lambda: formats.otlp([hostile()], host="h", instance="i"),
    }[of]()
    assert all(0x20 <= byte < 0x7F for byte in made)
    if of == "syslog":
        found = SYSLOG.fullmatch(made)
        assert found is not None
        made = found[7]
    assert HOSTILE in strings(json.loads(made))


def strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for key, item in value.items() for text in (key, *strings(item))]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_what_does_not_fit_a_datagram_loses_its_details_and_says_so() -> None:
    fits = formats.syslog(record(details={"x": "a" * 50_000}), host="h", pid=1)
    assert b"a" * 50_000 in fits
    cut = formats.syslog(record(details={"x": "\u20ac" * 30_000}, object="\u20ac" * 4096), host="h", pid=1)
    assert len(cut) < 65_000
    assert json.loads(cut[cut.index(b"{") :])["details"] == {"cut": True}


@pytest.mark.parametrize(
    ("verb", "target", "verdict", "type_uid"),
    [
        ("egress.request", "GET https://a.example/x", "allowed", 400203),
        ("egress.request", "CONNECT a.example:443", "allowed", 400101),
        ("egress.request", "CONNECT a.example:443", "denied", 400105),
        ("agent.launch", "reader", "allowed", 100701),
        ("agent.kill", "reader", "done", 100702),
        ("agent.freeze", "reader", "done", 100799),
        ("grant.create", "llm:*", "done", 600301),
        ("hold.release", "name:x", "done", 600304),
        ("daemon.recover", "default", "done", 600399),
    ],
)
def test_an_event_has_its_class(verb: str, target: str, verdict: str, type_uid: int) -> None:
    made = record(verb=verb, object=target, verdict=verdict)
    event = json.loads(formats.ocsf(made, origin="o", key="o+1+k", host="h"))
    assert (event["type_uid"], event["class_uid"], event["category_uid"]) == (
        type_uid,
        type_uid // 100,
        type_uid // 100_000,
    )
    if type_uid // 100 == 4001:
        assert event["dst_endpoint"] == {"hostname": "a.example", "port": 443}
    if type_uid // 100 == 4002:
        assert event["http_request"] == {"http_method": "GET", "url": {"url_string": "https://a.example/x"}}


def test_an_event_says_which_entry_it_is_and_fingerprints_itself() -> None:
    event = json.loads(formats.ocsf(record(), origin="o", key="o+1+k", host="h"))
    fingerprint = event["attestation"].pop("fingerprint")
    assert event["attestation"] == {"uid": "7", "authority_uid": "o+1+k", "chain_uid": "o"}
    assert event["unmapped"]["stockade"]["leaf_hash"] == "ab" * 32
    canonical = json.dumps(event, sort_keys=True, separators=(",", ":")).encode()
    assert fingerprint["value"] == hashlib.sha256(canonical).hexdigest()


def test_a_log_record_has_the_shape_of_otlp() -> None:
    document = json.loads(formats.otlp([record(), record(seq=8, verdict="failed")], host="h", instance="i"))
    (resource,) = document["resourceLogs"]
    first, second = resource["scopeLogs"][0]["logRecords"]
    assert first["timeUnixNano"] == "1790000000123456789"
    assert (first["severityNumber"], second["severityNumber"]) == (9, 17)
    assert {"key": "stockade.seq", "value": {"intValue": "8"}} in second["attributes"]


def test_a_notice_is_more_than_usual_and_no_failure() -> None:
    notice = record(verb="agent.budget", verdict="notice")
    assert formats.syslog(notice, host="h", pid=1).startswith(b"<%d>1 " % (13 * 8 + 5))
    document = json.loads(formats.ocsf(notice, origin="o", key="k", host="h"))
    assert (document["severity_id"], document["status_id"]) == (2, 1)
