"""Policies and agents: what they mean, what is refused and where, and that extending only narrows."""

import contextlib
import json
import os
import re
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway_client.egress.scope import parse_scope
from sandbox.plan import Record
from supervisord.budgets import Budget, OnExhausted
from supervisord.config import GatewayConfig, GatewayKind
from supervisord.documents import InvalidDocument
from supervisord.errors import InvalidInput, NotFound
from supervisord.policies import PolicyShelf, load_schemas
from supervisord.policy import (
    AgentSpec,
    Demand,
    EgressRules,
    Home,
    Limits,
    LimitsWanted,
    OnDeny,
    OnLoss,
    Policy,
    Registered,
    Risk,
    RootfsName,
    User,
    Worker,
    policy_yaml,
    wider,
)
from supervisord.policy_reader import parse_agent, parse_policy

SCHEMAS = load_schemas()

PARENT = """
kind: Policy
name: parent
user: agent
limits: {memory: 1GiB, pids: 100, io_read: 10MiB, io_write: 10MiB}
budget: {llm_tokens: 1000}
scopes: ["llm:*", "http:GET:https://a.example.com/**"]
hide: [/usr/local]
grants: {ceiling: ["llm:*", "http:GET,POST:https://a.example.com/**"]}
degraded_ok: [landlock]
env: {A: "1", B: "2"}
"""


def no_parent(name: str) -> Policy:
    raise NotFound(f"no policy {name}")


def policy(text: str) -> Policy:
    return parse_policy(text, source="f.yaml", schemas=SCHEMAS, parent=no_parent)


def child(text: str, parent: str = PARENT) -> Policy:
    above = policy(parent)
    return parse_policy(
        "kind: Policy\nname: child\nextends: parent\n" + text, source="f.yaml", schemas=SCHEMAS, parent=lambda _: above
    )


def agent(text: str) -> AgentSpec:
    return parse_agent("kind: Agent\nname: a\n" + text, source="f.yaml", schemas=SCHEMAS)


def refusal(text: str) -> str:
    with pytest.raises(InvalidDocument) as raised:
        policy("kind: Policy\nname: x\n" + text)
    return str(raised.value)


def test_a_policy_that_says_nothing_gives_nothing_to_reach() -> None:
    empty = policy("kind: Policy\nname: x\n")
    assert empty.scopes == ()
    assert empty.limits == Limits()
    assert empty.egress == EgressRules(OnDeny.DENY, transparent=False, worker=Worker.SHARED)
    assert (empty.user, empty.rootfs, empty.home, empty.allow_root_owned) == (User.AGENT, None, Home.EPHEMERAL, False)
    assert empty.degraded_ok == frozenset()


def test_every_key_arrives() -> None:
    full = policy("""
kind: Policy
name: full
version: 7
description: all of it
risk: high
user: root
rootfs: /srv/images/agent
hide: [/usr/local, /opt]
home: persistent
allow_root_owned: true
allow_sockets: true
shared_workspace: true
limits: {memory: 2GiB, cpus: 0.5, pids: 64, disk: 3GiB, open_files: 1024, output: 1MiB, swap: 1GiB, io_read: 2MiB,
  io_write: 1MiB}
budget: {llm_tokens: 10, cost_usd: 0.5, requests: 3}
scopes: ["llm:gpt-*", "fs:ro:/srv/logs", "mcp:git/*", "tls:git.example.com:443"]
grants: {ceiling: ["llm:*", "fs:ro:/srv", "mcp:git/*", "tls:git.example.com:443"]}
egress: {on_deny: ask, transparent: true, worker: dedicated}
env: {A_B: "1"}
seccomp: strict
landlock: required
on_supervisor_loss: kill
degraded_ok: [idmap, workspace-quota]
require: [nftables]
canary: true
record: {execs: true, arguments: 3}
""")
    assert full.record == Record(execs=True, refusals=False, arguments=3)
    assert full.limits == Limits(2 << 30, 0.5, 64, 3 << 30, 1024, 1 << 20, 1 << 30, 2 << 20, 1 << 20)
    assert full.budget == Budget(10, 500_000, 3)
    assert full.scopes[1] == parse_scope("fs:ro:/srv/logs")
    assert full.ceiling is not None
    assert full.egress == EgressRules(OnDeny.ASK, transparent=True, worker=Worker.DEDICATED)
    assert full.rootfs == RootfsName(PurePosixPath("/srv/images/agent"))
    assert full.hide == (PurePosixPath("/usr/local"), PurePosixPath("/opt"))
    assert (full.risk, full.user, full.home, full.seccomp) == (Risk.HIGH, User.ROOT, Home.PERSISTENT, "strict")
    assert (full.landlock, full.on_supervisor_loss) == (Demand.REQUIRED, OnLoss.KILL)
    assert (full.degraded_ok, full.canary, full.version) == (frozenset({"idmap", "workspace-quota"}), True, 7)
    assert full.require == {"nftables"}
    assert full.env == {"A_B": "1"}


