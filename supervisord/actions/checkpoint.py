"""Signed notes and checkpoints of C2SP (signed-note v1.0.0, tlog-checkpoint v1.0.0), with Ed25519 (pure).

A note is text that ends in a newline, an empty line, and signature lines `— NAME BASE64(key id || signature)`.
A checkpoint is a note whose text is the log's origin, the tree's size and its root in base64, a line each.
https://github.com/C2SP/C2SP/blob/main/signed-note.md and tlog-checkpoint.md
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from supervisord.actions.types import BadNote

NOTE_BYTES_MAX: Final = 64 * 1024
SIGNATURE_LINES_MAX: Final = 16
_ED25519: Final = b"\x01"
_KEY_ID_BYTES: Final = 4
_KEY_BYTES: Final = 32
_HASH_BYTES: Final = 32
_SIGNATURE_BYTES: Final = 64
_SIZE_DIGITS_MAX: Final = 20
_DASH: Final = "— "


@dataclass(frozen=True, slots=True)
class Verifier:
    """A public key with its name; `text()` is the C2SP form `NAME+KEYID+BASE64`."""

    name: str
    key: bytes

    @property
    def key_id(self) -> bytes:
        return hashlib.sha256(self.name.encode() + b"\n" + _ED25519 + self.key).digest()[:_KEY_ID_BYTES]

    def text(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{base64.b64encode(_ED25519 + self.key).decode()}"

    @classmethod
    def parse(cls, text: str) -> "Verifier":
        """The key in its C2SP form, or BadNote."""
        parts = text.strip().split("+", 2)
        name, key_id, encoded = parts if len(parts) == 3 else ("", "", "")  # noqa: PLR2004 - name, id and key
        data = _unbase64(encoded)
        if not is_name(name) or len(data) != 1 + _KEY_BYTES or data[:1] != _ED25519:
            raise BadNote(
                "cannot read the public key: it is not NAME+KEYID+BASE64 of an Ed25519 key",
                remedy="use the .pub file that lies beside the log's key",
            )
        verifier = cls(name, data[1:])
        if verifier.key_id.hex() != key_id:
            raise BadNote("cannot read the public key: its key id does not belong to it", remedy="copy the file again")
        return verifier


@dataclass(frozen=True, slots=True)
class Signer:
    """A private key with its name."""

    verifier: Verifier
    private: Ed25519PrivateKey

    @classmethod
    def of(cls, name: str, private: Ed25519PrivateKey) -> "Signer":
        if not is_name(name):
            raise BadNote(f"cannot name a key {name!r}: a name has no space, plus or newline and is not empty")
        return cls(Verifier(name, private.public_key().public_bytes_raw()), private)

    def sign(self, text: str) -> str:
        """The note over `text`, which must end in a newline."""
        if not _is_text(text):
            raise BadNote("cannot sign the note: its text does not end in a newline or holds control characters")
        signature = self.verifier.key_id + self.private.sign(text.encode())
        return f"{text}\n{_DASH}{self.verifier.name} {base64.b64encode(signature).decode()}\n"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log's key vouches for: this many entries, and this root over them."""

    origin: str
    size: int
    root: bytes

    def text(self) -> str:
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"


def is_name(name: str) -> bool:
    return bool(name) and name.isprintable() and not any(c.isspace() or c == "+" for c in name)


def open_note(note: str, verifier: Verifier) -> str:
    """The text of a note that `verifier`'s key signed, or BadNote. Other keys' signatures are ignored, as specified."""
    if len(note) > NOTE_BYTES_MAX:
        raise BadNote(f"cannot read the note: it is longer than {NOTE_BYTES_MAX} bytes")
    text, found, signatures = note.rpartition("\n\n")
    text += "\n"
    if not found or not _is_text(text) or not signatures.endswith("\n"):
        raise BadNote("cannot read the note: it is not text, an empty line and signature lines")
    lines = signatures[:-1].split("\n")
    if len(lines) > SIGNATURE_LINES_MAX:
        raise BadNote(f"cannot read the note: it has more than {SIGNATURE_LINES_MAX} signatures")
    verified = False
    for line in lines:
        name, _, encoded = line.removeprefix(_DASH).partition(" ")
        data = _unbase64(encoded)
        if not line.startswith(_DASH) or not is_name(name) or len(data) <= _KEY_ID_BYTES:
            raise BadNote("cannot read the note: a signature line is malformed")
        if (name, data[:_KEY_ID_BYTES]) == (verifier.name, verifier.key_id):
            _check(text, data[_KEY_ID_BYTES:], verifier)
            verified = True
    if not verified:
        raise BadNote(f"cannot trust the note: it has no signature of {verifier.name}")
    return text


def open_checkpoint(note: str, verifier: Verifier) -> Checkpoint:
    """The checkpoint in a note that `verifier`'s key signed for its own log, or BadNote."""
    lines = open_note(note, verifier).split("\n")
    if len(lines) < 4:  # noqa: PLR2004 - three lines and what follows the last newline
        raise BadNote("cannot read the checkpoint: it has fewer than three lines")
    origin, digits, encoded = lines[:3]
    root = _unbase64(encoded)
    decimal = digits.isascii() and digits.isdigit() and (digits == "0" or digits[0] != "0")
    if not decimal or len(digits) > _SIZE_DIGITS_MAX or len(root) != _HASH_BYTES:
        raise BadNote("cannot read the checkpoint: its second and third line are not a size and a root")
    if origin != verifier.name:
        raise BadNote(f"cannot take the checkpoint: it is of {origin!r}, not of {verifier.name}")
    return Checkpoint(origin, int(digits), root)


def size_of(note: str) -> int:
    """The size in a checkpoint that the caller has signed itself."""
    return int(note.split("\n", 2)[1])


def _is_text(text: str) -> bool:
    # Below U+0020 a note holds newlines only.
    return text.endswith("\n") and not any(c < " " and c != "\n" for c in text)


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text.encode(), validate=True)
    except (binascii.Error, ValueError):
        return b""


def _check(text: str, signature: bytes, verifier: Verifier) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(verifier.key).verify(signature, text.encode())
    except (InvalidSignature, ValueError) as error:
        raise BadNote(f"cannot trust the note: the signature of {verifier.name} does not fit it") from error
