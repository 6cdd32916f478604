"""The command line: which verb, its arguments, and how an outcome becomes an exit code.

Only the parser of the verb that was asked for is built, and only its module imported: start-up is what a short
`run` costs most.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from typing import TYPE_CHECKING, Any, Final, NoReturn

from supervisord.ctl.verbs import ALIASES, SHOWN, VERBS
from supervisord.ctl.words import WrongWord

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM: Final = "stockadectl"
OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
NO_SUCH_THING: Final = 3
NOT_PERMITTED: Final = 4
CONFLICT: Final = 5
UNREACHABLE: Final = 69  # EX_UNAVAILABLE, sysexits(3)
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141


class Usage(Exception):  # noqa: N818 - what the user got wrong
    """A wrong command line: the message, and how to see what is right."""

    def __init__(self, message: str, help_command: str = f"{PROGRAM} --help") -> None:
        super().__init__(message)
        self.help_command = help_command


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the whole usage above it."""

    def error(self, message: str) -> NoReturn:
        raise Usage(message, f"{self.prog} --help")


def overview() -> str:
    width = max(len(name) for name in VERBS)
    lines = [f"usage: {PROGRAM} [--socket PATH] [-o table|json] VERB …", ""]
    lines += [f"  {name.ljust(width)}  {verb.summary}" for name, verb in VERBS.items()]
    lines += ["", f"`{PROGRAM} VERB --help` tells more. The socket: --socket, $STOCKADE_SOCKET, or the usual one."]
    return "\n".join(lines) + "\n"


def global_options(parser: argparse.ArgumentParser, *, below: bool) -> None:
    """The options that may stand before and after the verb; `below` does not overwrite what stood before."""
    default: Any = argparse.SUPPRESS if below else None
    parser.add_argument("--socket", metavar="PATH", default=default, help="the daemon's control socket")
    parser.add_argument("-o", "--output", choices=("table", "json"), default=default, help="table (default) or json")


def split(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """What stands before the first `--`, and the command after it; None where there is no `--`."""
    words = list(argv)
    if "--" not in words:
        return words, None
    at = words.index("--")
    return words[:at], words[at + 1 :]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace with `verb`, `socket`, `output`, `command` and the verb's own; raises Usage."""
    words, command = split(argv)
    front = Parser(prog=PROGRAM, add_help=False)
    global_options(front, below=False)
    front.add_argument("-h", "--help", action="store_true")
    front.add_argument("--version", action="store_true")
    front.add_argument("rest", nargs=argparse.REMAINDER)
    found = front.parse_args(words)
    if found.help or (not found.rest and not found.version):
        sys.stdout.write(overview())
        raise SystemExit(OK if found.help else USAGE)
    if found.version and not found.rest:
        sys.stdout.write(f"{PROGRAM} {own_version()}\n")
        raise SystemExit(OK)
    rest = found.rest or ["version"]
    name = ALIASES.get(rest[0], rest[0])
    verb = VERBS.get(name)
    if verb is None:
        raise Usage(f"there is no verb {rest[0]!r}{_nearest(rest[0])}")
    parser = Parser(prog=f"{PROGRAM} {name}", description=verb.summary)
    global_options(parser, below=True)
    verb.arguments(parser)
    options = argparse.Namespace(socket=found.socket, output=found.output or "table")
    if command is not None and not verb.command:
        raise Usage(f"`{name}` takes no command after --", f"{PROGRAM} {name} --help")
    options, unknown = parser.parse_known_args(rest[1:], options)
    if unknown:
        hint = "; the command goes after --" if verb.command and command is None else ""
        raise Usage(f"unrecognized arguments: {' '.join(map(repr, unknown))}{hint}", f"{PROGRAM} {name} --help")
    options.verb, options.command = name, command or []
    return options


def own_version() -> str:
    """The version of this program, which needs no daemon."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - only for those who ask

    try:
        return version("stockade")
    except PackageNotFoundError:
        return "unknown"


def _nearest(word: str) -> str:
    import difflib  # noqa: PLC0415 - only for those who mistyped

    near = difflib.get_close_matches(word, [*VERBS, *ALIASES], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def perform(options: argparse.Namespace) -> int:
    """Do what was asked; the exit code."""
    from stockade.client.errors import (  # noqa: PLC0415 - not needed to print help
        Conflict,
        InvalidArgument,
        NotFound,
        NotPermitted,
        StockadeError,
        Unreachable,
    )
    from stockade.client.sync import Stockade  # noqa: PLC0415

    from supervisord.ctl.output import complain  # noqa: PLC0415

    verb = VERBS[options.verb]
    act = getattr(importlib.import_module(f"supervisord.ctl.{verb.module}"), verb.function)
    try:
        path = options.socket.removeprefix("unix:") if options.socket else ""
        target = f"unix:{os.path.abspath(path)}" if path else None  # noqa: PTH100 - no links followed
        with Stockade(target) as stockade:
            code: int = act(stockade, options)
            return code
    except StockadeError as error:
        said = error.message if error.message.startswith("cannot ") else f"cannot {_deed(options)}: {error.message}"
        first, *more = said.split("\n")  # a file may have several mistakes
        complain(f"{PROGRAM}: {first}")
        for line in more:
            complain(f"  {line.strip()}")
        if error.remedy:
            complain(error.remedy)
        special = verb.failure_code(error) if verb.failure_code is not None else None
        kinds = {
            NotFound: NO_SUCH_THING,
            NotPermitted: NOT_PERMITTED,
            Conflict: CONFLICT,
            InvalidArgument: USAGE,
            Unreachable: UNREACHABLE,
        }
        return kinds.get(type(error), FAILED) if special is None else special


def _deed(options: argparse.Namespace) -> str:
    """`kill reader`, `show status`, `verify log`: what was to be done, and to what."""
    thing = getattr(options, "subject", "")
    words = [getattr(options, "deed", ""), options.verb, *(thing if isinstance(thing, list) else [thing])]
    if options.verb in SHOWN:
        words[0] = "show"
    return " ".join(filter(None, words))


def run(argv: Sequence[str]) -> int:
    """The exit code of one command line; everything that can go wrong is said on stderr."""
    from supervisord.ctl.output import complain  # noqa: PLC0415

    try:
        return perform(parse(argv))
    except (Usage, WrongWord, argparse.ArgumentTypeError, UnicodeEncodeError) as error:
        # A word that is no text cannot be in a message to the daemon.
        wrong = f"cannot use {error.object!r}: it is not UTF-8" if isinstance(error, UnicodeEncodeError) else error
        complain(f"{PROGRAM}: {wrong}")
        complain(f"see `{getattr(error, 'help_command', f'{PROGRAM} --help')}`")
        return USAGE
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FAILED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:  # our output goes to a disk that is full
        complain(f"{PROGRAM}: cannot go on: {error.strerror or error}")
        return FAILED