@pytest.mark.parametrize("key", ["require", "degraded_ok"])
def test_controls_are_those_of_the_table(key: str) -> None:
    with pytest.raises(InvalidDocument) as raised:
        policy(f"kind: Policy\nname: x\n{key}: [landlock, nftable, seccomp, descriptors]\n")
    unknown, fixed, advice = raised.value.problems
    assert (unknown.key, unknown.remedy) == (f"{key}[1]", "did you mean nftables?")
    assert "not for a policy to decide" in fixed.message
    assert "workspace-quota" in advice.remedy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scoeps: []", "f.yaml:3:1: scoeps: unknown key; did you mean scopes?"),
        ("limits: {memroy: 1GiB}", "f.yaml:3:10: limits.memroy: unknown key; did you mean memory?"),
        ("egress:\n  on_denny: ask", "f.yaml:4:3: egress.on_denny: unknown key; did you mean on_deny?"),
        ("risk: extreme", "f.yaml:3:1: risk: 'extreme' is none of minimal, limited, high"),
        ("limits: {memory: 1G}", "f.yaml:3:10: limits.memory: '1G' is not accepted; wanted: a size such as 512MiB"),
        ("limits: {memory: 5}", "f.yaml:3:10: limits.memory: '5' is not what belongs here"),
        ("limits: {memory: 1MiB}", "f.yaml:3:10: limits.memory: 1MiB is less than 16MiB"),
        ("limits: {memory: 1048577TiB}", "limits.memory: cannot read size"),
        ("limits: {pids: 3}", "limits.pids: '3' is not accepted; wanted: a whole number from 4"),
        ("limits: {pids: true}", "limits.pids"),
        ("limits: {cpus: 0}", "limits.cpus"),
        ("limits: {io_read: 1KiB}", "f.yaml:3:10: limits.io_read: 1KiB is less than 64KiB"),
        ("limits: {io_write: never}", "f.yaml:3:10: limits.io_write: 'never' is not what belongs here"),
        ("limits: {swap: none}", "limits.swap"),
        ("budget: {llm_tokens: -1}", "budget.llm_tokens"),
        ("budget: {wall_clock: 5}", "budget.wall_clock"),
        ("budget: {wall_clock: 999ms}", "budget"),
        ("budget: {cpu_seconds: soon}", "budget.cpu_seconds"),
        ("budget: {egress_bytes: 1.5}", "budget.egress_bytes"),
        ("budget: {egress_bytes: 1048577TiB}", "budget"),
        ("budget: {on_exhausted: warn}", "budget.on_exhausted"),
        ('scopes: ["llm:*", "ftp:x"]', "f.yaml:3:19: scopes[1]: cannot read scope"),
        ('scopes: ["http:GET:https://*.example.com/**"]', "scopes[0]: "),
        ("scopes: llm", "f.yaml:3:1: scopes: 'llm' is not what belongs here"),
        ("hide: [relative]", "hide[0]"),
        ("hide: [/a/../b]", "hide[0]"),
        ("rootfs: ../x", "f.yaml:3:1: rootfs"),
        ("env: {STOCKADE_AGENT_ID: x}", "env.STOCKADE_AGENT_ID: unknown key"),
        ("env: {A: 1}", "env.A"),
        ("version: 0", "version"),
        ("seccomp: ../x", "seccomp"),
        ("allow_root_owned: yes", "f.yaml:3:19: allow_root_owned: 'yes' means different things"),
        ("widen: {scopes: because}", "widen.scopes: names a key that is not wider here"),
        ("extends: nowhere", "f.yaml:3:1: extends: cannot extend nowhere: no policy nowhere"),
        (
            'scopes: ["llm:*"]\ngrants: {ceiling: []}',
            "f.yaml:3:10: scopes[0]: the scope llm:* is beyond grants.ceiling",
        ),
    ],
)
def test_what_is_refused_and_where(text: str, message: str) -> None:
    assert message in refusal(text)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "kind: Policy", "kind: Agent\nname: x", "name: x", "kind: Policy\nname: X"]
)
def test_what_is_no_policy(text: str) -> None:
    with pytest.raises(InvalidDocument):
        policy(text)


