"""Names and ids: made from entropy that is passed in, and parsed where a caller supplies them (pure)."""

import base64
import re
from collections.abc import Callable
from typing import Final, NewType

from supervisord.errors import InvalidInput

AgentId = NewType("AgentId", str)
AgentName = NewType("AgentName", str)
GrantId = NewType("GrantId", str)
ReceiptId = NewType("ReceiptId", str)
StreamId = NewType("StreamId", str)
PolicyName = NewType("PolicyName", str)

Entropy = Callable[[int], bytes]
"""Gives that many unpredictable bytes; `os.urandom` in the daemon."""

ENTROPY_BYTES: Final = 16
ID_CHARACTERS: Final = 26  # base32 of 16 bytes without padding
NAME_CHARACTERS_MAX: Final = 63
INSTANCE_CHARACTERS_MAX: Final = 32
LABEL_VALUE_CHARACTERS_MAX: Final = 128
LABELS_MAX: Final = 32
IDEMPOTENCY_KEY_CHARACTERS_MAX: Final = 128

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
_INSTANCE: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}", re.ASCII)
_ID: Final = re.compile(r"[a-z]{2}_[a-z2-7]{26}", re.ASCII)
_LABEL_KEY: Final = re.compile(r"[a-z0-9][a-z0-9._/-]{0,62}", re.ASCII)
_LABEL_VALUE: Final = re.compile(r"[A-Za-z0-9._:/@+ -]{0,128}", re.ASCII)
_IDEMPOTENCY_KEY: Final = re.compile(r"[A-Za-z0-9._:/-]{1,128}", re.ASCII)
_SHOWN_CHARACTERS_MAX: Final = 80


def new_agent_id(entropy: Entropy) -> AgentId:
    return AgentId(_new("ag", entropy))


def new_grant_id(entropy: Entropy) -> GrantId:
    return GrantId(_new("gr", entropy))


def new_receipt_id(entropy: Entropy) -> ReceiptId:
    return ReceiptId(_new("rc", entropy))


def new_hold_id(entropy: Entropy) -> str:
    return _new("ho", entropy)


def new_request_id(entropy: Entropy) -> str:
    return _new("rq", entropy)


def new_stream_id(entropy: Entropy) -> StreamId:
    return StreamId(_new("st", entropy))


def is_agent_id(text: str) -> bool:
    return text.startswith("ag_") and _ID.fullmatch(text) is not None


def agent_id(text: str) -> AgentId:
    """The text as an agent id, or InvalidInput."""
    return AgentId(_id("agent id", "ag", text))


def grant_id(text: str) -> GrantId:
    return GrantId(_id("grant id", "gr", text))


def receipt_id(text: str) -> ReceiptId:
    return ReceiptId(_id("receipt id", "rc", text))


def stream_id(text: str) -> StreamId:
    return StreamId(_id("stream id", "st", text))


def agent_name(text: str) -> AgentName:
    """The text as an agent's name, or InvalidInput.

    A name that begins like an id (`ag_`) is refused: NAME on the command line is either, and must not be ambiguous.
    """
    _name("agent name", text)
    if text.startswith("ag_"):
        raise InvalidInput(f"cannot use agent name {shown(text)}: ag_ begins an agent id", remedy="choose another name")
    return AgentName(text)


def policy_name(text: str) -> PolicyName:
    return PolicyName(_name("policy name", text))


def instance_name(text: str) -> str:
    """The text as an instance's name, or InvalidInput; it becomes part of cgroup, namespace and interface names."""
    if _INSTANCE.fullmatch(text) is None:
        raise InvalidInput(
            f"cannot use instance name {shown(text)}: it does not match [a-z0-9][a-z0-9-]{{0,31}}",
            remedy="use lower-case letters, digits and hyphens, say `default`",
        )
    return text


def label(key: str, value: str) -> tuple[str, str]:
    """The pair as a label, or InvalidInput."""
    if _LABEL_KEY.fullmatch(key) is None or ".." in key:
        raise InvalidInput(
            f"cannot use label key {shown(key)}: it does not match [a-z0-9][a-z0-9._/-]{{0,62}}",
            remedy="use lower-case letters, digits and . _ / -",
        )
    if _LABEL_VALUE.fullmatch(value) is None:
        raise InvalidInput(
            f"cannot use label {key}={shown(value)}: "
            f"a value has up to {LABEL_VALUE_CHARACTERS_MAX} of A-Za-z0-9._:/@+- and space",
            remedy="shorten it or leave other characters out",
        )
    return key, value


def idempotency_key(text: str) -> str:
    if _IDEMPOTENCY_KEY.fullmatch(text) is None:
        raise InvalidInput(
            f"cannot use idempotency key {shown(text)}: it does not match [A-Za-z0-9._:/-]{{1,128}}",
            remedy="a UUID is a good one",
        )
    return text


def image_digest(text: str) -> str:
    """The digest of an image, as postures have it; raises InvalidInput."""
    if not re.fullmatch("sha256:[0-9a-f]{64}", text):
        raise InvalidInput(
            f"cannot use digest {shown(text)}: it is not sha256: and 64 digits of 0-9a-f",
            remedy="copy rootfs_digest from `stockadectl inspect`",
        )
    return text


def shown(text: str) -> str:
    """The text quoted for an error message: bounded, and with nothing in it that drives a terminal."""
    cut = text[:_SHOWN_CHARACTERS_MAX]
    return ascii(cut) + ("…" if len(text) > len(cut) else "")


def _new(prefix: str, entropy: Entropy) -> str:
    raw = entropy(ENTROPY_BYTES)
    if len(raw) != ENTROPY_BYTES:
        raise ValueError(f"entropy gave {len(raw)} bytes instead of {ENTROPY_BYTES}")
    return f"{prefix}_{base64.b32encode(raw).decode('ascii').rstrip('=').lower()}"


def _id(what: str, prefix: str, text: str) -> str:
    if not text.startswith(f"{prefix}_") or _ID.fullmatch(text) is None:
        raise InvalidInput(
            f"cannot use {what} {shown(text)}: it is not {prefix}_ and {ID_CHARACTERS} characters of a-z2-7",
            remedy="copy it from the output of stockadectl",
        )
    return text


def _name(what: str, text: str) -> str:
    if _NAME.fullmatch(text) is None or ".." in text:
        raise InvalidInput(
            f"cannot use {what} {shown(text)}: it does not match [a-z0-9][a-z0-9._-]{{0,62}} without `..`",
            remedy="use lower-case letters, digits and . _ -, beginning with a letter or digit",
        )
    return text
