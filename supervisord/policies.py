"""The policies that this daemon knows: read from the configured directories and from the shipped ones."""

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from supervisord.config import GatewayConfig
from supervisord.documents import DOCUMENT_BYTES_MAX, InvalidDocument, Problem, parse_document
from supervisord.errors import InvalidInput, NotFound, StockadeError
from supervisord.ids import shown
from supervisord.policy import AgentSpec, Policy
from supervisord.policy_reader import Schemas, parse_agent, parse_policy
from supervisord.scopes import check_scopes_reachable

SHIPPED_DIR: Final = Path(__file__).resolve().parent.parent / "policies"
SECCOMP_DIR: Final = SHIPPED_DIR / "seccomp"
POLICY_FILES_MAX: Final = 1000
EXTENDS_DEPTH_MAX: Final = 8


def load_schemas(directory: Path = SHIPPED_DIR / "schema") -> Schemas:
    """Reads and compiles the JSON Schemas of policies and agents."""
    return Schemas.compiled(
        json.loads((directory / "policy.schema.json").read_text("utf-8")),
        json.loads((directory / "agent.schema.json").read_text("utf-8")),
    )


@dataclass(frozen=True, slots=True)
class Broken:
    """A file in a policy directory that is no usable policy, and why."""

    name: str
    source: str
    error: StockadeError


class PolicyShelf:
    """Every policy by name, as of the last load.

    A directory overrides those after it in the list, and the shipped policies come last, so `default` always exists.
    A broken file does not stop the daemon (agents may be running that it must be able to kill); its name is refused
    instead, and never falls back to a policy of the same name in a later directory, which may be wider.
    """

    def __init__(self, directories: Iterable[Path], *, gateway: GatewayConfig, schemas: Schemas | None = None) -> None:
        self._directories = (*directories, SHIPPED_DIR)
        self._gateway = gateway
        self.schemas = schemas or load_schemas()
        self._policies: dict[str, Policy] = {}
        self._broken: dict[str, Broken] = {}
        self.load()

    def load(self) -> None:
        """Reads every file anew; what was read before is replaced as a whole."""
        files: dict[str, Path] = {}
        for directory in self._directories:
            for path in _policy_files(directory):
                files.setdefault(path.stem, path)
        loader = _Loader(files, self.schemas, self._gateway)
        self._policies, self._broken = loader.policies, loader.broken

    def get(self, name: str) -> Policy:
        """Gives a policy; raises NotFound, or what is wrong with its file."""
        if name in self._broken:
            raise self._broken[name].error
        if name not in self._policies:
            broken = "".join(f"; not usable: {each.source}" for each in self._broken.values())
            raise NotFound(
                f"cannot find policy {shown(name)}: there is none",
                remedy=f"choose one of {', '.join(sorted(self._policies))}{broken}",
            )
        return self._policies[name]

    def list(self) -> tuple[Policy, ...]:
        return tuple(self._policies[name] for name in sorted(self._policies))

    def broken(self) -> tuple[Broken, ...]:
        return tuple(self._broken[name] for name in sorted(self._broken))

    def check(self, text: str, *, source: str, directory: PurePosixPath | None = None) -> Policy | AgentSpec:
        """Judges a file's text, of either kind, against what is loaded; changes nothing; raises InvalidInput.

        `directory` is what a relative workspace of an agent is relative to; None refuses one.
        """
        if _kind(text) == "Agent":
            agent = parse_agent(text, source=source, schemas=self.schemas, directory=directory)
            check_scopes_reachable(agent.scopes, self._gateway)
            self.get(agent.policy)
            return agent
        policy = parse_policy(text, source=source, schemas=self.schemas, parent=self.get)
        _check_host(policy, self._gateway)
        return policy

    def read_agent(self, text: str, source: str, directory: PurePosixPath | None) -> AgentSpec:
        """What an agent's text says; whether its policy exists is not looked at. Raises InvalidInput."""
        return parse_agent(text, source=source, schemas=self.schemas, directory=directory)


