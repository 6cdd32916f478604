"""Checking a log's frames one after another against its own tree and signatures (pure)."""

import base64
from dataclasses import dataclass, field
from typing import assert_never

from supervisord.actions import encoding, keys, redaction
from supervisord.actions.checkpoint import Checkpoint, Verifier, open_checkpoint
from supervisord.actions.merkle import Frontier
from supervisord.actions.segments import Frame, Kind, mark_of
from supervisord.actions.types import Action, BadNote

RETIRE_VERB = "log.retire"


class Altered(Exception):  # noqa: N818 - a finding, caught where it is judged
    """Whole frames that contradict the order, the tree or a signature. `first` to `last` are in question."""

    def __init__(self, cause: str, *, offset: int, first: int, last: int) -> None:
        super().__init__(cause)
        self.cause = cause
        self.offset = offset
        self.first = first
        self.last = last


@dataclass(slots=True)
class Checker:
    """Takes frames in order. Leaves wait in `unsealed` until a checkpoint vouches for them."""

    verifier: Verifier
    tree: Frontier = field(default_factory=Frontier)
    shallow: bool = False  # take the hash's word for an entry's form: for opening, not for verifying
    unsealed: list[bytes] = field(default_factory=list)
    offset_unsealed: int = 0
    # Checkpoints from elsewhere (the file beside the segments, one that somebody kept), by size.
    kept: dict[int, bytes] = field(default_factory=dict)
    following: Verifier | None = None  # the key that an entry handed over to; in force from the next segment on
    retired: int = 0  # entries that the log itself says are kept no longer
    redacted: dict[int, redaction.Redacted] = field(default_factory=dict)  # by seq; `unordered` judges them
    orders: dict[int, redaction.Order] = field(default_factory=dict)  # by the order's own seq
    proven: int = 0  # the largest of those that fitted; the segments' own may come behind it and be smaller

    @property
    def sealed(self) -> int:
        """Entries that a signature covers."""
        return max(self.tree.size, self.proven)

    @property
    def size(self) -> int:
        return self.tree.size + len(self.unsealed)

    def take(self, frame: Frame) -> None:
        """Raises Altered."""
        match frame.kind:
            case Kind.ENTRY:
                self._entry(frame)
            case Kind.CHECKPOINT:
                self._checkpoint(frame)
            case Kind.REDACTED:
                self._redacted(frame)
            case _:
                assert_never(frame.kind)

    def final_tree(self) -> Frontier:
        tree = self.tree.copy()
        for leaf in self.unsealed:
            tree.add(leaf)
        return tree

    def unordered(self) -> tuple[redaction.Redacted, str] | None:
        """A redacted entry that no signed entry orders to be so, and what is wrong; to be asked at the log's end."""
        for seq, found in self.redacted.items():
            wrong = redaction.judge(found, self.orders.get(found.mark.order), sealed=self.sealed)
            if wrong:
                return self.redacted[seq], wrong
        return None

    def _redacted(self, frame: Frame) -> None:
        seq = self.size + 1
        if self.shallow:
            cause = f"entry {seq} is redacted, and no daemon redacts in the segment that it writes"
            raise Altered(cause, offset=frame.offset, first=seq, last=seq)
        self.redacted[seq] = redaction.Redacted(seq, frame.offset, frame.leaf_hash, mark_of(frame))
        self._leaf(frame, None)

    def _entry(self, frame: Frame) -> None:
        expected = self.size + 1
        action: Action | None = None
        try:
            if self.shallow:
                seq = encoding.seq_of(frame.payload)
            else:
                seq, _, action = encoding.decode(frame.payload)
        except encoding.NotCanonical as error:
            raise Altered(
                f"entry {expected} is malformed: {error}", offset=frame.offset, first=expected, last=expected
            ) from error
        if seq != expected:
            raise Altered(
                f"entry {expected} is missing or moved: entry {seq} is in its place",
                offset=frame.offset,
                first=expected,
                last=expected,
            )
        self._leaf(frame, action)

    def _leaf(self, frame: Frame, action: Action | None) -> None:
        seq = self.size + 1
        if not self.unsealed:
            self.offset_unsealed = frame.offset
        self.unsealed.append(frame.leaf_hash)
        if action is not None and action.verb.startswith("log."):
            self._note(action, frame)
        root = self.kept.pop(seq, None)
        if root is not None:
            self._compare(seq, root, offset=frame.offset)
            self.proven = seq

    def _note(self, action: Action, frame: Frame) -> None:
        """What entries say about the log itself."""
        order = redaction.order_of(self.size, action)
        if order is not None:
            self.orders[self.size] = order
        last = action.details.get("last_seq")
        if action.verb == RETIRE_VERB and action.verdict == "done" and isinstance(last, int):
            self.retired = max(self.retired, last)
        try:
            self.following = keys.handed_over(action, self.verifier) or self.following
        except BadNote as error:
            cause = f"entry {self.size} hands the log over to a key, but not under the log's own: {error}"
            raise Altered(cause, offset=frame.offset, first=self.size, last=self.size) from error

    def begin_segment(self, frame: Frame) -> None:
        """Take the new key where an entry before handed over to it, and the segment's first frame is signed by it."""
        if self.following is not None and frame.kind is Kind.CHECKPOINT:
            try:
                open_checkpoint(frame.payload.decode("utf-8", "replace"), self.following)
            except BadNote:
                return  # the old one went on: the daemon died before the new one was in use
            self.verifier, self.following = self.following, None

    def _checkpoint(self, frame: Frame) -> None:
        try:
            checkpoint = open_checkpoint(frame.payload.decode(), self.verifier)
        except (BadNote, UnicodeDecodeError) as error:
            cause = f"the checkpoint behind entry {self.size} is not this log's: {error}"
            raise Altered(cause, offset=frame.offset, first=self.size, last=self.size) from error
        self.check(checkpoint, offset=frame.offset)

    def check(self, checkpoint: Checkpoint, *, offset: int) -> None:
        """Raises Altered unless the entries so far are those that the checkpoint vouches for."""
        if checkpoint.size > self.size:
            cause = f"entries {self.size + 1} to {checkpoint.size} are gone: a signed checkpoint covers them"
            raise Altered(cause, offset=offset, first=self.size + 1, last=checkpoint.size)
        if checkpoint.size < self.tree.size:
            cause = f"a checkpoint of {checkpoint.size} entries stands behind one of {self.tree.size}"
            raise Altered(cause, offset=offset, first=checkpoint.size, last=self.tree.size)
        self._seal(checkpoint.size, checkpoint.root, offset=self.offset_unsealed or offset)

    def _seal(self, size: int, root: bytes, *, offset: int) -> None:
        tree = self._compare(size, root, offset=offset)
        del self.unsealed[: size - self.tree.size]
        self.tree = tree

    def _compare(self, size: int, root: bytes, *, offset: int) -> Frontier:
        """The tree of the first `size` entries. Raises Altered unless it has this root."""
        first = (self.sealed if self.sealed < size else self.tree.size) + 1
        tree = self.tree.copy()
        for leaf in self.unsealed[: size - self.tree.size]:
            tree.add(leaf)
        if tree.root() != root:
            where = f"entry {size}" if first >= size else f"one of the entries {first} to {size}"
            cause = (
                f"{where} was altered and its hash recomputed: the root over {size} entries is "
                f"{base64.b64encode(tree.root()).decode()}, the signed one {base64.b64encode(root).decode()}"
            )
            raise Altered(cause, offset=offset, first=first, last=size)
        return tree
