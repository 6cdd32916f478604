"""The Merkle tree of RFC 6962 section 2.1, with SHA-256: hashes, roots, proofs and their checks (pure)."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

HASH_BYTES: Final = 32
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()

# Gives the hash of the complete subtree over the leaves [index << level, (index + 1) << level).
Node = Callable[[int, int], bytes]


def leaf_hash(data: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(slots=True)
class Frontier:
    """The growing edge of a tree: the roots of its complete subtrees, largest first. Adding a leaf is O(1)."""

    size: int = 0
    hashes: list[bytes] = field(default_factory=list)

    def add(self, leaf: bytes) -> None:
        size = self.size
        hashes = self.hashes
        while size & 1:
            leaf = hashlib.sha256(b"\x01" + hashes.pop() + leaf).digest()
            size >>= 1
        hashes.append(leaf)
        self.size += 1

    def root(self) -> bytes:
        if not self.hashes:
            return EMPTY_ROOT
        root = self.hashes[-1]
        for left in reversed(self.hashes[:-1]):
            root = node_hash(left, root)
        return root

    def copy(self) -> "Frontier":
        return Frontier(self.size, list(self.hashes))

    def fits(self) -> bool:
        """Whether the number of hashes is the one that a tree of this size has."""
        return len(self.hashes) == self.size.bit_count()


def root_of(leaves: Iterable[bytes]) -> bytes:
    """The root over leaf hashes."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.add(leaf)
    return frontier.root()


def inclusion_path(index: int, size: int, node: Node) -> tuple[bytes, ...]:
    """PATH(index, D[size]) of section 2.1.1, from the leaf upwards."""
    if not 0 <= index < size:
        raise ValueError(f"leaf {index} is not in a tree of {size}")
    return tuple(_path(index, 0, size, node))


def consistency_path(old: int, size: int, node: Node) -> tuple[bytes, ...]:
    """PROOF(old, D[size]) of section 2.1.2."""
    if not 0 < old <= size:
        raise ValueError(f"there is no proof from a tree of {old} to one of {size}")
    return tuple(_subproof(old, 0, size, node, whole=True))


def inclusion_holds(index: int, size: int, leaf: bytes, path: Sequence[bytes], root: bytes) -> bool:
    """Check an inclusion proof as RFC 9162 section 2.1.3.2 does."""
    if not 0 <= index < size:
        return False
    low, last, result = index, size - 1, leaf
    for sibling in path:
        if last == 0:
            return False
        if low & 1 or low == last:
            result = node_hash(sibling, result)
            while low & 1 == 0 and low:
                low >>= 1
                last >>= 1
        else:
            result = node_hash(result, sibling)
        low >>= 1
        last >>= 1
    return last == 0 and result == root


def consistency_holds(old: int, size: int, old_root: bytes, root: bytes, path: Sequence[bytes]) -> bool:
    """Check a consistency proof as RFC 9162 section 2.1.4.2 does."""
    if not 0 < old <= size:
        return False
    if old == size:
        return not path and old_root == root
    proof = [old_root, *path] if old & (old - 1) == 0 else list(path)
    if not proof:
        return False
    low, last = old - 1, size - 1
    while low & 1:
        low >>= 1
        last >>= 1
    first = second = proof[0]
    for sibling in proof[1:]:
        if last == 0:
            return False
        if low & 1 or low == last:
            first, second = node_hash(sibling, first), node_hash(sibling, second)
            while low & 1 == 0 and low:
                low >>= 1
                last >>= 1
        else:
            second = node_hash(second, sibling)
        low >>= 1
        last >>= 1
    return last == 0 and first == old_root and second == root


def range_root(start: int, size: int, node: Node) -> bytes:
    """MTH over `size` leaves from `start`, which is a multiple of the largest power of two below `size`."""
    if size == 0:
        return EMPTY_ROOT
    if size & (size - 1) == 0:
        level = size.bit_length() - 1
        return node(level, start >> level)
    split = _split(size)
    return node_hash(range_root(start, split, node), range_root(start + split, size - split, node))


def _split(size: int) -> int:
    return 1 << (size - 1).bit_length() - 1


def _path(index: int, start: int, size: int, node: Node) -> list[bytes]:
    if size == 1:
        return []
    split = _split(size)
    if index < split:
        return [*_path(index, start, split, node), range_root(start + split, size - split, node)]
    return [*_path(index - split, start + split, size - split, node), range_root(start, split, node)]


def _subproof(old: int, start: int, size: int, node: Node, *, whole: bool) -> list[bytes]:
    if old == size:
        return [] if whole else [range_root(start, size, node)]
    split = _split(size)
    if old <= split:
        return [*_subproof(old, start, split, node, whole=whole), range_root(start + split, size - split, node)]
    return [
        *_subproof(old - split, start + split, size - split, node, whole=False),
        range_root(start, split, node),
    ]
