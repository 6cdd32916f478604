"""Images: what a name, a mode and a header mean, decided without a file."""

from __future__ import annotations

import io
import json
import posixpath
import tarfile
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.images import documents
from sandbox.images.archive import BLOCK, Kind, Reader
from sandbox.images.documents import Descriptor, choose
from sandbox.images.entries import Empty, Put, Remove, judge, link_text, path_parts, shown_mode
from sandbox.images.limits import BadImage, printable

if TYPE_CHECKING:
    from collections.abc import Callable

PIECES = st.sampled_from(
    [b"", b".", b"..", b"a", b"b c", b".wh.x", b".wh..", b".wh...", b".wh..wh..opq", b"\xff", b"\n"]
)
NAMES = st.lists(PIECES, max_size=6).map(b"/".join)


@given(NAMES)
def test_no_name_that_is_taken_leads_anywhere_else(raw: bytes) -> None:
    """Whatever is taken is, resolved as the kernel would, the same place below the root."""
    try:
        parts = path_parts(raw)
    except BadImage:
        return
    assert not {b"", b".", b".."} & set(parts)
    assert posixpath.normpath(b"/root/" + raw) == posixpath.normpath(b"/root/" + b"/".join(parts))


@given(NAMES)
def test_every_whiteout_is_of_one_thing_in_its_own_directory(raw: bytes) -> None:
    try:
        what = judge(raw, regular=True)
    except BadImage:
        return
    assert not {b"", b".", b".."} & set(what.parts)
    shown = path_parts(raw)
    match what:
        case Put(parts):
            assert parts == shown
            assert not any(part.startswith(b".wh.") for part in parts)
        case Remove(parts):
            assert parts[:-1] == shown[:-1]
            assert b".wh." + parts[-1] == shown[-1]
        case Empty(parts):
            assert (*parts, b".wh..wh..opq") == shown


def refusal(call: Callable[[], object]) -> str:
    """What the refusal says; empty where there was none. Anything but a result or `BadImage` fails the test."""
    try:
        call()
    except BadImage as error:
        return error.message
    return ""


@given(st.binary(max_size=300))
def test_any_bytes_are_a_name_or_refused(raw: bytes) -> None:
    said = refusal(lambda: path_parts(raw))
    assert said == "" or said.isprintable()
    assert said or b"\0" not in raw


@pytest.mark.parametrize("raw", [b"", b"\0", b"a\0", b"/", b"/a", b"..", b"a/..", b"../a", b"a/../b", b"./.."])
def test_names_that_are_refused(raw: bytes) -> None:
    with pytest.raises(BadImage):
        path_parts(raw)


@pytest.mark.parametrize("raw", [b".", b"./", b"a", b"a/", b"./a//b/.", b"...", b"..a", b"a..", b".wh"])
def test_names_that_are_taken(raw: bytes) -> None:
    assert path_parts(raw) == tuple(part for part in raw.split(b"/") if part not in (b"", b"."))


@given(st.integers(0, 0o7777), st.integers(0, 70000), st.booleans())
def test_a_mode_never_lets_others_write_and_has_no_odd_bit(mode: int, uid: int, directory: bool) -> None:  # noqa: FBT001 - hypothesis
    shown = shown_mode(mode, uid, directory=directory)
    assert shown & 0o7022 == 0
    assert (shown & 0o070) >> 3 == shown & 0o007
    if uid == 0:
        assert shown & 0o007 == mode & 0o005, "what root keeps closed in the image stays closed"
    assert shown & 0o400


@pytest.mark.parametrize("raw", [b"", b"a\0b", b"x" * 4096])
def test_texts_that_are_no_link(raw: bytes) -> None:
    with pytest.raises(BadImage):
        link_text(raw, name=b"n")
    assert link_text(b"../../etc/shadow", name=b"n") == b"../../etc/shadow"


def test_what_is_shown_of_an_image_drives_no_terminal() -> None:
    assert printable(b"\x1b[2J\n\xff\x00") == "\\x1b[2J\\x0a\\xff\\x00"
    assert len(printable(b"x" * 5000)) == 201


