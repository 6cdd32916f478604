"""Receipts: small statements under the log's key, such as that a kill left nothing alive (pure).

A receipt is a C2SP signed note of two lines: `stockade-receipt/v1` and canonical JSON. The first line keeps a receipt
from ever being read as a checkpoint (whose second line is a number) and the other way round.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from supervisord.actions.checkpoint import Signer, Verifier, open_note
from supervisord.actions.encoding import canonical_json
from supervisord.actions.types import JSON, BadNote

HEADER: Final = "stockade-receipt/v1"
RECEIPT_BYTES_MAX: Final = 32 * 1024


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was stated, and the note that anybody with the public key can check."""

    fields: Mapping[str, JSON]
    note: str


def sign_receipt(fields: Mapping[str, JSON], signer: Signer) -> Receipt:
    text = canonical_json(fields)
    if len(text) > RECEIPT_BYTES_MAX:
        raise BadNote(f"cannot sign the receipt: it is longer than {RECEIPT_BYTES_MAX} bytes")
    return Receipt(dict(fields), signer.sign(f"{HEADER}\n{text}\n"))


def verify_receipt(note: str, verifier: Verifier) -> Receipt:
    """The receipt in a note that the key signed, or BadNote."""
    header, _, body = open_note(note, verifier).partition("\n")
    if header != HEADER:
        raise BadNote("cannot read the receipt: it is a note of another kind")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadNote("cannot read the receipt: it is not JSON") from error
    if not isinstance(fields, dict) or canonical_json(fields) + "\n" != body:
        raise BadNote("cannot read the receipt: it is not a canonical JSON object")
    return Receipt(fields, note)
