"""How a log goes on with another key: a note under the old one that names the new one (pure).

The note stands in an entry `log.rotate_key` and in the file `rotations` beside the segments. It is text of two lines,
`stockade-log-key/v1` and the new key in C2SP form, so that it is never read as a checkpoint or a receipt. Who has the
first public key follows the notes; no note is believed for where it stands, only for who signed it.
"""

from collections.abc import Iterable
from typing import Final

from supervisord.actions.checkpoint import Checkpoint, Signer, Verifier, open_checkpoint, open_note
from supervisord.actions.types import Action, BadNote

HEADER: Final = "stockade-log-key/v1"
VERB: Final = "log.rotate_key"
ROTATIONS_MAX: Final = 256


def rotation_note(new: Verifier, old: Signer) -> str:
    return old.sign(f"{HEADER}\n{new.text()}\n")


def next_key(note: str, verifier: Verifier) -> Verifier:
    """The key that `verifier`'s hands over to, or BadNote."""
    header, _, rest = open_note(note, verifier).partition("\n")
    if header != HEADER:
        raise BadNote("cannot follow the log's key: the note is of another kind")
    following = Verifier.parse(rest)
    if following.name != verifier.name:
        raise BadNote("cannot follow the log's key: the new one is of another log")
    return following


def handed_over(action: Action, verifier: Verifier) -> Verifier | None:
    """The new key, where the entry is one that hands over; raises BadNote where its note is not the key's."""
    if action.verb != VERB or action.verdict != "done":
        return None
    return next_key(str(action.details.get("note", "")), verifier)


def reachable(first: Verifier, notes: Iterable[str]) -> tuple[Verifier, ...]:
    """`first` and every key that it vouches for, directly or by those between."""
    found = [first]
    for note in notes:
        for verifier in found:
            try:
                following = next_key(note, verifier)
            except BadNote:
                continue
            if following not in found and len(found) < ROTATIONS_MAX:
                found.append(following)
            break
    return tuple(found)


def open_by_any(note: str, verifiers: Iterable[Verifier]) -> Checkpoint:
    """The checkpoint in a note that one of the keys signed; raises the first key's BadNote."""
    failure: BadNote | None = None
    for verifier in verifiers:
        try:
            return open_checkpoint(note, verifier)
        except BadNote as error:
            failure = failure or error
    raise failure or BadNote("cannot trust the note: there is no key")


def notes_in(text: str) -> list[str]:
    """The notes that stand one behind the other, as in a witness's file: text, empty line, signatures, empty line."""
    parts = [part.strip("\n") for part in text.split("\n\n") if part.strip("\n")]
    return [f"{body}\n\n{signatures}\n" for body, signatures in zip(parts[::2], parts[1::2], strict=False)]
