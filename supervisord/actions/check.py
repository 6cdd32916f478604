"""Checking a log's frames one after another against its own tree and signatures (pure)."""

import base64
from dataclasses import dataclass, field
from typing import assert_never

from supervisord.actions import encoding
from supervisord.actions.checkpoint import Checkpoint, Verifier, open_checkpoint
from supervisord.actions.merkle import Frontier
from supervisord.actions.segments import Frame, Kind
from supervisord.actions.types import BadNote


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
            case _:
                assert_never(frame.kind)

    def final_tree(self) -> Frontier:
        tree = self.tree.copy()
        for leaf in self.unsealed:
            tree.add(leaf)
        return tree

    def _entry(self, frame: Frame) -> None:
        expected = self.size + 1
        try:
            seq = encoding.seq_of(frame.payload) if self.shallow else encoding.decode(frame.payload)[0]
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
        if not self.unsealed:
            self.offset_unsealed = frame.offset
        self.unsealed.append(frame.leaf_hash)
        root = self.kept.pop(expected, None)
        if root is not None:
            self._compare(expected, root, offset=frame.offset)
            self.proven = expected

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
