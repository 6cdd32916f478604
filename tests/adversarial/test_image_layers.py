"""Layers that attack whoever unpacks them, each through the real unpacker, each with a benign twin that passes."""

from __future__ import annotations

import os
import stat

import pytest

from supervisord.errors import CannotLaunch
from tests.support.image import BLOCK, Built, entry, header, layer, pax, record
from tests.support.image_store import DIR, FILE, VICTIM, Place

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the unpacker gives it up")


HOSTILE: dict[str, tuple[bytes, str, bytes]] = {
    "a name that leads out": (entry(b"../x"), "leads out", entry(b"x")),
    "a name that leads out later": (entry(b"a/../../x"), "leads out", entry(b"a/x")),
    "an absolute name": (entry(VICTIM.encode() + b"/x"), "absolute", entry(VICTIM[1:].encode() + b"/x")),
    "a link, then a write through it": (
        entry(b"out", b"2", link=VICTIM.encode()) + entry(b"out/x", b"0", b"x"),
        "through the symbolic link out",
        entry(b"out", b"2", link=VICTIM.encode()) + entry(b"in/x", b"0", b"x"),
    ),
    "a relative link, then a write through it": (
        DIR + entry(b"dir/out", b"2", link=b"../../../../../.." + VICTIM.encode()) + entry(b"dir/out/x"),
        "through the symbolic link dir/out",
        DIR + entry(b"dir/out", b"2", link=b"..") + entry(b"dir/x"),
    ),
    "a link, then a directory through it": (
        entry(b"out", b"2", link=VICTIM.encode()) + entry(b"out/d/", b"5"),
        "through the symbolic link",
        entry(b"out", b"2", link=VICTIM.encode()) + entry(b"out/", b"5"),
    ),
    "a hard link out of the image": (
        entry(b"x", b"1", link=b"../../../../etc/shadow"),
        "leads out",
        FILE + entry(b"x", b"1", link=b"file"),
    ),
    "a hard link to an absolute name": (
        entry(b"x", b"1", link=b"/etc/shadow"),
        "absolute",
        entry(b"etc/shadow") + entry(b"x", b"1", link=b"./etc/shadow"),
    ),
    "a hard link to a symbolic link": (
        entry(b"s", b"2", link=b"/etc/shadow") + entry(b"x", b"1", link=b"s"),
        "no regular file",
        FILE + entry(b"s", b"2", link=b"/etc/shadow") + entry(b"x", b"1", link=b"file"),
    ),
    "a hard link through a symbolic link": (
        entry(b"s", b"2", link=b"/etc") + entry(b"x", b"1", link=b"s/shadow"),
        "through the symbolic link",
        DIR + entry(b"dir/shadow") + entry(b"x", b"1", link=b"dir/shadow"),
    ),
    "a hard link to itself": (entry(b"x", b"1", link=b"x"), "no file", FILE + entry(b"x", b"1", link=b"file")),
    "a hard link to a directory": (
        DIR + entry(b"x", b"1", link=b"dir"),
        "no regular file",
        DIR + FILE + entry(b"x", b"1", link=b"file"),
    ),
    "a block device": (entry(b"tmp/sda", b"4"), "device outside of /dev", entry(b"dev/sda", b"4")),
    "a character device": (entry(b"mem", b"3"), "device outside of /dev", entry(b"./dev/mem", b"3")),
    "a fifo": (entry(b"pipe", b"6"), "fifo outside of /dev", entry(b"dev/pipe", b"6")),
    "a whiteout of the directory above": (entry(b"dir/.wh..."), "whiteout of nothing", entry(b"dir/.wh.x")),
    "a whiteout of the directory": (entry(b".wh.."), "whiteout of nothing", entry(b".wh...x")),
    "a whiteout of nothing": (entry(b".wh."), "whiteout of nothing", entry(b"wh.")),
    "a reserved whiteout": (entry(b".wh..wh.plnk"), "whiteout of nothing", entry(b".wh..wh..opq")),
    "a whiteout with content": (entry(b".wh.x", b"0", b"1"), "whiteout with content", entry(b".wh.x")),
    "a whiteout that is a link": (entry(b".wh.x", b"2", link=b"y"), "empty regular file", entry(b".wh.x")),
    "a file in a whiteout": (entry(b".wh.x/y"), "lies in a whiteout", entry(b"x/y")),
    "a whiteout through a link": (
        entry(b"out", b"2", link=VICTIM.encode()) + entry(b"out/.wh.x"),
        "through the symbolic link",
        DIR + entry(b"dir/.wh.x"),
    ),
    "an opaque whiteout through a link": (
        entry(b"out", b"2", link=VICTIM.encode()) + entry(b"out/.wh..wh..opq"),
        "through the symbolic link",
        DIR + entry(b"dir/.wh..wh..opq"),
    ),
    "a NUL byte in a long name": (pax(path=b"a\0b") + entry(b"x"), "NUL byte", pax(path=b"a\nb") + entry(b"x")),
    "an empty name": (entry(b""), "empty", entry(b"x")),
    "a name of 256 bytes": (pax(path=b"n" * 256) + entry(b"x"), "longer than 255", pax(path=b"n" * 255) + entry(b"x")),
    "a path of 2049 bytes": (
        pax(path=b"/".join([b"n" * 204] * 10)[:2048] + b"xx") + entry(b"x"),
        "longer than 2048",
        pax(path=b"/".join([b"n" * 203] * 10)) + entry(b"x"),
    ),
    "129 directories deep": (
        pax(path=b"/".join([b"d"] * 129)) + entry(b"x"),
        "128 directories",
        pax(path=b"/".join([b"d"] * 128)) + entry(b"x"),
    ),
    "a link's text of 4096 bytes": (
        pax(linkpath=b"l" * 4096) + entry(b"s", b"2"),
        "longer than 4095",
        pax(linkpath=b"l" * 4095) + entry(b"s", b"2"),
    ),
    "an empty link": (entry(b"s", b"2"), "link is empty", entry(b"s", b"2", link=b"x")),
    "a size that is no number": (pax(size=b"0x4") + FILE, "not a whole number", pax(size=b"4") + FILE),
    "a size below zero": (pax(size=b"-1") + FILE, "not a whole number", pax(size=b"04") + FILE),
    "a size beyond all files": (pax(size=b"9" * 30) + FILE, "not a whole number", pax(size=b"4") + FILE),
    "a size beyond the layer": (pax(size=b"100000") + FILE, "middle of an entry", pax(size=b"4") + FILE),
    "a negative size in base 256": (
        header(b"x", size_field=b"\xff" * 12),
        "negative size",
        header(b"x", size_field=b"\x80" + b"\0" * 11),
    ),
    "a link with content": (
        entry(b"s", b"2", b"content", link=b"x"),
        "symbolic link with content",
        entry(b"s", b"2", link=b"x"),
    ),
    "a directory with content": (entry(b"d/", b"5", b"content"), "directory with content", entry(b"d/", b"5")),
    "a doubled key": (
        entry(b"p", b"x", record("path", b"a") + record("path", b"b")) + FILE,
        "doubled",
        entry(b"p", b"x", record("path", b"a") + record("comment", b"b")) + FILE,
    ),
    "a record of no length": (entry(b"p", b"x", b"0 a=b\n") + FILE, "cut, doubled", pax(comment=b"b") + FILE),
    "a global header that renames": (
        entry(b"g", b"g", record("path", b"../x")) + FILE,
        "global header",
        entry(b"g", b"g", record("comment", b"../x")) + FILE,
    ),
    "two long names": (
        entry(b"L", b"L", b"a\0") + entry(b"L", b"L", b"b\0") + FILE,
        "two long names",
        entry(b"L", b"L", b"a\0") + FILE,
    ),
    "a long name that leads out": (entry(b"L", b"L", b"../x\0") + FILE, "leads out", entry(b"L", b"L", b"x\0") + FILE),
    "an extended header of 2 MiB": (
        entry(b"p", b"x", b"x" * (2 << 20)) + FILE,
        "extended header of more",
        pax(comment=b"x" * 10000) + FILE,
    ),
    "an old sparse file": (entry(b"x", b"S"), "sparse", FILE),
    "a new sparse file": (pax(GNU__sparse__size=b"99999999999") + FILE, "sparse", pax(GNU_sparse=b"9") + FILE),
    "an unknown type": (entry(b"x", b"Q"), "unknown type", FILE),
    "a wrong checksum": (FILE[:150] + b"7" + FILE[151:], "checksum", FILE),
    "an archive that is none": (b"not a tar at all".ljust(BLOCK, b"!"), "not octal", FILE),
    "the root as a file": (entry(b"./", b"0"), "root of an image", entry(b"./", b"5", mode=0o700)),
    "more entries than allowed": (
        b"".join(entry(b"%d" % number) for number in range(300)),
        "more than 300 entries",
        b"".join(entry(b"%d" % number) for number in range(299)),
    ),
    "more directories than allowed": (
        b"".join(pax(path=b"/".join([b"%d" % number] * 100)) + entry(b"x") for number in range(1, 4)) + FILE,
        "more than 300 entries",
        pax(path=b"/".join([b"d"] * 100)) + entry(b"x"),
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
async def test_a_hostile_layer_is_refused_and_its_twin_is_not(place: Place, what: str) -> None:
    hostile, says, benign = HOSTILE[what]
    bad = Built([layer(FILE), layer(hostile)]).layout(place.directory / "bad")
    with pytest.raises(CannotLaunch, match=says):
        await place.open(bad)
    assert place.kept() == []
    good = Built([layer(FILE), layer(benign)]).layout(place.directory / "good")
    await place.tree(good)
    assert len(place.kept()) == 1


async def test_set_id_bits_attributes_and_devices_are_left_out_and_counted(place: Place) -> None:
    bits = entry(b"su", mode=0o6755) + entry(b"sticky/", b"5", mode=0o3777)
    attribute = pax(SCHILY__xattr__security__capability=b"\x01\0\0\x02") + entry(b"cap", mode=0o755)
    built = Built([layer(bits, attribute, entry(b"dev/null", b"3", mode=0o666), entry(b"plain", mode=0o755))])
    found = await place.tree(built.oci_archive(place.directory / "image.tar"))
    modes = {name: stat.S_IMODE(facts.st_mode) for name, facts in found.items()}
    assert modes == {"su": 0o755, "sticky": 0o755, "cap": 0o755, "plain": 0o755}
    root = next((place.directory / "images" / "1").iterdir()) / "rootfs"
    assert os.listxattr(root / "cap") == []
    counts = place.actions[-1].details
    assert (counts["dropped_set_id_bits"], counts["dropped_xattrs"], counts["dropped_devices"]) == (2, 1, 1)


async def test_one_owner_who_is_neither_root_nor_an_agent_and_modes_for_others(place: Place) -> None:
    built = Built(
        [
            layer(
                entry(b"root-only", mode=0o600),
                entry(b"root-dir/", b"5", mode=0o700),
                entry(b"of-a-user", uid=1000, mode=0o600),
                entry(b"program-of-a-user", uid=1000, mode=0o700),
                entry(b"for-all", mode=0o666),
            )
        ]
    )
    found = await place.tree(built.docker_archive(place.directory / "image.tar"))
    modes = {name: stat.S_IMODE(facts.st_mode) for name, facts in found.items()}
    assert modes == {
        "root-only": 0o600,
        "root-dir": 0o700,
        "of-a-user": 0o644,
        "program-of-a-user": 0o755,
        "for-all": 0o644,
    }
    assert {facts.st_uid for facts in found.values()}.isdisjoint({0, 1000, os.getuid()})
    assert len({facts.st_uid for facts in found.values()}) == 1


async def test_a_name_that_comes_twice_is_what_came_last_and_nothing_is_written_through_the_first(place: Place) -> None:
    twice = entry(b"x", b"2", link=f"{VICTIM}/x".encode()) + entry(b"x", b"0", b"mine") + entry(b"d", b"2", link=b"/")
    found = await place.tree(Built([layer(twice, entry(b"d/", b"5"), entry(b"d/y"))]).layout(place.directory / "i"))
    assert stat.S_ISREG(found["x"].st_mode)
    assert stat.S_ISDIR(found["d"].st_mode)
    assert "d/y" in found


async def test_whiteouts_take_from_lower_layers_only(place: Place) -> None:
    lower = layer(entry(b"a/old"), entry(b"a/b/old"), entry(b"gone"), entry(b"tree/deep/file"), entry(b"kept"))
    upper = layer(
        entry(b"a/new"),  # before the marker, and still of this layer
        entry(b"a/.wh..wh..opq"),
        entry(b"a/b/new"),
        entry(b".wh.gone"),
        entry(b".wh.tree"),
        entry(b"again"),
        entry(b".wh.again"),
    )
    found = await place.tree(Built([lower, upper]).layout(place.directory / "i"))
    assert set(found) == {"a", "a/new", "a/b", "a/b/new", "kept", "again"}