def test_every_problem_is_named_at_once() -> None:
    text = refusal('scopes: ["x", "y"]\nlimits: {memory: 1B, disk: 1B}')
    assert text.count("f.yaml:") == 4


def test_a_child_inherits_key_by_key_and_may_narrow_each() -> None:
    narrow = child("""
limits: {memory: 512MiB}
budget: {requests: 5}
scopes: ["llm:gpt-*"]
hide: [/usr/local, /opt]
egress: {worker: dedicated}
on_supervisor_loss: kill
landlock: required
degraded_ok: []
env: {B: "3"}
risk: high
""")
    rate = 10 << 20
    assert narrow.limits == Limits(
        memory_bytes=512 << 20, pids=100, io_read_bytes_per_second=rate, io_write_bytes_per_second=rate
    )
    assert narrow.budget == Budget(llm_tokens=1000, requests=5)
    assert narrow.scopes == (parse_scope("llm:gpt-*"),)
    assert narrow.ceiling == policy(PARENT).ceiling
    assert narrow.env == {"A": "1", "B": "3"}
    assert (narrow.extends, narrow.name) == ("parent", "child")


WIDER = [
    ("limits.memory", "limits: {memory: 2GiB}"),
    ("limits.cpus", "limits: {cpus: 2}"),
    ("limits.pids", "limits: {pids: 101}"),
    ("limits.disk", "limits: {disk: 2GiB}"),
    ("limits.open_files", "limits: {open_files: 4097}"),
    ("limits.output", "limits: {output: 65MiB}"),
    ("limits.swap", "limits: {swap: 1MiB}"),
    ("limits.io_read", "limits: {io_read: 11MiB}"),
    ("limits.io_write", "limits: {io_write: none}"),
    ("budget", "budget: {llm_tokens: 1001}"),
    ("scopes", 'scopes: ["http:GET,POST:https://a.example.com/**"]'),
    ("grants.ceiling", 'grants: {ceiling: ["llm:*", "http:GET:https://a.example.com/**", "tls:b.example.com:443"]}'),
    ("user", "user: root"),
    ("rootfs", "rootfs: /srv/image"),
    ("hide", "hide: []"),
    ("home", "home: persistent"),
    ("allow_root_owned", "allow_root_owned: true"),
    ("egress.on_deny", "egress: {on_deny: ask}"),
    ("egress.transparent", "egress: {transparent: true}"),
    ("degraded_ok", "degraded_ok: [landlock, idmap]"),
    ("seccomp", "seccomp: loose"),
    ("risk", "risk: minimal"),
]


@pytest.mark.parametrize(("key", "text"), WIDER)
def test_a_child_that_gives_more_must_say_why(key: str, text: str) -> None:
    with pytest.raises(InvalidDocument, match="wider than in parent") as raised:
        child(text)
    assert f"widen: {{{key}: …}}" in str(raised.value)
    assert raised.value.problems[0].position is not None
    assert raised.value.problems[0].position.line == 4
    said = child(f"{text}\nwiden: {{{key}: it is needed}}\n")
    assert said.widen == {key: "it is needed"}


@pytest.mark.parametrize(
    ("key", "above", "text"),
    [
        ("egress.worker", "egress: {worker: dedicated}", "egress: {worker: shared}"),
        ("landlock", "landlock: required", "landlock: preferred"),
        ("disk_quota", "disk_quota: required", "disk_quota: preferred"),
        ("on_supervisor_loss", "on_supervisor_loss: kill", "on_supervisor_loss: contain"),
        ("canary", "canary: true", "canary: false"),
        ("registered", "registered: required", "registered: optional"),
        ("require", "require: [landlock, nftables]", "require: [landlock]"),
        ("record.execs", "record: {execs: true, refusals: true}", "record: {execs: false}"),
        ("record.refusals", "record: {refusals: true}", "record: {refusals: false}"),
    ],
)
def test_a_child_may_not_undo_what_its_parent_demands(key: str, above: str, text: str) -> None:
    with pytest.raises(InvalidDocument, match=f"{key}: wider"):
        child(text, PARENT + above + "\n")
    assert child(f"{text}\nwiden: {{{key}: why not}}", PARENT + above + "\n").widen
    assert child("", PARENT + above + "\n")


