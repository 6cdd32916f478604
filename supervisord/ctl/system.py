"""Verbs on policies, the host and this program itself: policy, doctor, shell, version."""

from __future__ import annotations

import os
import shlex
import sys
from typing import TYPE_CHECKING

from stockade.client import convert, methods
from stockade.client.errors import StockadeError
from stockade.v1 import policies_pb2, system_pb2

from supervisord.ctl.agents import read_file
from supervisord.ctl.command import FAILED, OK, PROGRAM, Usage, own_version, run
from supervisord.ctl.output import complain, escape_lines, plain, print_facts, print_json, print_table, say, text
from supervisord.ctl.verbs import ALIASES, VERBS

if TYPE_CHECKING:
    from argparse import Namespace

    from stockade.client.sync import Stockade


def policy(stockade: Stockade, options: Namespace) -> int:
    deeds = {"check": _check, "show": _show, "explain": _explain, "list": _list}
    if options.deed != "list" and not options.subject:
        raise Usage(f"`policy {options.deed}` needs one more word", f"{PROGRAM} policy --help")
    return deeds[options.deed](stockade, options)


def _list(stockade: Stockade, options: Namespace) -> int:
    request, found = policies_pb2.ListPoliciesRequest(), []
    while True:
        answer = stockade.call(methods.LIST_POLICIES, request)
        found += [convert.policy(message) for message in answer.policies]
        request.page_token = answer.next_page_token
        if not request.page_token:
            break
    if options.output == "json":
        print_json(found)
    else:
        good = [p for p in found if not p.problem]
        rows = [(p.name, text(p.version), p.risk, p.extends, ", ".join(p.scopes), p.filename, p.digest) for p in good]
        print_table(("NAME", "VERSION", "RISK", "EXTENDS", "SCOPES", "FILE", "DIGEST"), rows)
        for broken in found:
            if broken.problem:
                complain(f"{PROGRAM}: {broken.filename} is no usable policy: {' '.join(broken.problem.split())}")
    return OK


def _show(stockade: Stockade, options: Namespace) -> int:
    answer = stockade.call(methods.GET_POLICY, policies_pb2.GetPolicyRequest(name=options.subject))
    if options.output == "json":
        document = plain(convert.policy(answer.policy))
        print_json({**document, "content": answer.content_yaml.decode("utf-8", "backslashreplace")})
    else:
        sys.stdout.write(escape_lines(answer.content_yaml))
    return OK


def _check(stockade: Stockade, options: Namespace) -> int:
    request = policies_pb2.CheckPolicyRequest(content=read_file(options.subject), filename=options.subject)
    answer = stockade.call(methods.CHECK_POLICY, request)
    problems = [convert.problem(message) for message in answer.problems]
    if options.output == "json":
        print_json({"ok": answer.ok, "problems": problems, "notes": list(answer.notes)})
        return OK if answer.ok else FAILED
    for found in problems:
        where = ":".join(str(part) for part in (found.filename or options.subject, found.line, found.column) if part)
        complain(f"{where}: {found.key + ': ' if found.key else ''}{found.message}")
        if found.remedy:
            complain(f"  {found.remedy}")
    if answer.ok:
        say(f"good: {options.subject}")
        for note in answer.notes:
            say(f"  {note}")
    return OK if answer.ok else FAILED


def _explain(stockade: Stockade, options: Namespace) -> int:
    if not options.scope:
        raise Usage("`policy explain` needs a NAME and a SCOPE", f"{PROGRAM} policy --help")
    request = policies_pb2.ExplainRequest(name=options.subject, scope=options.scope)
    found = convert.explanation(stockade.call(methods.EXPLAIN, request))
    if options.output == "json":
        print_json(found)
        return OK
    say(f"{'allowed' if found.allowed else 'denied'}: {found.reason}")
    for step in found.steps:
        say(f"  {step}")
    if found.remedy:
        say(found.remedy)
    return OK


def doctor(stockade: Stockade, options: Namespace) -> int:
    answer = stockade.call(methods.DOCTOR, system_pb2.DoctorRequest())
    found = [convert.finding(message) for message in answer.findings]
    parts = stockade.call(methods.READY, system_pb2.ReadyRequest()).components
    if options.output == "json":
        shown = [{"name": part.name, "ready": part.ready, "detail": part.detail} for part in parts]
        print_json({"ok": answer.ok, "findings": found, "components": shown})
    else:
        rows = [
            (
                item.control,
                "yes" if item.present else "NO" if item.required else "no",
                item.absence,
                item.how,
                item.source,
            )
            for item in found
        ]
        print_table(("CONTROL", "THERE", "NEEDED", "FOUND", "BY"), rows)
        for item in found:
            if not item.present and item.remedy:
                say(f"{item.control} protects {item.protects}: {item.remedy}")
        print_table(("PART", "READY", "STATE"), [(p.name, "yes" if p.ready else "NO", p.detail or "-") for p in parts])
    return OK if answer.ok else FAILED


def version(stockade: Stockade, options: Namespace) -> int:
    """Prints this program's version in any case; the daemon's where one answers."""
    own = own_version()
    if options.output == "table":
        say(f"{PROGRAM} {own}")
    try:
        daemon = convert.version(stockade.call(methods.VERSION, system_pb2.VersionRequest()))
    except StockadeError:
        if options.output == "json":
            print_json({"client": own, "daemon": None})
        raise
    if options.output == "json":
        print_json({"client": own, "daemon": daemon})
    else:
        print_facts({"daemon": plain(daemon)})
    return OK


def shell(_stockade: Stockade, options: Namespace) -> int:
    """Reads a command a line until the end of input; the exit code is the last command's."""
    import readline  # noqa: PLC0415 - only here, and it changes how input() behaves

    words = sorted([*VERBS, *ALIASES, "help", "quit"])
    readline.set_completer(lambda start, state: next(iter([w for w in words if w.startswith(start)][state:]), None))
    readline.parse_and_bind("tab: complete")
    if options.socket:
        os.environ["STOCKADE_SOCKET"] = options.socket
    given = ["-o", options.output]  # before a line's own options, which so come to count
    code = OK
    while True:
        try:
            line = input(f"{PROGRAM}> " if sys.stdin.isatty() else "")
        except EOFError:
            return code
        except KeyboardInterrupt:
            say("")
            continue
        try:
            argv = shlex.split(line, comments=True)
        except ValueError as error:
            complain(f"{PROGRAM}: cannot read the line: {error}")
            continue
        match argv:
            case []:
                continue
            case ["quit" | "exit"]:
                return code
            case ["help"]:
                run(["--help"])
            case ["shell", *_]:
                complain(f"{PROGRAM}: this is the shell already")
            case _:
                code = run([*given, *argv])
