"""Signed notes, checkpoints and receipts: C2SP's form, byte for byte, and nothing that only looks like it."""

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from supervisord.actions.checkpoint import Checkpoint, Signer, Verifier, open_checkpoint, open_note
from supervisord.actions.merkle import EMPTY_ROOT
from supervisord.actions.sign import sign_receipt, verify_receipt
from supervisord.actions.types import BadNote

# The example key and note of golang.org/x/mod/sumdb/note, where the format comes from.
PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
GO_NOTE = (
    "If you think cryptography is the answer to your problem,\n"
    "then you don't know what your problem is.\n\n"
    "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)

SIGNER = Signer.of("stockade.local/actions", Ed25519PrivateKey.from_private_bytes(b"\x07" * 32))
OTHER = Signer.of("stockade.local/actions", Ed25519PrivateKey.from_private_bytes(b"\x08" * 32))


def test_a_note_of_another_implementation_is_verified() -> None:
    verifier = Verifier.parse(PETER)
    assert verifier.text() == PETER
    assert open_note(GO_NOTE, verifier).startswith("If you think")
    with pytest.raises(BadNote):
        open_note(GO_NOTE.replace("your problem is", "my problem is"), verifier)


def test_a_checkpoint_has_the_specified_form() -> None:
    note = SIGNER.sign(Checkpoint(SIGNER.verifier.name, 0, EMPTY_ROOT).text())
    lines = note.split("\n")
    assert lines[:4] == ["stockade.local/actions", "0", base64.b64encode(EMPTY_ROOT).decode(), ""]
    assert lines[4].startswith("— stockade.local/actions ")
    signature = base64.b64decode(lines[4].rpartition(" ")[2])
    assert signature[:4] == SIGNER.verifier.key_id
    assert len(signature) == 68
    assert open_checkpoint(note, SIGNER.verifier) == Checkpoint(SIGNER.verifier.name, 0, EMPTY_ROOT)


def test_every_changed_byte_of_a_checkpoint_is_noticed() -> None:
    note = SIGNER.sign(Checkpoint(SIGNER.verifier.name, 41, EMPTY_ROOT).text())
    for at in range(len(note)):
        changed = note[:at] + chr(ord(note[at]) ^ 1) + note[at + 1 :]
        with pytest.raises(BadNote):
            open_checkpoint(changed, SIGNER.verifier)


@pytest.mark.parametrize("text", ["a\n1\n", "a\n01\nAA==\n", "a\n-1\n%s\n", "a\n٣\n%s\n", "a\n1\nAAAA\n"])
def test_texts_that_are_no_checkpoints(text: str) -> None:
    signed = SIGNER.sign(text.replace("a\n", f"{SIGNER.verifier.name}\n", 1).replace("%s", "A" * 43 + "="))
    with pytest.raises(BadNote):
        open_checkpoint(signed, SIGNER.verifier)


def test_a_checkpoint_of_another_log_or_key_is_refused() -> None:
    foreign = SIGNER.sign(Checkpoint("elsewhere.example/log", 3, EMPTY_ROOT).text())
    with pytest.raises(BadNote, match="elsewhere"):
        open_checkpoint(foreign, SIGNER.verifier)
    with pytest.raises(BadNote, match="no signature"):
        open_checkpoint(OTHER.sign(Checkpoint(OTHER.verifier.name, 3, EMPTY_ROOT).text()), SIGNER.verifier)


def test_a_second_signature_does_no_harm() -> None:
    text = Checkpoint(SIGNER.verifier.name, 3, EMPTY_ROOT).text()
    note = SIGNER.sign(text) + OTHER.sign(text).rpartition("\n\n")[2]
    assert open_checkpoint(note, SIGNER.verifier).size == 3
    assert open_checkpoint(note, OTHER.verifier).size == 3


@pytest.mark.parametrize("text", ["", "x", "a+b+c", PETER.replace("c74f20a3", "c74f20a4"), PETER[:-4], "+" + PETER])
def test_bad_public_keys(text: str) -> None:
    with pytest.raises(BadNote):
        Verifier.parse(text)


def test_receipts_are_verified_and_are_no_checkpoints() -> None:
    receipt = sign_receipt({"receipt_id": "rc_x", "verified_empty": True, "dead_ms": 1.5}, SIGNER)
    assert verify_receipt(receipt.note, SIGNER.verifier) == receipt
    with pytest.raises(BadNote):
        verify_receipt(receipt.note.replace("true", "null"), SIGNER.verifier)
    with pytest.raises(BadNote):
        open_checkpoint(receipt.note, SIGNER.verifier)
    checkpoint = SIGNER.sign(Checkpoint(SIGNER.verifier.name, 3, EMPTY_ROOT).text())
    with pytest.raises(BadNote, match="another kind"):
        verify_receipt(checkpoint, SIGNER.verifier)