def test_a_child_may_not_be_milder_when_a_budget_is_used_up() -> None:
    parent = PARENT.replace("budget: {llm_tokens: 1000}", "budget: {llm_tokens: 1000, on_exhausted: freeze}")
    assert child("", parent).on_exhausted is OnExhausted.FREEZE
    assert child("budget: {on_exhausted: kill}", parent).budget == Budget(1000)
    with pytest.raises(InvalidDocument, match=r"budget\.on_exhausted: wider"):
        child("budget: {on_exhausted: deny}", parent)


def test_each_key_that_can_be_wider_is_in_the_schema_and_has_its_case_above() -> None:
    patterns = SCHEMAS.policy.schema["properties"]["widen"]["patternProperties"]  # type: ignore[index]
    cases = {key for key, _ in WIDER} | {
        "egress.worker", "landlock", "disk_quota", "on_supervisor_loss", "canary", "require", "registered",
        "budget.on_exhausted", "record.execs", "record.refusals", "record.arguments",
    }  # fmt: skip
    everything = Policy(
        name="x", risk=Risk.MINIMAL, user=User.ROOT, rootfs=RootfsName(PurePosixPath("/x")), home=Home.PERSISTENT,
        allow_root_owned=True, limits=Limits(1 << 50, 99, 999, 1 << 50, 9999, 1 << 50, 1),
        scopes=(parse_scope("llm:*"),),
        egress=EgressRules(OnDeny.ASK, transparent=True, worker=Worker.SHARED), seccomp="x", landlock=Demand.PREFERRED,
        degraded_ok=frozenset({"x"}), on_supervisor_loss=OnLoss.CONTAIN, record=Record(arguments=0),
    )  # fmt: skip
    nothing = Policy(
        name="y", risk=Risk.HIGH, hide=(PurePosixPath("/x"),), budget=Budget(1),
        on_exhausted=OnExhausted.KILL, ceiling=(), canary=True,
        limits=Limits(io_read_bytes_per_second=1, io_write_bytes_per_second=1),
        require=frozenset({"landlock"}),
        egress=EgressRules(worker=Worker.DEDICATED), landlock=Demand.REQUIRED, on_supervisor_loss=OnLoss.KILL,
        disk_quota=Demand.REQUIRED, registered=Registered.REQUIRED, record=Record(execs=True, refusals=True),
    )  # fmt: skip
    found = set(wider(everything, nothing))
    assert found == cases
    (pattern,) = patterns
    assert all(f"{key}|".replace(".", "\\.").split("\\.")[-1].rstrip("|") in pattern for key in found)
    assert set(wider(nothing, everything)) == {"rootfs", "seccomp"}, "a different one is never taken for a narrower one"


def test_the_digest_is_of_what_has_an_effect() -> None:
    plain = policy("kind: Policy\nname: x\nscopes: ['llm:*']\n")
    assert policy("# other\nname: x\nkind: Policy\ndescription: words\nscopes: ['llm:*']\n").digest == plain.digest
    assert policy("kind: Policy\nname: x\nscopes: ['llm:g']\n").digest != plain.digest
    assert plain.digest.startswith("sha256:")
    assert len(plain.digest) == 71


def test_what_the_registry_asks_of_an_agent() -> None:
    plain = agent("command: [id]")
    assert (plain.risk, plain.models, plain.data, plain.contact, plain.deprecated) == (None, (), (), "", "")
    full = agent(
        "command: [id]\nrisk: high\nmodels: ['gpt-*']\ndata: [tickets]\ncontact: a@b.example\ndeprecated: old\n"
        "scopes: ['llm:gpt-5']"
    )
    assert (full.risk, full.models, full.data) == (Risk.HIGH, ("gpt-*",), ("tickets",))
    assert (full.contact, full.deprecated) == ("a@b.example", "old")
    assert full.digest != plain.digest


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("risk: prohibited", "Article 5"),
        ("risk: unacceptable", "none of prohibited, high, limited, minimal"),
        ("models: ['gpt-*']\nscopes: ['llm:*']", "not among `models`"),
        ("models: ['a b']", "models"),
        ('contact: "a\\nb"', "contact"),
        ("deprecated: true", "deprecated"),
        ("data: nothing", "data"),
        ("risks: high", "did you mean risk"),
    ],
)
def test_what_the_registry_does_not_take(text: str, said: str) -> None:
    with pytest.raises(InvalidDocument, match=re.escape(said)):
        agent(f"command: [id]\n{text}")