class _Loader:
    """Reads each file once, parents before children, so that what is wrong with one does not depend on names."""

    def __init__(self, files: dict[str, Path], schemas: Schemas, gateway: GatewayConfig) -> None:
        self.files = files
        self.schemas = schemas
        self.gateway = gateway
        self.policies: dict[str, Policy] = {}
        self.broken: dict[str, Broken] = {}
        self.texts: dict[str, str] = {}
        self.extends: dict[str, str | None] = {}
        for name, path in files.items():
            try:
                self.texts[name] = read_text(path)
                self.extends[name] = _extends(self.texts[name])
            except StockadeError as error:
                self.broken[name] = Broken(name, str(path), error)
        for name in sorted(self.texts, key=lambda name: (len(self.ancestors(name)), name)):
            try:
                self.policies[name] = self.read(name)
            except StockadeError as error:
                self.broken[name] = Broken(name, str(files[name]), error)

    def ancestors(self, name: str) -> tuple[str, ...]:
        """Gives the names that a policy extends, nearest first; a circle or a tower is cut one beyond the limit."""
        chain: list[str] = []
        above = self.extends.get(name)
        while above is not None and len(chain) <= EXTENDS_DEPTH_MAX:
            chain.append(above)
            above = self.extends.get(above)
        return tuple(chain)

    def read(self, name: str) -> Policy:
        path, chain = self.files[name], self.ancestors(name)

        def parent(wanted: str) -> Policy:
            if len(chain) > EXTENDS_DEPTH_MAX:
                listed = " extends ".join((name, *chain))
                raise InvalidInput(f"{listed}: more than {EXTENDS_DEPTH_MAX}", remedy="break the circle or flatten it")
            if wanted in self.broken:
                raise InvalidInput(f"{self.broken[wanted].source} is broken", remedy="correct that file first")
            if wanted not in self.policies:
                raise NotFound("there is no such policy", remedy=f"choose one of {', '.join(sorted(self.policies))}")
            return self.policies[wanted]

        policy = parse_policy(self.texts[name], source=str(path), schemas=self.schemas, parent=parent)
        if policy.name != name:
            problem = Problem(str(path), None, "name", f"is {policy.name}, but the file is {path.name}", "rename one")
            raise InvalidDocument("policy", [problem])
        _check_host(policy, self.gateway)
        return policy


def _check_host(policy: Policy, gateway: GatewayConfig) -> None:
    """Raises InvalidInput for what a policy asks of this installation and does not get."""
    check_scopes_reachable(policy.scopes, gateway)
    if not (SECCOMP_DIR / f"{policy.seccomp}.json").is_file():
        known = ", ".join(sorted(path.stem for path in SECCOMP_DIR.glob("*.json")))
        raise InvalidInput(
            f"cannot use policy {policy.name}: there is no seccomp profile {policy.seccomp}",
            remedy=f"choose one of {known}",
        )


def _extends(text: str) -> str | None:
    """Gives what a text says it extends; what is wrong with the text is said when it is read as a policy."""
    try:
        value = parse_document(text, source="").value
    except InvalidDocument:
        return None
    above = value.get("extends") if isinstance(value, dict) else None
    return above if isinstance(above, str) else None


def read_text(path: Path) -> str:
    """Reads an operator's file, bounded; raises InvalidInput for one that others than its owner's group may write."""
    try:
        # O_NONBLOCK: a fifo in a policy directory must not block the daemon; it is refused below.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:  # noqa: PTH123 - opened by descriptor, so that what is checked is what is read
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InvalidInput(f"cannot read {path}: it is not a regular file", remedy="remove it")
            if status.st_mode & stat.S_IWOTH:
                raise InvalidInput(f"cannot trust {path}: everybody may write it", remedy=f"chmod o-w {path}")
            data = file.read(DOCUMENT_BYTES_MAX + 1)
        if len(data) > DOCUMENT_BYTES_MAX:
            raise InvalidInput(f"cannot read {path}: longer than {DOCUMENT_BYTES_MAX} bytes", remedy="shorten it")
        return data.decode("utf-8")
    except OSError as error:
        raise InvalidInput(
            f"cannot read {path}: {error.strerror}", remedy="check that it exists and its mode"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(f"cannot read {path}: byte {error.start} is not UTF-8", remedy="save it as UTF-8") from error


def _policy_files(directory: Path) -> list[Path]:
    """Lists a directory's policies by name; a directory that does not exist has none."""
    try:
        found = sorted(path for path in directory.iterdir() if path.suffix in (".yaml", ".yml"))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InvalidInput(
            f"cannot read policy directory {directory}: {error.strerror}", remedy="correct policy_dirs in stockade.toml"
        ) from error
    if len(found) > POLICY_FILES_MAX:
        raise InvalidInput(f"cannot read {directory}: more than {POLICY_FILES_MAX} policies", remedy="remove some")
    return found


def _kind(text: str) -> str:
    """Gives the kind that a text claims, to choose the schema; the schema then judges it."""
    for line in text.splitlines():
        if line.startswith("kind:"):
            return line.removeprefix("kind:").partition("#")[0].strip().strip("'\"")
    return ""
