"""The registry: versions that never change, references, and what a launch by a definition may and may not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest

from gateway_client.egress.scope import parse_scope
from supervisord.actions.types import Action, CannotRecord, Entry
from supervisord.definitions import Definition, DefinitionRow, check_registered, reach, read_reference, registered_as
from supervisord.errors import Conflict, Exhausted, InvalidInput, NotFound, PermissionDenied, StockadeError
from supervisord.plan import LaunchOrder
from supervisord.policies import load_schemas
from supervisord.policy import AgentSpec, LimitsWanted, Policy, Registered, Workspace
from supervisord.policy_reader import parse_agent
from supervisord.registry import Registry
from supervisord.store import Store

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SCHEMAS = load_schemas()
TEXT = "kind: Agent\nname: reader\nversion: {version}\ncommand: [id]\nowner: a\npurpose: b\n{more}"


def read(text: str, source: str = "f.yaml", directory: PurePosixPath | None = None) -> AgentSpec:
    return parse_agent(text, source=source, schemas=SCHEMAS, directory=directory)


class Log:
    def __init__(self) -> None:
        self.entries: list[Action] = []
        self.full = False

    async def record(self, action: Action) -> Entry:
        if self.full:
            raise CannotRecord("cannot record: the disk is full")
        self.entries.append(action)
        return Entry(len(self.entries), 0, action, b"")


class Bench:
    """A registry on a store that can be opened again."""

    def __init__(self, path: Path) -> None:
        self.path, self.log = path, Log()

    async def open(self) -> Registry:
        self.store = await Store.open(self.path, boot_id="one")
        rows = await self.store.definitions()
        return Registry(rows, store=self.store, record=self.log.record, read=read, now_ns=lambda: 7)

    async def add(self, registry: Registry, version: int, more: str = "") -> tuple[Definition, bool]:
        text = TEXT.format(version=version, more=more)
        return await registry.add(text, read(text), directory="", actor="uid:0(root)")


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path / "state.db")
    yield bench
    await bench.store.close()


async def test_a_version_never_changes_and_outlives_the_daemon(bench: Bench) -> None:
    registry = await bench.open()
    made, existed = await bench.add(registry, 1)
    assert (made.reference, existed) == ("reader@1", False)
    assert (await bench.add(registry, 1))[1]
    with pytest.raises(Conflict, match="another content") as caught:
        await bench.add(registry, 1, "risk: high\n")
    assert "version: 2" in caught.value.remedy
    await bench.add(registry, 2, "risk: high\n")
    assert [(e.verb, e.object, e.details["digest"]) for e in bench.log.entries] == [
        ("registry.add", "reader@1", made.row.digest),
        ("registry.add", "reader@2", registry.find("reader@2").row.digest),
    ]
    await bench.store.close()
    again = await bench.open()
    assert again.rows() == registry.rows()
    assert [each.row for each in await again.definitions(again.rows())] == again.rows()
    assert again.find("reader@2").spec.digest == registry.find("reader@2").spec.digest
    with pytest.raises(Conflict, match="another content"):
        await bench.add(again, 1, "risk: high\n")


async def test_the_same_file_elsewhere_is_another_agent(bench: Bench) -> None:
    registry = await bench.open()
    text = TEXT.format(version=1, more="workspace: {path: data}\n")
    here, there = PurePosixPath("/srv/a"), PurePosixPath("/srv/b")
    await registry.add(text, read(text, directory=here), directory="/srv/a", actor="x")
    with pytest.raises(Conflict):
        await registry.add(text, read(text, directory=there), directory="/srv/b", actor="x")


async def test_deprecation_keeps_the_version_and_the_newest_other_is_meant(bench: Bench) -> None:
    registry = await bench.open()
    for version in (1, 2, 10):
        await bench.add(registry, version)
    assert registry.find("reader").reference == "reader@10"
    await registry.deprecate("reader@10", actor="ada", reason="too eager")
    assert registry.find("reader").reference == "reader@2"
    assert registry.find("reader@10").row.deprecated == "too eager"
    with pytest.raises(Conflict, match="by ada"):
        await registry.deprecate("reader@10", actor="bob", reason="me too")
    with pytest.raises(InvalidInput, match="which version"):
        await registry.deprecate("reader", actor="ada", reason="x")
    with pytest.raises(InvalidInput, match="no reason"):
        await registry.deprecate("reader@1", actor="ada", reason="")
    with pytest.raises(NotFound, match="reader@3"):
        await registry.deprecate("reader@3", actor="ada", reason="x")
    for version in (1, 2):
        await registry.deprecate(f"reader@{version}", actor="ada", reason="x")
    assert registry.find("reader").reference == "reader@10"  # all are: the newest, so that it can be looked at
    await bench.store.close()
    assert (await bench.open()).find("reader@10").row.deprecated_by == "ada"


async def test_what_cannot_be_recorded_is_not_done(bench: Bench) -> None:
    registry = await bench.open()
    await bench.add(registry, 1)
    bench.log.full = True
    with pytest.raises(CannotRecord):
        await bench.add(registry, 2)
    with pytest.raises(CannotRecord):
        await registry.deprecate("reader@1", actor="ada", reason="x")
    assert [(each.reference, each.deprecated) for each in registry.rows()] == [("reader@1", "")]
    assert len(await bench.store.definitions()) == 1


async def test_a_kept_text_that_cannot_be_read_any_more_is_shown_and_not_launched(bench: Bench) -> None:
    registry = await bench.open()
    made, _ = await bench.add(registry, 1)
    await bench.store.save_definition(replace(made.row, version=2, text="kind: Agent\nfrom: the future\n"))
    await bench.store.close()
    broken = (await bench.open()).find("reader@2")
    assert "unknown key" in broken.problem
    with pytest.raises(InvalidInput, match="unknown key"):
        registered_as(broken, LaunchOrder(command=()), Policy(name="default"))


async def test_a_text_that_was_changed_in_the_database_is_not_launched(bench: Bench) -> None:
    registry = await bench.open()
    made, _ = await bench.add(registry, 1)
    other = TEXT.format(version=2, more="").replace("[id]", "[sh]")
    await bench.store.save_definition(replace(made.row, version=2, text=other))
    await bench.store.close()
    registry = await bench.open()
    assert registry.find("reader@1").problem == ""
    assert "not what was registered" in registry.find("reader@2").problem


async def test_the_registry_is_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisord.registry.DEFINITIONS_MAX", 2)
    registry = await bench.open()
    for version in (1, 2):
        await bench.add(registry, version)
    with pytest.raises(Exhausted):
        await bench.add(registry, 3)
    assert (await bench.add(registry, 2))[1]


@pytest.mark.parametrize(
    "text", ["", "@1", "a@", "a@0", "a@-1", "a@1@2", "A", "../etc", "a@99999999999", "a\n", "a@1\n"]
)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(InvalidInput):
        read_reference(text)


SPEC = AgentSpec(
    name="reader",
    owner="a",
    command=("id",),
    scopes=(parse_scope("http:GET:https://a.example/**"), parse_scope("fs:ro:/srv/x"), parse_scope("mcp:git/*")),
    limits=LimitsWanted(memory_bytes=1 << 28),
    workspace=Workspace(PurePosixPath("/srv/w"), writable=True),
    env={"A": "1"},
)
ROW = DefinitionRow("reader", 3, "sha256:x", "", "", "uid:0(root)", 1)
ORDER = LaunchOrder(
    command=("id",), owner="a", scopes=SPEC.scopes, limits=SPEC.limits, workspace=SPEC.workspace, env={"A": "1"}
)
OPEN = Policy(name="default", scopes=(parse_scope("llm:*"),))
CLOSED = replace(OPEN, registered=Registered.REQUIRED)


def judged(order: LaunchOrder, policy: Policy = CLOSED, row: DefinitionRow = ROW) -> None:
    check_registered(registered_as(Definition(row, SPEC), order, policy), policy)


def test_a_launch_by_the_definition_as_it_is() -> None:
    judged(ORDER)
    assert registered_as(Definition(ROW, SPEC), ORDER, CLOSED).reference == "reader@3"


@pytest.mark.parametrize(
    "less",
    [
        replace(ORDER, scopes=(parse_scope("http:GET:https://a.example/x"), parse_scope("llm:gpt"))),
        replace(ORDER, limits=LimitsWanted(memory_bytes=1 << 27)),
        replace(ORDER, workspace=None),
        replace(ORDER, workspace=Workspace(PurePosixPath("/srv/w"), writable=False)),
        replace(ORDER, workspace=Workspace(PurePosixPath("/srv/w"), writable=False, overlay=True)),
        replace(ORDER, name="another", labels={"run": "7"}),
    ],
)
def test_a_launch_may_ask_for_less(less: LaunchOrder) -> None:
    judged(less)


@pytest.mark.parametrize(
    "more",
    [
        replace(ORDER, scopes=(*SPEC.scopes, parse_scope("tls:b.example:443"))),
        replace(ORDER, limits=LimitsWanted(memory_bytes=1 << 29)),
        replace(ORDER, workspace=Workspace(PurePosixPath("/etc"), writable=False)),
    ],
)
def test_one_that_asks_for_more_is_refused_where_the_policy_takes_registered_agents_only(more: LaunchOrder) -> None:
    judged(more, OPEN)
    with pytest.raises(PermissionDenied, match="more than its definition"):
        judged(more)


@pytest.mark.parametrize(
    ("other", "key"),
    [
        (replace(ORDER, command=("sh",)), "command"),
        (replace(ORDER, policy="coding-agent"), "policy"),
        (replace(ORDER, env={"A": "2"}), "env"),
        (replace(ORDER, owner="mallory"), "owner"),
        (replace(ORDER, purpose="another"), "purpose"),
    ],
)
@pytest.mark.parametrize("policy", [OPEN, CLOSED])
def test_one_that_is_another_agent_is_always_refused(other: LaunchOrder, key: str, policy: Policy) -> None:
    with pytest.raises(PermissionDenied, match=f"another {key}"):
        judged(other, policy)


def test_unregistered_and_deprecated_agents_where_the_policy_refuses_them() -> None:
    check_registered(None, OPEN)
    with pytest.raises(PermissionDenied, match="registered agents only") as caught:
        check_registered(None, CLOSED)
    assert "registry add" in caught.value.remedy
    old = replace(ROW, deprecated="superseded")
    judged(ORDER, OPEN, old)
    with pytest.raises(PermissionDenied, match="superseded"):
        judged(ORDER, CLOSED, old)


def test_reach_is_of_policy_and_definition_and_workspace() -> None:
    found = reach(SPEC, OPEN)
    assert found.files == ("rw:/srv/w", "ro:/srv/x")
    assert (found.hosts, found.models, found.tools) == (("a.example:443",), ("*",), ("git/*",))
    assert reach(AgentSpec(name="x"), None).files == ()


def test_every_error_says_what_to_do() -> None:
    for act in (lambda: judged(replace(ORDER, command=("sh",))), lambda: read_reference("A")):
        with pytest.raises(StockadeError) as caught:
            act()
        assert caught.value.message.startswith("cannot ")
        assert caught.value.remedy
