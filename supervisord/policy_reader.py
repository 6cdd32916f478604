"""Policies and agents out of YAML: checked by JSON Schema, then by meaning (pure: text and schemas are passed in)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import PurePosixPath
from typing import Final, Self, TypeVar, cast

from jsonschema import Draft202012Validator

from gateway_client.egress.scope import BadScope, LlmScope, Scope, format_scope, includes, parse_scope
from sandbox.controls import BY_NAME, NEGOTIABLE
from sandbox.plan import NO_RATE, Record
from supervisord.budgets import NO_BUDGET, Budget, parse_budget
from supervisord.documents import (
    Document,
    InvalidDocument,
    Path,
    Problem,
    Value,
    check_schema,
    nearest,
    parse_document,
)
from supervisord.errors import StockadeError
from supervisord.ids import shown
from supervisord.policy import (
    NO_RATE_WORD,
    AgentSpec,
    EgressRules,
    GrantRules,
    LimitsWanted,
    Policy,
    Risk,
    RootfsName,
    Workspace,
    digest,
    effect,
    wider,
)
from supervisord.sizes import format_duration, format_size, parse_duration, parse_size

MEMORY_BYTES_MIN: Final = 16 << 20
DISK_BYTES_MIN: Final = 1 << 20
OUTPUT_BYTES_MIN: Final = 64 << 10
RATE_BYTES_MIN: Final = 64 << 10
HOLD_SECONDS_MIN: Final = 1.0
HOLD_SECONDS_MAX: Final = 300.0
ASK_AGAIN_SECONDS_MAX: Final = 30 * 86400.0
PROHIBITED: Final = "prohibited"


@dataclass(frozen=True, slots=True)
class Schemas:
    """The compiled JSON Schemas of both kinds of document."""

    policy: Draft202012Validator
    agent: Draft202012Validator

    @classmethod
    def compiled(cls, policy: Mapping[str, object], agent: Mapping[str, object]) -> Self:
        for schema in (policy, agent):
            Draft202012Validator.check_schema(schema)
        return cls(Draft202012Validator(policy), Draft202012Validator(agent))


E = TypeVar("E", bound=Enum)


class _Reader:
    """Turns the checked mapping of a document into typed values and collects what is wrong with them."""

    def __init__(self, document: Document, root: Mapping[str, Value]) -> None:
        self.document = document
        self.root = root
        self.problems: list[Problem] = []

    def get(self, path: Path) -> Value:
        """Gives the value at the path, None where there is none; the schema has already settled its type."""
        value: Value = dict(self.root)
        for part in path:
            value = value.get(str(part)) if isinstance(value, dict) else None
        return value

    def problem(self, path: Path, message: str, remedy: str = "") -> None:
        self.problems.append(self.document.problem(path, message, remedy))

    def text(self, key: str, default: str) -> str:
        value = self.get((key,))
        return value if isinstance(value, str) else default

    def texts(self, key: str) -> Mapping[str, str]:
        value = self.get((key,))
        return cast("dict[str, str]", value) if isinstance(value, dict) else {}

    def flag(self, path: Path, *, default: bool) -> bool:
        value = self.get(path)
        return value if isinstance(value, bool) else default

    def whole(self, path: Path, default: int) -> int:
        value = self.get(path)
        return value if isinstance(value, int) else default

    def one_of(self, path: Path, default: E) -> E:
        value = self.get(path)
        return default if value is None else type(default)(value)

    def size(self, path: Path, default: int | None, least: int) -> int | None:
        value = self.get(path)
        if not isinstance(value, str):
            return default
        try:
            size = parse_size(value)
        except StockadeError as error:
            self.problem(path, error.message, error.remedy)
            return default
        if size < least:
            self.problem(path, f"{value} is less than {format_size(least)}", "an agent cannot start with that")
        return size

    def duration(self, path: Path, default: float, least: float, most: float) -> float:
        value = self.get(path)
        if not isinstance(value, str):
            return default
        try:
            seconds = parse_duration(value)
        except StockadeError as error:
            self.problem(path, error.message, error.remedy)
            return default
        if not least <= seconds <= most:
            self.problem(path, f"{value} is not from {format_duration(least)} to {format_duration(most)}")
        return seconds

    def limits(self) -> LimitsWanted:
        cpus = self.get(("limits", "cpus"))
        pids = self.get(("limits", "pids"))
        open_files = self.get(("limits", "open_files"))
        return LimitsWanted(
            memory_bytes=self.size(("limits", "memory"), None, MEMORY_BYTES_MIN),
            cpus=float(cpus) if isinstance(cpus, int | float) else None,
            pids=pids if isinstance(pids, int) else None,
            disk_bytes=self.size(("limits", "disk"), None, DISK_BYTES_MIN),
            open_files=open_files if isinstance(open_files, int) else None,
            output_bytes=self.size(("limits", "output"), None, OUTPUT_BYTES_MIN),
            swap_bytes=self.size(("limits", "swap"), None, 0),
            io_read_bytes_per_second=self.rate(("limits", "io_read")),
            io_write_bytes_per_second=self.rate(("limits", "io_write")),
        )

    def rate(self, path: Path) -> int | None:
        if self.get(path) == NO_RATE_WORD:
            return NO_RATE
        size = self.size(path, None, RATE_BYTES_MIN)
        return size if size is None else min(size, NO_RATE)

    def budget(self) -> Budget:
        value = self.get(("budget",))
        if not isinstance(value, dict):
            return NO_BUDGET
        try:
            return parse_budget({key: amount for key, amount in value.items() if key != "on_exhausted"})
        except StockadeError as error:
            self.problem(("budget",), error.message, error.remedy)
            return NO_BUDGET

    def scopes(self, path: Path) -> tuple[Scope, ...] | None:
        value = self.get(path)
        if not isinstance(value, list):
            return None
        scopes: dict[Scope, None] = {}
        for index, text in enumerate(value):
            try:
                scopes[parse_scope(str(text))] = None
            except BadScope as error:
                self.problem((*path, index), str(error))
        return tuple(scopes)

    def workspace(self, directory: PurePosixPath | None) -> Workspace | None:
        text = self.get(("workspace", "path"))
        if not isinstance(text, str):
            return None
        path = PurePosixPath(text) if directory is None else directory / text
        if not path.is_absolute():
            self.problem(("workspace", "path"), "is relative, and nothing says to what", "write an absolute path")
        mode = self.get(("workspace", "mode"))
        return Workspace(path, writable=mode == "rw", overlay=mode == "overlay")

    def paths(self, key: str) -> tuple[PurePosixPath, ...] | None:
        value = self.get((key,))
        return tuple(PurePosixPath(str(path)) for path in value) if isinstance(value, list) else None

    def list_of_texts(self, key: str) -> tuple[str, ...]:
        value = self.get((key,))
        return tuple(dict.fromkeys(map(str, value))) if isinstance(value, list) else ()

    def risk_class(self) -> Risk | None:
        """Gives the class of an agent; one that nobody may run at all is a problem."""
        value = self.get(("risk",))
        if value == PROHIBITED:
            self.problem(
                ("risk",),
                "prohibited practices (Article 5 of the EU AI Act) are neither registered nor run",
                "change what the agent is for, then its class: high, limited or minimal",
            )
            return None
        return None if value is None else Risk(value)

    def controls(self, key: str) -> frozenset[str] | None:
        """Gives the controls that a policy names; one that no policy decides on is a problem."""
        value = self.get((key,))
        if not isinstance(value, list):
            return None
        for index, name in enumerate(map(str, value)):
            if name in NEGOTIABLE:
                continue
            if name in BY_NAME:
                self.problem(
                    (key, index),
                    f"{name} is not for a policy to decide: without it nothing is launched, or it confines no agent",
                    f"leave it out; a policy decides on {', '.join(NEGOTIABLE)}",
                )
            else:
                self.problem((key, index), f"there is no control {shown(name)}", nearest(name, NEGOTIABLE))
        return frozenset(map(str, value))

    def done(self, what: str) -> None:
        if self.problems:
            raise InvalidDocument(what, self.problems)


def parse_policy(text: str, *, source: str, schemas: Schemas, parent: Callable[[str], Policy]) -> Policy:
    """Gives the policy of a YAML text, `extends` followed; raises InvalidDocument with every problem.

    `parent` gives a policy by name and raises a StockadeError for one that is missing or broken.
    """
    document = parse_document(text, source=source, what="policy")
    read = _Reader(document, check_schema(document, schemas.policy, what="policy"))
    name = read.text("name", "")
    extends = read.get(("extends",))
    base = Policy(name=name)
    if isinstance(extends, str):
        try:
            base = parent(extends)
        except StockadeError as error:
            read.problem(("extends",), f"cannot extend {extends}: {error.message}", error.remedy)
            read.done("policy")
    policy = _policy(read, base)
    ceiling = policy.ceiling
    for index, scope in enumerate(policy.scopes):
        if ceiling is not None and not any(includes(wide, scope) for wide in ceiling):
            at: Path = ("scopes", index) if read.get(("scopes",)) is not None else ("grants", "ceiling")
            read.problem(
                at, f"the scope {format_scope(scope)} is beyond grants.ceiling", "narrow it or widen the ceiling"
            )
    _check_extends(read, policy, base, extends=isinstance(extends, str))
    read.done("policy")
    return replace(policy, digest=digest(effect(policy)))


def parse_agent(text: str, *, source: str, schemas: Schemas, directory: PurePosixPath | None = None) -> AgentSpec:
    """Gives the agent of a YAML text; raises InvalidDocument with every problem.

    `directory` is the absolute one that a relative `workspace.path` is relative to; None refuses relative ones.
    """
    document = parse_document(text, source=source, what="agent")
    read = _Reader(document, check_schema(document, schemas.agent, what="agent"))
    command = read.get(("command",))
    workspace = read.workspace(directory)
    agent = AgentSpec(
        name=read.text("name", ""),
        version=read.whole(("version",), 1),
        owner=read.text("owner", ""),
        purpose=read.text("purpose", ""),
        policy=read.text("policy", "default"),
        command=tuple(str(part) for part in command) if isinstance(command, list) else (),
        workspace=workspace,
        labels=read.texts("labels"),
        limits=read.limits(),
        budget=read.budget(),
        scopes=read.scopes(("scopes",)) or (),
        env=read.texts("env"),
        risk=read.risk_class(),
        models=read.list_of_texts("models"),
        data=read.list_of_texts("data"),
        contact=read.text("contact", ""),
        deprecated=read.text("deprecated", ""),
        source=source,
    )
    for index, scope in enumerate(agent.scopes):
        if agent.models and isinstance(scope, LlmScope) and not within_models(scope, agent.models):
            read.problem(("scopes", index), f"{format_scope(scope)} is not among `models`", "correct one of the two")
    read.done("agent")
    return replace(agent, digest=digest(dict(document.value) if isinstance(document.value, dict) else {}))


def within_models(scope: LlmScope, models: tuple[str, ...]) -> bool:
    """Tells whether all that an `llm:` scope gives is among these models (globs)."""
    return any(includes(LlmScope(glob), scope) for glob in models)


def _policy(read: _Reader, base: Policy) -> Policy:
    wanted = read.limits()
    chosen = {f.name: v for f in fields(wanted) if (v := getattr(wanted, f.name)) is not None}
    rootfs = read.get(("rootfs",))
    ceiling = read.scopes(("grants", "ceiling"))
    scopes = read.scopes(("scopes",))
    hide = read.paths("hide")
    require, degraded_ok = read.controls("require"), read.controls("degraded_ok")
    extends = read.get(("extends",))
    return Policy(
        name=read.text("name", ""),
        version=read.whole(("version",), 1),
        description=read.text("description", ""),
        risk=read.one_of(("risk",), base.risk),
        extends=extends if isinstance(extends, str) else None,
        widen=read.texts("widen"),
        user=read.one_of(("user",), base.user),
        rootfs=base.rootfs if rootfs is None else None if rootfs == "host" else RootfsName.parse(str(rootfs)),
        hide=base.hide if hide is None else hide,
        home=read.one_of(("home",), base.home),
        allow_root_owned=read.flag(("allow_root_owned",), default=base.allow_root_owned),
        allow_sockets=read.flag(("allow_sockets",), default=base.allow_sockets),
        shared_workspace=read.flag(("shared_workspace",), default=base.shared_workspace),
        limits=replace(base.limits, **chosen),
        budget=read.budget().over(base.budget),
        on_exhausted=read.one_of(("budget", "on_exhausted"), base.on_exhausted),
        scopes=base.scopes if scopes is None else scopes,
        ceiling=base.ceiling if ceiling is None else ceiling,
        egress=EgressRules(
            read.one_of(("egress", "on_deny"), base.egress.on_deny),
            read.flag(("egress", "transparent"), default=base.egress.transparent),
            read.one_of(("egress", "worker"), base.egress.worker),
            read.duration(("egress", "hold"), base.egress.hold_seconds, HOLD_SECONDS_MIN, HOLD_SECONDS_MAX),
        ),
        grants=GrantRules(
            read.whole(("grants", "approvers"), base.grants.approvers),
            read.flag(("grants", "separation"), default=base.grants.separation),
            read.whole(("grants", "asks_per_minute"), base.grants.asks_per_minute),
            read.duration(("grants", "ask_again_after"), base.grants.ask_again_seconds, 0, ASK_AGAIN_SECONDS_MAX),
        ),
        env={**base.env, **read.texts("env")},
        etc={**base.etc, **read.texts("etc")},
        seccomp=read.text("seccomp", base.seccomp),
        landlock=read.one_of(("landlock",), base.landlock),
        disk_quota=read.one_of(("disk_quota",), base.disk_quota),
        on_supervisor_loss=read.one_of(("on_supervisor_loss",), base.on_supervisor_loss),
        require=base.require if require is None else require,
        degraded_ok=base.degraded_ok if degraded_ok is None else degraded_ok,
        canary=read.flag(("canary",), default=base.canary),
        registered=read.one_of(("registered",), base.registered),
        record=Record(
            read.flag(("record", "execs"), default=base.record.execs),
            read.flag(("record", "refusals"), default=base.record.refusals),
            read.whole(("record", "arguments"), base.record.arguments),
        ),
        source=read.document.source,
    )


def _check_extends(read: _Reader, policy: Policy, base: Policy, *, extends: bool) -> None:
    """Finds what a policy gives that the one it extends does not, unless `widen` says why."""
    gained = set(wider(policy, base)) if extends else set()
    for key in sorted(gained - set(policy.widen)):
        read.problem(
            tuple(key.split(".")),
            f"wider than in {base.name}, which this policy extends",
            f"narrow it, or say why under `widen: {{{key}: …}}`",
        )
    for key in sorted(set(policy.widen) - gained):
        read.problem(
            ("widen", key), "names a key that is not wider here", "remove it: a reason kept in stock hides the next"
        )