def test_an_agent() -> None:
    spec = agent("""
version: 3
owner: team-observability
purpose: finds causes in service logs
policy: default
command: [python3, agent.py]
workspace: {path: /srv/logs, mode: ro}
labels: {team: observability}
budget: {llm_tokens: 200000, cost_usd: 2}
scopes: ["http:GET:https://status.example.com/**"]
limits: {memory: 512MiB}
""")
    assert (spec.name, spec.version, spec.policy, spec.command) == ("a", 3, "default", ("python3", "agent.py"))
    assert spec.workspace is not None
    assert (spec.workspace.path, spec.workspace.writable) == (PurePosixPath("/srv/logs"), False)
    assert spec.budget == Budget(200000, 2_000_000)
    assert spec.limits == LimitsWanted(memory_bytes=512 << 20)
    assert spec.labels == {"team": "observability"}


def test_a_relative_workspace_is_relative_to_the_directory_of_the_file() -> None:
    def workspace(path: str, directory: PurePosixPath | None) -> PurePosixPath | None:
        text = f"kind: Agent\nname: a\ncommand: [x]\nworkspace: {{path: {path}}}\n"
        found = parse_agent(text, source="f.yaml", schemas=SCHEMAS, directory=directory).workspace
        return found.path if found else None

    assert workspace("logs", PurePosixPath("/srv")) == PurePosixPath("/srv/logs")
    assert workspace(".", PurePosixPath("/srv")) == PurePosixPath("/srv")
    assert workspace("/abs", PurePosixPath("/srv")) == PurePosixPath("/abs")
    with pytest.raises(InvalidDocument, match="is relative"):
        workspace("logs", None)
    for bad in ("../x", "a/../../etc", "a//b", "''"):
        with pytest.raises(InvalidDocument, match=r"workspace\.path"):
            workspace(bad, PurePosixPath("/srv"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("", "command"), ("command: ls", "command"), ("command: []", "command"), ("command: [1]", "command[0]"),
        ("command: [x]\nworkspace: {path: logs}", "workspace.path"), ("command: [x]\nworkspace: {mode: ro}", "path"),
        ("command: [x]\nlabels: {T: x}", "labels.T"), ("command: [x]\npolcy: y", "did you mean policy?"),
        ("command: [x]\nscopes: [x]", "scopes[0]"), ("command: [x]\nbudget: {tokens: 1}", "budget.tokens"),
    ],
)  # fmt: skip
def test_agents_that_are_refused(text: str, key: str) -> None:
    with pytest.raises(InvalidDocument) as raised:
        agent(text)
    assert key in str(raised.value)


sizes = st.integers(16, 4096).map(lambda count: f"{count}MiB")
documents = st.fixed_dictionaries(
    {},
    optional={
        "version": st.integers(1, 9),
        "risk": st.sampled_from(["minimal", "limited", "high"]),
        "user": st.sampled_from(["agent", "root"]),
        "rootfs": st.sampled_from(["host", "/srv/image"]),
        "hide": st.lists(st.sampled_from(["/opt", "/usr/local"]), max_size=2),
        "limits": st.fixed_dictionaries({}, optional={"memory": sizes, "disk": sizes, "pids": st.integers(4, 99)}),
        "budget": st.fixed_dictionaries(
            {},
            optional={
                "llm_tokens": st.integers(0, 99),
                "cost_usd": st.sampled_from([0, 1, 0.25, 12.5]),
                "wall_clock": st.sampled_from(["1s", "1h30m", "1.5s"]),
                "cpu_seconds": st.sampled_from(["90s", 1, 2.5]),
                "egress_bytes": st.sampled_from(["100MiB", "1B", 0, 4096]),
                "on_exhausted": st.sampled_from(["deny", "freeze", "kill"]),
            },
        ),
        "scopes": st.lists(
            st.sampled_from(["llm:*", "llm:gpt-*", "fs:ro:/srv/x=/data", "tls:a.example.com:443"]), unique=True
        ),
        "egress": st.fixed_dictionaries({}, optional={"transparent": st.booleans()}),
        "env": st.dictionaries(st.sampled_from(["A", "B_1"]), st.text("xyz \n\"'", max_size=5)),
        "landlock": st.sampled_from(["required", "preferred"]),
        "degraded_ok": st.lists(st.sampled_from(["idmap", "landlock"]), unique=True),
        "require": st.lists(st.sampled_from(["nftables", "workspace-quota"]), unique=True),
        "canary": st.booleans(),
        "registered": st.sampled_from(["required", "optional"]),
        "record": st.fixed_dictionaries(
            {}, optional={"execs": st.booleans(), "refusals": st.booleans(), "arguments": st.integers(0, 16)}
        ),
    },
)


