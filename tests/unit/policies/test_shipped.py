"""Every file in policies/: it loads, it says what it is meant to say, and schema and parser agree on it."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sandbox.plan import Record
from supervisord.config import GatewayConfig
from supervisord.errors import InvalidInput
from supervisord.policies import SHIPPED_DIR, PolicyShelf, load_schemas
from supervisord.policy import EgressRules, Limits, OnDeny, OnLoss, Risk, User, Worker
from supervisord.policy_reader import parse_agent, parse_policy
from supervisord.sizes import SIZE_PATTERN, parse_size

SHELF = PolicyShelf([], gateway=GatewayConfig())
SCHEMAS = load_schemas()
FILES = sorted(SHIPPED_DIR.glob("*.yaml"))

# As the interface contract prints it: what a launch that names no policy gets.
DEFAULT = """\
kind: Policy
name: default
version: 1
risk: limited                # minimal | limited | high
user: agent
rootfs: host                 # host | directory | OCI layout or archive
limits: {memory: 1GiB, cpus: 1, pids: 256, disk: 1GiB, open_files: 4096, output: 64MiB}
budget: {}
scopes: ["llm:*"]
egress: {on_deny: deny, transparent: false, worker: shared}
on_supervisor_loss: contain  # contain | kill
"""

AGENT = """\
kind: Agent
name: log-reader
version: 3
owner: team-observability
purpose: finds causes in service logs
policy: default
command: [python3, agent.py]
workspace: {path: /srv/logs, mode: ro}
labels: {team: observability}
budget: {llm_tokens: 200000, cost_usd: 2}
scopes: ["http:GET:https://status.example.com/**"]
"""


def test_there_is_nothing_broken_and_nothing_unread() -> None:
    assert SHELF.broken() == ()
    assert {path.stem for path in FILES} == {policy.name for policy in SHELF.list()}
    assert {"default", "coding-agent", "python-agent", "claude-code", "codex", "high-risk"} <= {
        path.stem for path in FILES
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_file_loads_and_another_yaml_reader_and_the_schema_agree(path: Path) -> None:
    policy = SHELF.get(path.stem)
    assert policy.digest
    assert policy.scopes
    schema = json.loads((SHIPPED_DIR / "schema" / "policy.schema.json").read_text("utf-8"))
    jsonschema.validate(yaml.safe_load(path.read_text("utf-8")), schema)


def test_default_is_the_documented_one() -> None:
    assert (SHIPPED_DIR / "default.yaml").read_text("utf-8") == DEFAULT
    policy = SHELF.get("default")
    assert policy.limits == Limits(1 << 30, 1, 256, 1 << 30, 4096, 64 << 20)
    assert (policy.risk, policy.user, policy.rootfs) == (Risk.LIMITED, User.AGENT, None)
    assert policy.egress == EgressRules(OnDeny.DENY, transparent=False, worker=Worker.SHARED)
    assert policy.on_supervisor_loss is OnLoss.CONTAIN
    assert policy.ceiling is None


def test_the_documented_agent_loads() -> None:
    assert parse_agent(AGENT, source="a.yaml", schemas=SCHEMAS).name == "log-reader"


def test_coding_agents_have_what_they_were_measured_to_need() -> None:
    for name in ("coding-agent", "claude-code", "codex"):
        limits = SHELF.get(name).limits
        assert limits.memory_bytes >= 2 << 30
        assert limits.pids >= 256
        assert limits.open_files >= 4096


def test_high_risk_has_a_worker_of_its_own_and_can_be_granted_nothing_else() -> None:
    policy = SHELF.get("high-risk")
    assert (policy.risk, policy.egress.worker, policy.on_supervisor_loss) == (Risk.HIGH, Worker.DEDICATED, OnLoss.KILL)
    assert policy.ceiling == policy.scopes
    assert policy.degraded_ok == frozenset()
    assert policy.record == Record(execs=True, refusals=True, arguments=16)


def test_nothing_is_told_where_no_policy_asks_for_it() -> None:
    told = {policy.name for policy in SHELF.list() if policy.record.execs or policy.record.refusals}
    assert told == {"high-risk"}


def test_nothing_shipped_runs_as_root_or_asks_or_lets_controls_be_missing() -> None:
    for policy in SHELF.list():
        assert policy.user is User.AGENT
        assert not policy.allow_root_owned
        assert not policy.degraded_ok
        assert policy.egress.on_deny is OnDeny.DENY
        assert policy.seccomp == "default"


def test_the_schemas_close_every_mapping() -> None:
    def walk(schema: object, where: str) -> None:
        if isinstance(schema, dict):
            if schema.get("type") == "object":
                assert schema.get("additionalProperties") is False, where
            for key, below in schema.items():
                walk(below, f"{where}/{key}")
        elif isinstance(schema, list):
            for index, below in enumerate(schema):
                walk(below, f"{where}/{index}")

    for name in ("policy", "agent"):
        walk(json.loads((SHIPPED_DIR / "schema" / f"{name}.schema.json").read_text("utf-8")), name)


def test_the_schemas_sizes_are_the_parsers() -> None:
    for name in ("policy", "agent"):
        schema = json.loads((SHIPPED_DIR / "schema" / f"{name}.schema.json").read_text("utf-8"))
        assert schema["$defs"]["size"]["pattern"] == SIZE_PATTERN


@given(st.from_regex(SIZE_PATTERN.replace("$", r"\Z"), fullmatch=True) | st.text("0123456789.KMGiB", max_size=8))
def test_a_size_is_one_to_the_policy_when_it_is_one_to_the_parser(text: str) -> None:
    try:
        wanted: int | None = parse_size(text)
    except InvalidInput:
        wanted = None
    document = f"kind: Policy\nname: x\nlimits: {{memory: '{text}'}}\n"
    if wanted is not None and wanted >= 16 << 20:
        assert parse_policy(document, source="x", schemas=SCHEMAS, parent=SHELF.get).limits.memory_bytes == wanted
    else:
        with pytest.raises(InvalidInput):
            parse_policy(document, source="x", schemas=SCHEMAS, parent=SHELF.get)
