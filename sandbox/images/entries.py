"""What an entry of a layer means: which place, whiteout or not, which mode; pure.

Source: OCI image specification, layer.md (changesets and whiteouts).
"""

from dataclasses import dataclass
from typing import Final

from sandbox.images.limits import (
    DEPTH_PARTS_MAX,
    LINK_BYTES_MAX,
    NAME_BYTES_MAX,
    PATH_BYTES_MAX,
    BadImage,
    printable,
)

Parts = tuple[bytes, ...]

_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_RESERVED: Final = b".wh..wh."


@dataclass(frozen=True, slots=True)
class Put:
    """The entry makes or replaces what is there."""

    parts: Parts


@dataclass(frozen=True, slots=True)
class Remove:
    """What lower layers have there is gone."""

    parts: Parts


@dataclass(frozen=True, slots=True)
class Empty:
    """What lower layers have in this directory is gone."""

    parts: Parts


def path_parts(raw: bytes) -> Parts:
    """Return the parts of an entry's name, none for the root itself; raises `BadImage` for what leads elsewhere."""
    shown = printable(raw)
    if not raw or b"\0" in raw:
        raise BadImage(f"entry {shown}: its name is empty or has a NUL byte")
    if raw.startswith(b"/"):
        raise BadImage(f"entry {shown}: its name is absolute")
    if len(raw) > PATH_BYTES_MAX:
        raise BadImage(f"entry {shown}: its name is longer than {PATH_BYTES_MAX} bytes")
    parts = tuple(part for part in raw.split(b"/") if part not in (b"", b"."))
    if b".." in parts:
        raise BadImage(f"entry {shown}: its name leads out of the image (..)")
    if len(parts) > DEPTH_PARTS_MAX:
        raise BadImage(f"entry {shown}: more than {DEPTH_PARTS_MAX} directories deep")
    if any(len(part) > NAME_BYTES_MAX for part in parts):
        raise BadImage(f"entry {shown}: a part of its name is longer than {NAME_BYTES_MAX} bytes")
    return parts


def judge(raw: bytes, *, regular: bool) -> Put | Remove | Empty:
    """Say what the entry does; raises `BadImage`."""
    parts = path_parts(raw)
    if any(part.startswith(_WHITEOUT) for part in parts[:-1]):
        raise BadImage(f"entry {printable(raw)}: it lies in a whiteout")
    if not parts or not parts[-1].startswith(_WHITEOUT):
        return Put(parts)
    if not regular:
        raise BadImage(f"entry {printable(raw)}: a whiteout is an empty regular file")
    *above, last = parts
    if last == _OPAQUE:
        return Empty(tuple(above))
    name = last.removeprefix(_WHITEOUT)
    if name in (b"", b".", b"..") or last.startswith(_RESERVED):
        raise BadImage(f"entry {printable(raw)}: a whiteout of nothing that can be there")
    return Remove((*above, name))


def link_text(raw: bytes, *, name: bytes) -> bytes:
    """Return a symbolic link's text as it is: it means something inside a sandbox only; nobody follows it here."""
    if not raw or b"\0" in raw or len(raw) > LINK_BYTES_MAX:
        raise BadImage(f"entry {printable(name)}: its link is empty, longer than {LINK_BYTES_MAX} bytes or has a NUL")
    return raw


def shown_mode(mode: int, uid: int, *, directory: bool) -> int:
    """Return the mode on disk. Everything has one owner there, and an agent is none but "others".

    What belongs to root in the image shows to an agent as to any other user of that image, so what is closed stays
    closed. What belongs to another user shows as to that user: the agent stands in for them. Nothing is writable for an
    agent; set-id and sticky bits are gone.
    """
    others = mode & 0o5
    if uid != 0:
        others |= (mode >> 6) & 0o5
    owner = 0o700 if directory or others & 1 else 0o600
    return owner | others << 3 | others