@given(documents)
def test_what_is_shown_of_a_policy_is_the_policy(values: dict[str, object]) -> None:
    first = policy(json.dumps({"kind": "Policy", "name": "x", **values}))
    again = policy(policy_yaml(first))
    assert again.digest == first.digest
    assert again == first


@given(st.text("kindPolcynamex: []{}\n-,'\"*&1scope", max_size=60))
def test_any_text_is_a_policy_or_bad_input(text: str) -> None:
    for candidate in (text, "kind: Policy\nname: x\n" + text):
        with contextlib.suppress(InvalidDocument):
            assert policy(candidate).digest


EMBEDDED = GatewayConfig()
CLOSED = GatewayConfig(kind=GatewayKind.LITELLM)


def write(directory: Path, name: str, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.yaml").write_text(f"kind: Policy\nname: {name}\n{text}\n")


def test_the_shelf_always_has_default(tmp_path: Path) -> None:
    shelf = PolicyShelf([tmp_path / "missing"], gateway=EMBEDDED)
    assert shelf.get("default").scopes == (parse_scope("llm:*"),)
    with pytest.raises(NotFound, match="choose one of") as raised:
        shelf.get("defualt")
    assert "default" in raised.value.remedy


def test_an_earlier_directory_overrides_a_later_one(tmp_path: Path) -> None:
    write(tmp_path / "a", "mine", "limits: {pids: 10}")
    write(tmp_path / "b", "mine", "limits: {pids: 20}")
    write(tmp_path / "b", "default", "scopes: []")
    shelf = PolicyShelf([tmp_path / "a", tmp_path / "b"], gateway=EMBEDDED)
    assert shelf.get("mine").limits.pids == 10
    assert shelf.get("default").scopes == ()


@pytest.mark.parametrize("text", ["scoeps: []", "extends: nowhere", "user: root\nextends: default", "{", "name: x"])
def test_a_broken_override_never_falls_back(tmp_path: Path, text: str) -> None:
    write(tmp_path, "default", text)
    write(tmp_path, "other", "scopes: ['llm:*']")
    shelf = PolicyShelf([tmp_path], gateway=EMBEDDED)
    with pytest.raises(InvalidInput, match=r"default\.yaml"):
        shelf.get("default")
    assert "default" in [broken.name for broken in shelf.broken()]
    assert shelf.get("other").name == "other"
    write(tmp_path, "default", "scopes: []")
    shelf.load()
    assert shelf.get("default").scopes == ()


def test_what_extends_something_broken_is_broken(tmp_path: Path) -> None:
    write(tmp_path, "default", "scoeps: []")
    shelf = PolicyShelf([tmp_path], gateway=EMBEDDED)
    with pytest.raises(InvalidInput, match=r"cannot extend default.*default\.yaml is broken"):
        shelf.get("python-agent")


def test_a_circle_and_a_tower_of_extends(tmp_path: Path) -> None:
    write(tmp_path, "a", "extends: b")
    write(tmp_path, "b", "extends: a")
    write(tmp_path, "self", "extends: self")
    for number in range(12):
        write(tmp_path, f"t{number:02}", f"extends: t{number + 1:02}" if number < 11 else "")
    shelf = PolicyShelf([tmp_path], gateway=EMBEDDED)
    for name in ("a", "b", "self", "t00", "t02"):
        with pytest.raises(InvalidInput, match="cannot extend"):
            shelf.get(name)
    for name in ("t11", "t05", "t03"):
        assert shelf.get(name)


def test_a_file_must_be_named_as_its_policy(tmp_path: Path) -> None:
    write(tmp_path, "x", "")
    (tmp_path / "y.yaml").write_text("kind: Policy\nname: x\n")
    shelf = PolicyShelf([tmp_path], gateway=EMBEDDED)
    assert shelf.get("x")
    with pytest.raises(InvalidInput, match="but the file is"):
        shelf.get("y")


def test_files_that_are_not_trusted_or_not_files(tmp_path: Path) -> None:
    write(tmp_path, "open", "")
    (tmp_path / "open.yaml").chmod(0o666)
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "dir.yaml").mkdir()
    (tmp_path / "dangling.yaml").symlink_to(tmp_path / "nowhere")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    (tmp_path / "big.yaml").write_bytes(b"#" * 70_000)
    (tmp_path / "note.txt").write_text("not looked at")
    shelf = PolicyShelf([tmp_path], gateway=EMBEDDED)
    causes = {broken.name: str(broken.error) for broken in shelf.broken()}
    assert set(causes) == {"open", "fifo", "dir", "dangling", "latin", "big"}
    assert "chmod o-w" in causes["open"]
    assert "not a regular file" in causes["fifo"]