# --- tar -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_others_write_is_read_alike(form: int) -> None:
    buffer = io.BytesIO()
    long = "/".join(["directory-name"] * (5 if form == tarfile.USTAR_FORMAT else 40))
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, kind, link, content in (
            ("d", tarfile.DIRTYPE, "", b""),
            (f"{long}/f", tarfile.REGTYPE, "", b"x" * 1000),
            ("ü", tarfile.REGTYPE, "", b""),
            ("s", tarfile.SYMTYPE, "t" * (90 if form == tarfile.USTAR_FORMAT else 300), b""),
            ("h", tarfile.LNKTYPE, "d/f", b""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size, member.mode = kind, link, len(content), 0o644
            member.uid = 0 if form == tarfile.USTAR_FORMAT else 3_000_000
            archive.addfile(member, io.BytesIO(content))
    buffer.seek(0)
    reader = Reader(buffer.read)
    found = [(member.name, member.kind, b"".join(reader.content())) for member in reader]
    assert found == [
        (b"d/", Kind.DIRECTORY, b""),
        (f"{long}/f".encode(), Kind.FILE, b"x" * 1000),
        ("ü".encode(), Kind.FILE, b""),
        (b"s", Kind.SYMLINK, b""),
        (b"h", Kind.HARDLINK, b""),
    ]


@given(st.binary(max_size=2000))
def test_any_bytes_are_an_archive_or_refused(data: bytes) -> None:
    said = refusal(lambda: list(Reader(io.BytesIO(data).read)))
    assert said == "" or said.isprintable()


@given(st.integers(0, 3 * BLOCK - 1), st.integers(0, 255))
def test_a_changed_byte_is_noticed_or_harmless(at: int, value: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("name")
        member.size = 600
        archive.addfile(member, io.BytesIO(b"x" * 600))
    data = bytearray(buffer.getvalue())
    data[at] = value
    reader = Reader(io.BytesIO(bytes(data)).read)
    try:
        found = [(member.name, member.size, len(b"".join(reader.content()))) for member in reader]
    except BadImage:
        return
    assert found in ([(b"name", 600, 600)], [])


# --- documents -----------------------------------------------------------------------------------------------------


def descriptor(number: int, platform: str = "linux/amd64", *names: str) -> Descriptor:
    return Descriptor(documents.MANIFESTS[0], f"sha256:{number:064x}", 7, platform, names)


def test_the_one_image_of_this_platform_is_chosen() -> None:
    there = [descriptor(1, "linux/arm64"), descriptor(2), descriptor(3, "unknown/unknown")]
    assert choose(there, "") == there[1]
    assert choose([descriptor(2), descriptor(2)], "") == descriptor(2), "the same twice is one"


def test_names_and_digests_select() -> None:
    there = [
        descriptor(1, "linux/amd64", "v1"),
        descriptor(2, "linux/amd64", "example.com/image:v2", "@sha256:" + "a" * 64),
    ]
    assert choose(there, "v1") == there[0]
    assert choose(there, "v2") == choose(there, "example.com/image:v2") == there[1]
    assert choose(there, there[1].digest) == there[1]
    assert choose(there, "sha256:" + "a" * 64) == there[1], "of the index that it came by"
    for selector in ("", "v3", "image:v2", "sha256:" + "b" * 64):
        with pytest.raises(BadImage, match="there is: sha256:0"):
            choose(there, selector)


def nested(below: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.lists(below) | st.dictionaries(st.text() | st.sampled_from(["manifests", "layers", "rootfs"]), below)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), nested))
def test_any_json_is_a_document_or_refused(value: object) -> None:
    data = json.dumps(value).encode("utf-8", "surrogatepass")
    for read in (
        lambda: documents.index(data, "index"),
        lambda: documents.manifest(data, "manifest"),
        lambda: documents.configuration(data, "configuration"),
        lambda: documents.saved(data, ""),
        lambda: documents.layout_version(data),
    ):
        said = refusal(read)
        assert said == "" or said.isprintable()


@pytest.mark.parametrize(
    ("env", "path"),
    [
        (["PATH=/a:/b"], "/a:/b"),
        (["A=b", "PATH=/a", "PATH=/c"], "/c"),
        ([], ""),
        (["PATH="], ""),
        (["PATH=relative"], ""),
        (["PATH=/a\nb"], ""),
        (["PATH=/a\0"], ""),
        (["PATH=/" + "x" * 5000], ""),
        ([7, None], ""),
        ("PATH=/a", ""),
    ],
)
def test_the_search_path_of_an_image(env: object, path: str) -> None:
    value = {"rootfs": {"type": "layers", "diff_ids": []}, "config": {"Env": env}}
    assert documents.configuration(json.dumps(value).encode(), "configuration").path == path
