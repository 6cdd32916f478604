"""The verb `log`: what the daemon says of its action log, and checks of files that need no daemon and no root."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stockade.client import convert, methods
from stockade.v1 import actions_pb2

from supervisord.ctl.command import FAILED, OK, PROGRAM, Usage
from supervisord.ctl.output import complain, plain, print_facts, print_json, print_table, say
from supervisord.ctl.rules import show_actions
from supervisord.ctl.words import WrongWord

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable

    from stockade.client.sync import Stockade

    from supervisord.actions.checkpoint import Checkpoint, Verifier

KEPT_BYTES_MAX: Final = 64 << 20
KEPT_NOTES_MAX: Final = 4096  # the newest; each covers all that those before it do
WITNESS_PATTERN: Final = "*.checkpoints"


def log(stockade: Stockade, options: Namespace) -> int:
    deeds: dict[str, Callable[[Stockade, Namespace], int]] = {
        "verify": _verify,
        "checkpoint": _checkpoint,
        "prove": _prove,
        "check-proof": _check_proof,
        "export": _export,
        "status": _status,
        "rotate-key": _rotate_key,
        "redact": _redact,
    }
    return deeds[options.deed](stockade, options)


def _verify(stockade: Stockade, options: Namespace) -> int:
    files = options.subject
    if not files and (options.since or options.public_key):
        raise Usage("--since and --public-key are for files: say which with DIR", f"{PROGRAM} log --help")
    found: dict[str, Any] = _verify_files(Path(files), options) if files else plain(stockade.verify_log())
    gone = int(found["redacted"])
    if not gone:
        del found["redacted"]  # said where there is something to say
    if options.output == "json":
        print_json(found)
    elif found["ok"]:
        first = found.get("first_seq", 1)
        kept = f", content from entry {first} on" if first > 1 else ""
        redacted = f", {gone} redacted" if gone else ""
        say(f"good: {found['size']} entries{kept}{redacted}, root {found['root']}")
    if not found["ok"]:
        complain(f"{PROGRAM}: cannot verify the log: {found['problem']}")
        complain("keep the files as they are; what differs from a checkpoint kept elsewhere tells what was altered")
    return OK if found["ok"] else FAILED


def _verify_files(directory: Path, options: Namespace) -> dict[str, Any]:
    from supervisord.actions.verify import verify  # noqa: PLC0415 - only those who verify wait for cryptography

    verifier, *others = _public_keys(options)
    if others:
        raise Usage("`log verify` follows from the first key: give that alone", f"{PROGRAM} log --help")
    kept = _kept(Path(options.since), verifier) if options.since else []
    if not (directory / "segments").is_dir() and (directory / "log" / "segments").is_dir():
        directory /= "log"  # a whole state_dir
    try:
        report = verify(directory, verifier, kept=kept)
    except OSError as error:
        raise WrongWord(f"cannot read {directory}: {error.strerror}") from error
    return {
        "ok": report.ok,
        "size": report.size,
        "root": report.root,
        "problem": report.problem,
        "first_seq": report.first_seq,
        "sealed": report.sealed,
        "redacted": report.redacted,
    }


def _public_keys(options: Namespace) -> list[Verifier]:
    from supervisord.actions.files import read_public  # noqa: PLC0415 - as above
    from supervisord.actions.types import BadNote  # noqa: PLC0415

    if not options.public_key:
        raise Usage(f"`log {options.deed}` of files needs --public-key FILE", f"{PROGRAM} log --help")
    found = []
    for name in options.public_key:
        try:
            found.append(read_public(Path(name)))
        except (OSError, BadNote) as error:
            raise WrongWord(f"cannot use --public-key {name}: {error}") from error
    return found


def _kept(path: Path, verifier: Verifier) -> list[str]:
    """The checkpoints of this log in a file, or in all files of a witness's directory; raises WrongWord for none."""
    from supervisord.actions.keys import notes_in  # noqa: PLC0415 - as above

    notes: list[str] = []
    try:
        for file in sorted(path.glob(WITNESS_PATTERN)) if path.is_dir() else [path]:
            with file.open("rb") as opened:
                content = opened.read(KEPT_BYTES_MAX).decode("utf-8", "replace")
            notes += [note for note in notes_in(content)[-KEPT_NOTES_MAX:] if note.startswith(f"{verifier.name}\n")]
    except OSError as error:
        raise WrongWord(f"cannot read --since {path}: {error.strerror}") from error
    if not notes:
        raise WrongWord(f"cannot use --since {path}: it holds no checkpoint of {verifier.name}")
    return notes


def _checkpoint(stockade: Stockade, options: Namespace) -> int:
    note = stockade.checkpoint()
    if options.output == "json":
        print_json({"checkpoint": note})
    else:
        sys.stdout.write(note)
    return OK


def _prove(stockade: Stockade, options: Namespace) -> int:
    from supervisord.actions.proofs import consistency_text, inclusion_text  # noqa: PLC0415 - as above

    if options.from_size is not None:
        request = actions_pb2.ProveConsistencyRequest(old_size=options.from_size)
        grown = stockade.call(methods.PROVE_CONSISTENCY, request)
        path = tuple(grown.path)
        text = consistency_text(options.from_size, path, grown.checkpoint)
        document = {"old_size": options.from_size, "consistency_path": path, "checkpoint": grown.checkpoint}
    else:
        seq = _seq(options, "or --from SIZE")
        proof = convert.proof(stockade.call(methods.PROVE, actions_pb2.ProveRequest(seq=seq)))
        text = inclusion_text(proof.leaf_index, proof.entry, proof.audit_path, proof.checkpoint)
        document = plain(proof)
    if options.output == "json":
        print_json({**document, "proof": text})
    else:
        sys.stdout.write(text)
    return OK