def test_scopes_that_no_exit_serves_are_an_error_at_check(tmp_path: Path) -> None:
    text = "kind: Policy\nname: x\nscopes: ['tls:a.example.com:443']\n"
    assert PolicyShelf([], gateway=EMBEDDED).check(text, source="x.yaml")
    with pytest.raises(InvalidInput, match="forward_proxy"):
        PolicyShelf([], gateway=CLOSED).check(text, source="x.yaml")
    (tmp_path / "x.yaml").write_text(text)
    assert [broken.name for broken in PolicyShelf([tmp_path], gateway=CLOSED).broken()] == ["x"]


def test_a_seccomp_profile_that_is_not_there_is_an_error_at_check() -> None:
    with pytest.raises(InvalidInput, match=r"no seccomp profile strictest; choose one of .*default"):
        PolicyShelf([], gateway=EMBEDDED).check("kind: Policy\nname: x\nseccomp: strictest\n", source="x.yaml")


def test_check_judges_both_kinds(tmp_path: Path) -> None:
    shelf = PolicyShelf([tmp_path], gateway=EMBEDDED)
    assert isinstance(shelf.check("kind: Agent\nname: a\ncommand: [x]\n", source="a.yaml"), AgentSpec)
    assert isinstance(shelf.check("kind: Policy\nname: p\nextends: default\n", source="p.yaml"), Policy)
    with pytest.raises(NotFound):
        shelf.check("kind: Agent\nname: a\ncommand: [x]\npolicy: nowhere\n", source="a.yaml")
    relative = "kind: Agent\nname: a\ncommand: [x]\nworkspace: {path: logs}\n"
    assert shelf.check(relative, source="a.yaml", directory=PurePosixPath("/srv"))
    with pytest.raises(InvalidDocument, match="is relative"):
        shelf.check(relative, source="a.yaml")


@pytest.mark.parametrize("name", ["default", "coding-agent", "python-agent", "claude-code", "codex", "high-risk"])
def test_every_shipped_policy_works_behind_a_gateway_without_forward_proxy(name: str) -> None:
    assert PolicyShelf([], gateway=CLOSED).get(name).name == name


@pytest.mark.parametrize(
    ("text", "path", "selector"),
    [
        ("/srv/root", "/srv/root", ""),
        ("/srv/image.tar#v1.2", "/srv/image.tar", "v1.2"),
        ("/srv/image#example.com:5000/team/image:v1", "/srv/image", "example.com:5000/team/image:v1"),
        ("/srv/image@sha256:" + "a" * 64, "/srv/image", "sha256:" + "a" * 64),
        ("/srv/a#b#c", "/srv/a#b", "c"),
        ("/srv/a#", "/srv/a#", ""),
        ("/srv/a@sha256:12", "/srv/a@sha256:12", ""),
        ("/srv/a#b c", "/srv/a#b c", ""),
    ],
)
def test_a_rootfs_names_a_path_and_perhaps_one_image_of_it(text: str, path: str, selector: str) -> None:
    name = RootfsName.parse(text)
    assert name == RootfsName(PurePosixPath(path), selector)
    assert str(name) == text
