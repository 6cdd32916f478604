"""The tree against RFC 6962's published vectors and against pymerkle, an implementation that is not ours."""

import hashlib

import pymerkle  # type: ignore[import-untyped]  # it has no types
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisord.actions import merkle

# The inputs and roots of certificate-transparency-go's and Trillian's reference tests.
INPUTS = [bytes.fromhex(text) for text in ("", "00", "10", "2021", "3031", "40414243",
                                           "5051525354555657", "606162636465666768696a6b6c6d6e6f")]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def tree(count: int) -> tuple[list[bytes], merkle.Node]:
    leaves = [merkle.leaf_hash(b"%d" % number) for number in range(count)]

    def node(level: int, index: int) -> bytes:
        if level == 0:
            return leaves[index]
        return merkle.node_hash(node(level - 1, 2 * index), node(level - 1, 2 * index + 1))

    return leaves, node


def other(count: int) -> pymerkle.InmemoryTree:
    theirs = pymerkle.InmemoryTree(algorithm="sha256")
    for number in range(count):
        theirs.append_entry(b"%d" % number)
    return theirs


def test_roots_are_those_of_the_reference_vectors() -> None:
    assert merkle.root_of([]) == hashlib.sha256(b"").digest()
    frontier = merkle.Frontier()
    for data, root in zip(INPUTS, ROOTS, strict=True):
        frontier.add(merkle.leaf_hash(data))
        assert frontier.root().hex() == root
        assert frontier.fits()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 31, 33, 64, 100])
def test_roots_and_proofs_are_those_of_pymerkle(count: int) -> None:
    leaves, node = tree(count)
    theirs = other(count)
    root = merkle.root_of(leaves)
    assert root == theirs.get_root()
    assert merkle.range_root(0, count, node) == root
    for index in range(count):
        path = merkle.inclusion_path(index, count, node)
        found = theirs.prove_inclusion(index + 1).serialize()["path"]
        assert [item.hex() for item in path] == found[1:]
        assert merkle.inclusion_holds(index, count, leaves[index], path, root)
    for old in range(1, count):
        # pymerkle's consistency proofs have a form of their own, so ours are checked between its roots.
        old_root = other(old).get_root()
        assert merkle.consistency_holds(old, count, old_root, root, merkle.consistency_path(old, count, node))


def test_consistency_proofs_are_those_of_the_rfcs_example() -> None:
    """RFC 6962 section 2.1.3: PROOF(3, D[7]) = [c, d, g, l], PROOF(4, D[7]) = [l], PROOF(6, D[7]) = [i, j, k]."""
    leaves, node = tree(7)
    c, d, j = leaves[2], leaves[3], leaves[6]
    g, i, k = node(1, 0), node(1, 2), node(2, 0)
    last = merkle.node_hash(i, j)
    assert merkle.consistency_path(3, 7, node) == (c, d, g, last)
    assert merkle.consistency_path(4, 7, node) == (last,)
    assert merkle.consistency_path(6, 7, node) == (i, j, k)


@given(st.integers(1, 80).flatmap(lambda size: st.tuples(st.integers(1, size), st.just(size))), st.data())
def test_proofs_hold_for_what_they_prove_and_for_nothing_else(sizes: tuple[int, int], data: st.DataObject) -> None:
    old, size = sizes
    leaves, node = tree(size)
    root, old_root = merkle.root_of(leaves), merkle.root_of(leaves[:old])
    path = merkle.consistency_path(old, size, node)
    assert merkle.consistency_holds(old, size, old_root, root, path)
    index = data.draw(st.integers(0, size - 1))
    inclusion = merkle.inclusion_path(index, size, node)
    assert not merkle.inclusion_holds(index, size, merkle.leaf_hash(b"other"), inclusion, root)
    assert not merkle.inclusion_holds(index, size, leaves[index], (*inclusion, root), root)
    assert not merkle.inclusion_holds(size, size, leaves[index], inclusion, root)
    if inclusion:
        assert not merkle.inclusion_holds(index, size, leaves[index], inclusion[:-1], root)
    if old < size:
        assert not merkle.consistency_holds(old, size, merkle.leaf_hash(b"other"), root, path)
        assert not merkle.consistency_holds(old, size, old_root, merkle.leaf_hash(b"other"), path)
        assert not merkle.consistency_holds(old, size, old_root, root, path[:-1])