def _check_proof(_stockade: Stockade, options: Namespace) -> int:
    from supervisord.actions.proofs import PROOF_BYTES_MAX, Included, check_proof  # noqa: PLC0415 - as above
    from supervisord.actions.types import BadNote  # noqa: PLC0415

    verifiers = _public_keys(options)
    found: dict[str, Any] = {"ok": True, "problem": ""}
    try:
        with Path(options.subject).open("rb") as file:
            text = file.read(PROOF_BYTES_MAX).decode("utf-8", "replace")
    except OSError as error:
        raise WrongWord(f"cannot read {options.subject or 'the proof'}: {error.strerror}") from error
    try:
        kept = _kept_one(text, options, verifiers)
        proven = check_proof(text, _signer_of(text.partition("\n\n")[2], verifiers), kept)
    except BadNote as error:
        found = {"ok": False, "problem": str(error)}
    else:
        found |= {"size": proven.checkpoint.size, "root": plain(proven.checkpoint.root)}
        if isinstance(proven, Included):
            action = proven.action
            found |= {
                "seq": proven.seq,
                "time_unix_nanos": proven.time_ns,
                "agent_id": action.agent_id,
                "actor": action.actor,
                "verb": action.verb,
                "object": action.object,
                "verdict": action.verdict,
                "reason": action.reason,
                "details": action.details,
            }
        else:
            found |= {"old_size": proven.old.size}
    if options.output == "json":
        print_json(found)
    elif found["ok"]:
        print_facts(found)
    else:
        complain(f"{PROGRAM}: {found['problem']}")
        complain("after `log rotate-key`, give the keys of before and after it: --public-key FILE --public-key FILE")
    return OK if found["ok"] else FAILED


def _signer_of(note: str, verifiers: list[Verifier]) -> Verifier:
    """Whose key signed the note; the first one where it is nobody's, which then says what is wrong."""
    from supervisord.actions.checkpoint import open_note  # noqa: PLC0415 - as above
    from supervisord.actions.types import BadNote  # noqa: PLC0415

    for verifier in verifiers:
        with contextlib.suppress(BadNote):
            open_note(note, verifier)
            return verifier
    return verifiers[0]


def _kept_one(proof: str, options: Namespace, verifiers: list[Verifier]) -> Checkpoint | None:
    """The kept checkpoint that a proof of growth begins with."""
    from supervisord.actions.checkpoint import open_checkpoint  # noqa: PLC0415 - as above
    from supervisord.actions.types import BadNote  # noqa: PLC0415

    if not options.since:
        return None
    kept = []
    for note in _kept(Path(options.since), verifiers[0]):
        with contextlib.suppress(BadNote):  # what a key signed that was in use before these
            kept.append(open_checkpoint(note, _signer_of(note, verifiers)))
    old = proof.partition("\n")[0].removeprefix("old ")
    return next((each for each in kept if str(each.size) == old), kept[-1] if kept else None)


def _export(stockade: Stockade, _options: Namespace) -> int:
    show_actions(stockade.actions(), as_json=True)
    return OK


def _status(stockade: Stockade, options: Namespace) -> int:
    answer = stockade.call(methods.LOG_STATUS, actions_pb2.LogStatusRequest())
    sinks = [
        {
            "name": sink.name,
            "kind": sink.kind,
            "delivered_seq": sink.delivered_seq,
            "behind": sink.behind,
            "failing": sink.failing,
            "cause": sink.cause,
        }
        for sink in answer.sinks
    ]
    facts = {"size": answer.size, "first_seq": answer.first_seq, "public_key": answer.public_key}
    if options.output == "json":
        print_json({**facts, "sinks": sinks})
        return OK
    print_facts(facts)
    if sinks:
        rows = [
            (s.name, s.kind, str(s.delivered_seq), str(s.behind), "FAILING" if s.failing else "good", s.cause)
            for s in answer.sinks
        ]
        print_table(("SINK", "KIND", "DELIVERED", "BEHIND", "STATE", "CAUSE"), rows)
    return OK


def _rotate_key(stockade: Stockade, options: Namespace) -> int:
    answer = stockade.call(methods.ROTATE_KEY, actions_pb2.RotateKeyRequest(reason=options.reason))
    if options.output == "json":
        print_json({"public_key": answer.public_key, "seq": answer.seq})
    else:
        say(answer.public_key)
    return OK


def _redact(stockade: Stockade, options: Namespace) -> int:
    request = actions_pb2.RedactActionRequest(seq=_seq(options, "and --reason TEXT"), reason=options.reason)
    answer = stockade.call(methods.REDACT_ACTION, request)
    if options.output == "json":
        print_json({"seq": request.seq, "ordered_by_seq": answer.seq, "leaf_hash": answer.leaf_hash.hex()})
    else:
        say(f"entry {request.seq} is redacted, as entry {answer.seq} orders; its hash {answer.leaf_hash.hex()} stays")
    return OK


def _seq(options: Namespace, more: str) -> int:
    try:
        seq = int(options.subject or "")
    except ValueError:
        seq = 0
    if not 0 < seq < 1 << 63:
        raise WrongWord(f"`log {options.deed}` needs the SEQ of an entry, as `actions` shows it, {more}")
    return seq
