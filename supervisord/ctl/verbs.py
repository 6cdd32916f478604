"""The verbs as a table: what each is for, its arguments, and where it is done."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentTypeError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from supervisord.ctl import words

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable

    from stockade.client.errors import StockadeError

STOCKADE_FAILED: Final = 125
NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
ENOENT: Final = "2"


@dataclass(frozen=True)
class Verb:
    summary: str
    module: str
    function: str
    arguments: Callable[[ArgumentParser], None]
    command: bool = False  # it takes one, after --
    failure_code: Callable[[StockadeError], int | None] | None = None


def command_failure(error: StockadeError) -> int | None:
    """As a shell: 127 for no such program, 126 for one that cannot be executed; None for any other failure."""
    if error.reason == "CANNOT_LAUNCH" and error.facts.get("step") == "exec":
        return NOT_FOUND if error.facts.get("errno") == ENOENT else NOT_EXECUTABLE
    return None


def run_failure(error: StockadeError) -> int:
    """125 for everything that is not the command's: the codes below may be the agent's own."""
    return command_failure(error) or STOCKADE_FAILED


def _word(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` for argparse, which prints the name of a type and not what was wrong unless it is told."""

    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except words.WrongWord as error:
            raise ArgumentTypeError(str(error)) from error

    return parsed


def _deeds(parser: ArgumentParser, *deeds: str, default: str | None = None) -> None:
    """What is to be done, as the first word; a message that it is missing names them all."""
    many: dict[str, Any] = {} if default is None else {"nargs": "?", "default": default}
    parser.add_argument("deed", choices=deeds, metavar="|".join(deeds), **many)


def _nothing(_: ArgumentParser) -> None:
    return


def _launch(parser: ArgumentParser, stdin: str) -> None:
    add = parser.add_argument
    # SUPPRESS: what was not given is not in the namespace, and so is not sent either.
    add("--name", default=SUPPRESS, help="unique among the live ones; made up where not given")
    add("--policy", default=SUPPRESS, help="default: `default`")
    add("--workspace", metavar="DIR[:ro|:rw|:overlay]", type=_word(words.workspace), default=SUPPRESS)
    add("--scope", action="append", dest="scopes", metavar="S", default=SUPPRESS, help="may be given many times")
    add("--label", action="append", dest="labels", metavar="K=V", type=_word(words.pair), default=SUPPRESS)
    add("--memory", dest="memory_bytes", metavar="512MiB", type=_word(words.size), default=SUPPRESS)
    add("--cpus", type=_word(words.number), default=SUPPRESS)
    add("--pids", type=_word(words.whole), default=SUPPRESS)
    add("--budget", action="append", metavar="tokens=N", type=_word(words.amount), default=SUPPRESS)
    add("--env", action="append", metavar="K=V", help="K alone: from here", default=SUPPRESS)
    add("--owner", default=SUPPRESS)
    add("--purpose", default=SUPPRESS)
    add(
        "--lease",
        metavar="30s",
        type=_word(words.duration),
        default=SUPPRESS,
        help="frozen, then killed, unless renewed",
    )
    add("-i", dest="interactive", action="store_true", help=stdin)
    add("-t", dest="terminal", action="store_true", help="give it a terminal")
    add("--dry-run", action="store_true", help="print what would be done, and do nothing")


def _run(parser: ArgumentParser) -> None:
    _launch(parser, "pass stdin on")
    parser.usage = "%(prog)s [options] -- CMD…"


def _background(parser: ArgumentParser) -> None:
    _launch(parser, "leave stdin open for who attaches; else it is empty")
    parser.add_argument("-f", dest="file", metavar="agent.yaml", help="a file of kind Agent")
    parser.add_argument(
        "--agent",
        dest="registered",
        metavar="NAME[@VERSION]",
        default=SUPPRESS,
        help="a definition of the registry; without a version its newest that is not deprecated",
    )
    parser.add_argument("--wait", action="store_true", help="answer when it has ended")
    parser.usage = "%(prog)s [options] -- CMD… | %(prog)s -f agent.yaml | %(prog)s --agent NAME[@VERSION] [options]"


