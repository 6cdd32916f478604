"""Receipts under the log's key: what a kill did, in a statement that anybody with the public key can check."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from supervisord.actions.sign import sign_receipt

if TYPE_CHECKING:
    from collections.abc import Callable

    from supervisord.actions.checkpoint import Signer
    from supervisord.killswitch import Receipt

KEY_HASH_BYTES: Final = 4


class Signing:
    """Signs receipts. The statement is the text of a C2SP signed note, the signature its Ed25519 signature."""

    def __init__(self, signer: Callable[[], Signer]) -> None:
        self._signer = signer

    def sign(self, receipt: Receipt) -> Receipt:
        note = sign_receipt(
            {
                "receipt_id": receipt.receipt_id,
                "agent_id": receipt.agent_id,
                "name": receipt.name,
                "verified_empty": receipt.verified_empty,
                "processes_killed": receipt.processes_killed,
                "egress_cut_ms": receipt.egress_cut_ms,
                "dead_ms": receipt.dead_ms,
                "reason": receipt.reason,
                "killed_by": receipt.killed_by,
                "time_unix_nanos": receipt.time_ns,
                "already_dead": receipt.already_dead,
                "relays_cut": receipt.relays_cut,
                "bytes_cut": receipt.bytes_cut,
                "grants_revoked": receipt.grants_revoked,
                "left_pids": list(receipt.left_pids),
            },
            self._signer(),
        ).note
        # A note is its text, an empty line, and one line a signature: "— NAME BASE64(key hash || signature)".
        text, _, signatures = note.rpartition("\n\n")
        raw = base64.b64decode(signatures.split()[-1])
        return replace(receipt, statement=f"{text}\n".encode(), signature=raw[KEY_HASH_BYTES:])