def _selection(parser: ArgumentParser) -> None:
    parser.add_argument("subject", metavar="NAME", nargs="*", help="a name or an agent_id")
    parser.add_argument("--label", action="append", dest="labels", metavar="K=V", type=_word(words.pair), default=[])
    parser.add_argument("--policy", default="")
    parser.add_argument("--owner", default="")
    parser.add_argument("--all", action="store_true", help="every live agent")
    parser.add_argument("--reason", default="")


def _kill(parser: ArgumentParser) -> None:
    _selection(parser)
    parser.add_argument("--exec", dest="stream", metavar="STREAM", default="", help="only what this exec started")


def _status(parser: ArgumentParser) -> None:
    parser.add_argument("subject", metavar="NAME", nargs="*")
    parser.add_argument("--live", action="store_true", help="leave out those that have ended")
    parser.add_argument("--wide", action="store_true", help="what they used: CPU time, tokens, cost, budgets")


def _one(parser: ArgumentParser) -> None:
    parser.add_argument("subject", metavar="NAME", help="a name or an agent_id")


def _logs(parser: ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="until it ends")
    parser.add_argument("--raw", action="store_true", help="write control characters to a terminal as they are")


def _wait(parser: ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("--timeout", metavar="10m", type=_word(words.duration))


def _exec(parser: ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("-i", dest="interactive", action="store_true", help="pass stdin on")
    parser.add_argument("-t", dest="terminal", action="store_true", help="give it a terminal")
    parser.add_argument("--env", action="append", metavar="K=V", default=[])
    parser.add_argument("--cwd", default="")
    parser.add_argument("--show-stream", action="store_true", help="print first, to stderr, what `kill --exec` takes")
    parser.usage = "%(prog)s [options] NAME -- CMD…"


def _top(parser: ArgumentParser) -> None:
    parser.add_argument("-d", dest="delay", metavar="2s", type=_word(words.duration), default=2.0)
    parser.add_argument(
        "-n",
        dest="count",
        metavar="N",
        type=_word(words.whole),
        help="this many times; 0: until interrupted, as on a terminal",
    )


def _hold(parser: ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("subject", metavar="NAME", nargs="?", default="", help="agents of this name")
    group.add_argument("--label", metavar="K=V", default="", help="agents with this label")
    group.add_argument("--policy", default="", help="agents of this policy")
    group.add_argument("--rootfs-digest", metavar="sha256:…", default="", help="agents whose root is this image")
    parser.add_argument("--ticket", default="", help="where it is kept track of")
    parser.add_argument("--reason", default="")


def _release(parser: ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("subject", metavar="HOLD", nargs="?", default="", help="as `holds` shows it, or a NAME on hold")
    group.add_argument("--label", metavar="K=V", default="", help="holds on this label")
    group.add_argument("--policy", default="", help="holds on this policy")
    group.add_argument("--rootfs-digest", metavar="sha256:…", default="", help="holds on this image")
    parser.add_argument("--reason", default="")


def _terms(parser: ArgumentParser) -> None:
    parser.add_argument("--ttl", metavar="10m", type=_word(words.duration))
    parser.add_argument("--max-uses", metavar="N", type=_word(words.whole))
    parser.add_argument("--max-bytes", metavar="10MiB", type=_word(words.size), help="both ways, heads too")
    parser.add_argument("--max-cost", metavar="USD", type=_word(words.number), help="of calls of models, in US dollars")
    parser.add_argument("--reason", default="")
    parser.add_argument("--ticket", default="", help="where the reason is on file")


def _grant(parser: ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("scope", metavar="SCOPE")
    _terms(parser)


def _revoke(parser: ArgumentParser) -> None:
    parser.add_argument("subject", metavar="GRANT", help="as `grants` shows it")
    parser.add_argument("--reason", default="")


def _grants(parser: ArgumentParser) -> None:
    parser.add_argument("subject", metavar="NAME", nargs="?", default="")
    parser.add_argument("--ended", action="store_true", help="also those that are no longer in force")


def _requests(parser: ArgumentParser) -> None:
    _deeds(parser, "list", "watch", "approve", "deny", default="list")
    parser.add_argument("subject", metavar="ID", nargs="?", default="", help="as `requests list` shows it")
    parser.add_argument("--decided", action="store_true", help="list: also those that were answered")
    parser.add_argument("--scope", default="", help="approve: this one, within what is asked")
    parser.add_argument("--once", action="store_true", help="approve: for one use")
    parser.add_argument("--digest", default="", help="approve: of what you were shown; anything else is then refused")
    parser.add_argument("--after", dest="resume_token", metavar="TOKEN", default="", help="watch: go on after this")
    _terms(parser)


def _diff(parser: ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("paths", metavar="PATH", nargs="*", help="relative to the workspace; a directory: all below it")
    parser.add_argument("-p", "--patch", action="store_true", help="text files line by line")


def _apply(parser: ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("paths", metavar="PATH", nargs="*", help="relative to the workspace; a directory: all below it")
    parser.add_argument("--force", action="store_true", help="also what was changed in the workspace since the launch")
    parser.add_argument(
        "--digest", metavar="sha256:…", default="", help="as `diff` showed it; other changes are refused"
    )
    parser.add_argument("--reason", default="")


def _discard(parser: ArgumentParser) -> None:
    _one(parser)
    parser.add_argument("--reason", default="")


def _actions(parser: ArgumentParser) -> None:
    parser.add_argument("subject", metavar="NAME", nargs="?", default="")
    parser.add_argument("-f", "--follow", action="store_true")
    parser.add_argument(
        "--verb", dest="wanted_verb", metavar="V", default="", help="grant.create; grant: all that begin with it"
    )
    parser.add_argument(
        "--label",
        action="append",
        dest="labels",
        metavar="K=V",
        type=_word(words.pair),
        default=[],
        help="of agents that were launched with it",
    )
    verdicts = ("allowed", "denied", "done", "failed", "notice", "redacted")
    parser.add_argument("--verdict", choices=verdicts, default="")
    parser.add_argument("--since", metavar="T", help="10m (ago) or 2026-01-31T12:00:00Z")
    parser.add_argument("--until", metavar="T", help="the same; not with -f")
    parser.add_argument("--after", dest="after_seq", metavar="SEQ", type=_word(words.whole), default=0)


def _log(parser: ArgumentParser) -> None:
    _deeds(parser, "verify", "checkpoint", "prove", "check-proof", "export", "status", "rotate-key", "redact")
    add = parser.add_argument
    add("subject", metavar="DIR|SEQ|FILE", nargs="?", default="", help="verify: files; prove, redact: an entry")
    add(
        "--public-key",
        metavar="FILE",
        action="append",
        default=[],
        help="verify DIR: the log's first key; check-proof: the keys in use then, each with an option of its own",
    )
    add("--since", metavar="CHECKPOINT", default="", help="a checkpoint that was kept, or a witness's directory")
    add(
        "--from",
        dest="from_size",
        metavar="SIZE",
        type=_word(words.whole),
        help="prove: that the log continues that of SIZE entries",
    )
    add("--reason", default="", help="rotate-key, redact")


def _policy(parser: ArgumentParser) -> None:
    _deeds(parser, "list", "check", "show", "explain")
    parser.add_argument("subject", metavar="FILE|POLICY|NAME", nargs="?", default="")
    parser.add_argument("scope", metavar="SCOPE", nargs="?", default="", help="explain: which scope")


def _registry(parser: ArgumentParser) -> None:
    _deeds(parser, "add", "list", "show", "deprecate", "review", "running")
    parser.add_argument("subject", metavar="NAME[@VERSION]", nargs="?", default="")
    parser.add_argument("-f", dest="file", metavar="agent.yaml", default="", help="add: a file of kind Agent")
    parser.add_argument("--reason", default="", help="deprecate: why it should not be launched any more")
    parser.add_argument(
        "--unused", metavar="30d", type=_word(words.duration), help="review: how long a grant may go unused"
    )
    parser.add_argument("--strict", action="store_true", help="review: exit with 1 where there is a finding")


def _backup(parser: ArgumentParser) -> None:
    parser.add_argument("subject", metavar="DIR", help="made here; must not be there yet")


def _report(parser: ArgumentParser) -> None:
    parser.add_argument("--since", metavar="T", default="1d", help="7d (ago) or 2026-01-31T12:00:00Z; a day by default")
    parser.add_argument("--until", metavar="T", default="", help="the same; now by default")
    parser.add_argument("--out", metavar="DIR", default=".", help="where report.html and report.json are written")
    parser.add_argument("--top", metavar="N", type=int, default=20, help="rows of the longest lists")


_AGENTS, _CHANGES, _INSIDE, _LOG, _RULES, _SYSTEM = "agents", "changes", "inside", "log", "rules", "system"
_REGISTRY, _REPORT, _BACKUP = "registry", "report", "backup"

VERBS: Final[dict[str, Verb]] = {
    "run": Verb(
        "start an agent, stream its stdio, exit with its code",
        _INSIDE,
        "run",
        _run,
        command=True,
        failure_code=run_failure,
    ),
    "launch": Verb("start an agent in the background", _AGENTS, "launch", _background, command=True),
    "status": Verb("agents and how they are (also: ps)", _AGENTS, "status", _status),
    "inspect": Verb("all there is to know of an agent", _AGENTS, "inspect", _one),
    "logs": Verb("what an agent wrote", _INSIDE, "logs", _logs),
    "wait": Verb("wait for an agent's end; print its exit code", _AGENTS, "wait", _wait),
    "exec": Verb(
        "run a further program in an agent's sandbox",
        _INSIDE,
        "execute",
        _exec,
        command=True,
        failure_code=command_failure,
    ),
    "top": Verb("agents and what they use: on a terminal again and again", _AGENTS, "top", _top),
    "kill": Verb("end agents, and prove it", _AGENTS, "kill", _kill),
    "renew": Verb("begin an agent's lease anew", _AGENTS, "renew", _one),
    "freeze": Verb("stop agents where they are, and close their gate", _AGENTS, "freeze", _selection),
    "thaw": Verb("let frozen agents go on", _AGENTS, "thaw", _selection),
    "hold": Verb("forbid a name, label, policy or image until somebody else releases it", _AGENTS, "hold", _hold),
    "release": Verb("take a hold back", _AGENTS, "release", _release),
    "holds": Verb("what is held", _AGENTS, "holds", _nothing),
    "budgets": Verb("what labels may spend together, and have", _AGENTS, "budgets", _nothing),
    "diff": Verb("what an agent changed in its overlay workspace", _CHANGES, "diff", _diff),
    "apply": Verb("make an agent's changes real, all or by path", _CHANGES, "apply", _apply),
    "discard": Verb("throw an agent's changes away", _CHANGES, "discard", _discard),
    "grant": Verb("give an agent a scope", _RULES, "grant", _grant),
    "revoke": Verb("take a grant back", _RULES, "revoke", _revoke),
    "grants": Verb("grants in force", _RULES, "grants", _grants),
    "requests": Verb("what agents ask for: list, watch, approve, deny", _RULES, "requests", _requests),
    "actions": Verb("what agents and operators did or tried", _RULES, "actions", _actions),
    "log": Verb(
        "the action log: verify, checkpoint, prove, check-proof, export, status, rotate-key, redact", _LOG, "log", _log
    ),
    "policy": Verb("policies: list, check, show, explain", _SYSTEM, "policy", _policy),
    "registry": Verb(
        "the inventory of agents: add, list, show, deprecate, review, running", _REGISTRY, "registry", _registry
    ),
    "report": Verb("a period's evidence as HTML and JSON", _REPORT, "report", _report),
    "backup": Verb("a copy of the daemon's state and log in a new directory", _BACKUP, "backup", _backup),
    "doctor": Verb("which controls this host has", _SYSTEM, "doctor", _nothing),
    "shell": Verb("many commands, one prompt", _SYSTEM, "shell", _nothing),
    "version": Verb("of this program and of the daemon", _SYSTEM, "version", _nothing),
}
ALIASES: Final = {"ps": "status"}
# Those that are nouns: "cannot show status", not "cannot status".
SHOWN: Final = frozenset(
    {"status", "logs", "top", "diff", "holds", "budgets", "grants", "actions", "doctor", "version"}
)
