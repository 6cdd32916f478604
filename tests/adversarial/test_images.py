"""Images that lie or are damaged, each through the real unpacker, each with a benign twin that passes."""

# ruff: noqa: ASYNC240 - files of a test, and nobody else in its loop

from __future__ import annotations

import asyncio
import gzip
import json
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

from sandbox.images.limits import ImageLimits
from supervisord.errors import CannotLaunch, StockadeError, Unavailable
from supervisord.images import Images
from supervisord.policy import RootfsName
from tests.support.image import BLOCK, CONFIG, INDEX, PLAIN, Built, entry, layer, sha256, write_tar
from tests.support.image_store import DIR, FILE, VICTIM, Place

if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the unpacker gives it up")

ZERO = "sha256:" + "0" * 64


# --- what describes an image ---------------------------------------------------------------------------------------


def spoiled(change: Callable[[Built], None]) -> Built:
    built = Built([layer(FILE)])
    change(built)
    return built


def flip(built: Built, digest: str) -> None:
    data = built.blobs[digest]
    built.blobs[digest] = data[:-1] + bytes([data[-1] ^ 1])


def nest(built: Built, depth: int) -> None:
    """Put the image behind indexes of indexes."""
    descriptor: dict[str, Any] = built.descriptor()
    for _ in range(depth):
        descriptor = built.put(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}).encode(), INDEX)
    built.index["manifests"] = [descriptor]


def circle(built: Built) -> None:
    """An index that names itself: with a digest that would have to be its own."""
    digest = "sha256:" + "ab" * 32
    descriptor = {"mediaType": INDEX, "digest": digest, "size": 0}
    data = json.dumps({"schemaVersion": 2, "manifests": [descriptor]}).encode()
    built.blobs[digest] = data
    built.index["manifests"] = [descriptor | {"size": len(data)}]


def change_manifest(built: Built, **values: Any) -> None:
    built.manifest = json.dumps(json.loads(built.manifest) | values).encode()
    built.index["manifests"] = [built.descriptor()]


def change_descriptor(built: Built, **values: Any) -> None:
    built.index["manifests"][0] |= values


def anew(built: Built, layers: list[bytes], **values: Any) -> None:
    built.__dict__.update(Built(layers, **values).__dict__)


def lie(built: Built) -> None:
    anew(built, built.layers, architecture="s390x")
    change_descriptor(built, platform={"os": "linux", "architecture": "amd64"})


def remove(built: Built, data: bytes) -> None:
    del built.blobs[sha256(data)]


DOCUMENTS: dict[str, tuple[Callable[[Built], None], str]] = {
    "a flipped bit in the manifest": (lambda b: flip(b, b.digest), "its digest is"),
    "a flipped bit in the configuration": (lambda b: flip(b, sha256(b.config)), "its digest is"),
    "a flipped bit in a layer": (lambda b: flip(b, sha256(b.stored[0])), "digest|gzip"),
    "a manifest of another size": (lambda b: change_descriptor(b, size=len(b.manifest) + 1), "bytes and not"),
    "a negative size": (lambda b: change_descriptor(b, size=-1), "without a size"),
    "no manifest": (lambda b: remove(b, b.manifest), "there is no blobs"),
    "no configuration": (lambda b: remove(b, b.config), "there is no blobs"),
    "no layer": (lambda b: remove(b, b.stored[0]), "not in the image"),
    "a digest of sha512": (lambda b: change_descriptor(b, digest="sha512:" + "0" * 128), "not one of sha256"),
    "a digest of md5": (lambda b: change_descriptor(b, digest="md5:" + "0" * 32), "not one of sha256"),
    "a digest that is a path": (lambda b: change_descriptor(b, digest="sha256:../../../etc/passwd"), "not one of sha"),
    "an index of itself": (circle, "its digest is"),
    "indexes four deep": (lambda b: nest(b, 4), "indexes more than 3 deep"),
    "another platform": (lambda b: change_descriptor(b, platform={"os": "linux", "architecture": "arm64"}), "arm64"),
    "a platform that lies": (lie, "it is for linux/s390x"),
    "no images at all": (lambda b: b.index.update(manifests=[]), "there is: nothing"),
    "no list of images": (lambda b: b.index.update(manifests={}), "not a list"),
    "a manifest of 5 MiB": (lambda b: change_manifest(b, annotations={"x": "y" * (5 << 20)}), "longer than 4194304"),
    "schema version 1": (lambda b: change_manifest(b, schemaVersion=1), "schema version 2"),
    "five layers": (lambda b: anew(b, [layer(FILE)] * 5), "1 to 4 are taken"),
    "more layers than contents": (lambda b: anew(b, [layer(FILE)], diff_ids=[ZERO] * 2), "1 layers, and 2"),
    "another content than announced": (lambda b: anew(b, [layer(FILE)], diff_ids=[ZERO]), "content's digest"),
    "a zstd layer": (lambda b: anew(b, [layer(FILE)], media_type=PLAIN + "+zstd"), "plain and gzip"),
    "a layer from elsewhere": (
        lambda b: anew(b, [layer(FILE)], media_type="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
        "plain and gzip",
    ),
    "a configuration without layers": (
        lambda b: change_manifest(b, config=b.put(b'{"os": "linux", "architecture": "amd64"}', CONFIG)),
        "names no layers",
    ),
    "nested beyond reason": (
        lambda b: change_manifest(b, config=b.put(b'{"a":' * 100000 + b"1" + b"}" * 100000, CONFIG)),
        "not JSON",
    ),
    "a key twice": (lambda b: change_manifest(b, config=b.put(b'{"os": "linux", "os": "linux"}', CONFIG)), "key twice"),
}  # fmt: skip


@pytest.mark.parametrize("what", DOCUMENTS)
@pytest.mark.parametrize("form", ["layout", "oci_archive"])
async def test_documents_that_lie_are_refused(place: Place, what: str, form: str) -> None:
    change, says = DOCUMENTS[what]
    with pytest.raises(CannotLaunch, match=says):
        await place.open(getattr(spoiled(change), form)(place.directory / "bad"))
    assert place.kept() == []


@pytest.mark.parametrize("form", ["layout", "oci_archive", "docker_archive"])
async def test_the_same_image_unspoiled_is_taken_in_each_form(place: Place, form: str) -> None:
    assert set(await place.tree(getattr(Built([layer(FILE)]), form)(place.directory / "good"))) == {"file"}


async def test_an_index_three_deep_and_an_uncompressed_layer_are_taken(place: Place) -> None:
    built = Built([layer(FILE)], compress=False)
    nest(built, 3)
    assert set(await place.tree(built.layout(place.directory / "good"))) == {"file"}


def with_stored(stored: bytes, content: bytes) -> Built:
    """An image whose one layer is stored as these bytes; every digest is right."""
    built = Built([content])
    kind = "application/vnd.oci.image.layer.v1.tar+gzip"
    change_manifest(built, layers=[built.put(stored, kind)])
    return built


async def test_a_cut_and_a_damaged_gzip_stream(place: Place) -> None:
    content = layer(entry(b"x", b"0", os.urandom(100_000)))
    whole = gzip.compress(content)
    for name, stored, says in (
        ("cut", whole[:-20], "cut off|middle of"),
        ("tail", whole + b"garbage", "not gzip"),
        ("crc", whole[:-8] + b"\0" * 8, "not gzip"),
        ("none", content, "not gzip"),
    ):
        with pytest.raises(CannotLaunch, match=says):
            await place.open(with_stored(stored, content).layout(place.directory / name))
    two = gzip.compress(content[:BLOCK]) + gzip.compress(content[BLOCK:])
    assert set(await place.tree(with_stored(two, content).layout(place.directory / "two"))) == {"x"}


async def test_a_gzip_bomb_stops_by_its_ratio_and_by_its_size(place: Place) -> None:
    bomb = layer(entry(b"zeros", b"0", bytes(40 << 20)))
    with pytest.raises(CannotLaunch, match="more than 200 times"):
        await place.open(Built([bomb]).layout(place.directory / "bomb"))
    # Half noise: no ratio to speak of, but the same layer again and again.
    big = layer(entry(b"big", b"0", os.urandom(1 << 20) * 20))
    with pytest.raises(CannotLaunch, match="more than 67108864 bytes unpacked"):
        await place.open(Built([big] * 4).layout(place.directory / "big"))
    assert place.kept() == []
    await place.tree(Built([big]).layout(place.directory / "one"))


# --- archives ------------------------------------------------------------------------------------------------------


async def test_archives_that_are_odd(place: Place) -> None:
    built = Built([layer(FILE)])
    good = built.oci_archive(place.directory / "good.tar").read_bytes()
    manifest = json.dumps([{"Config": "../../../etc/passwd", "RepoTags": None, "Layers": ["x"]}]).encode()
    odd = {
        "compressed": (gzip.compress(good), "compressed as a whole"),
        "cut": (
            good[: len(good) // 2 // BLOCK * BLOCK + 100],
            "in the middle|not in the image|there is no|digest",
        ),
        "empty": (bytes(10240), "neither oci-layout nor manifest.json"),
        "twice": (entry(b"oci-layout") + good, "twice"),
        "many": (b"".join(entry(b"%d" % number) for number in range(4097)), "more than 4096 members"),
        "out": (entry(b"../oci-layout") + good, "leads out"),
        "path": (entry(b"manifest.json", b"0", manifest), "there is no"),
    }
    for name, (data, says) in odd.items():
        path = place.directory / f"{name}.tar"
        path.write_bytes(data)
        with pytest.raises(CannotLaunch, match=says):
            await place.open(path)
    assert place.kept() == []


async def test_a_docker_archive_is_held_to_its_digests_and_may_have_links(place: Place) -> None:
    built = Built([layer(FILE), layer(DIR)])
    second = f"{1:064x}/layer.tar"
    with pytest.raises(CannotLaunch, match="content's digest"):
        await place.open(built.docker_archive(place.directory / "bad.tar", **{second: layer(entry(b"else"))}))
    config = f"{sha256(built.config)[7:]}.json"
    with pytest.raises(CannotLaunch, match="its digest is"):
        await place.open(built.docker_archive(place.directory / "conf.tar", **{config: built.config + b" "}))
    twice = Built([layer(FILE), layer(FILE)])
    path = twice.docker_archive(place.directory / "plain.tar")
    data = path.read_bytes()
    at = data.rindex(second.encode())
    # As docker save writes a layer that comes twice.
    link = entry(second.encode(), b"2", link=f"../{0:064x}/layer.tar".encode())
    path.write_bytes(data[:at] + link + data[at + BLOCK + len(twice.layers[1]) + -len(twice.layers[1]) % BLOCK :])
    assert set(await place.tree(path)) == {"file"}


async def test_one_of_several_images_is_chosen_by_tag_or_digest(place: Place) -> None:
    one, two = Built([layer(entry(b"one"))], tag="v1"), Built([layer(entry(b"two"))], tag="v2")
    one.blobs |= two.blobs
    one.index["manifests"] += two.index["manifests"]
    path = one.layout(place.directory / "both")
    with pytest.raises(CannotLaunch, match=r"2 images of linux/amd64 in it; there is: .*v1.*v2"):
        await place.open(path)
    with pytest.raises(CannotLaunch, match="no image of linux/amd64 named v3"):
        await place.open(path, "v3")
    assert set(await place.tree(path, "v2")) == {"two"}
    assert set(await place.tree(path, one.digest)) == {"one"}


# --- layouts -------------------------------------------------------------------------------------------------------


def as_link(path: Path) -> None:
    path.rename(path.with_suffix(".x"))
    path.symlink_to(path.with_suffix(".x").name)


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


async def test_links_fifos_and_directories_in_a_layout_are_not_followed_and_do_not_block(place: Place) -> None:
    built = Built([layer(FILE)])
    for name, spoil in (("link", as_link), ("fifo", as_fifo), ("dir", as_directory)):
        path = built.layout(place.directory / name)
        spoil(path / "blobs" / "sha256" / built.digest[7:])
        with pytest.raises(CannotLaunch, match="there is no blobs"):
            await asyncio.wait_for(place.open(path), 10)


# --- what is kept --------------------------------------------------------------------------------------------------


async def test_an_image_is_unpacked_once_and_anew_when_it_changed(place: Place) -> None:
    path = Built([layer(FILE)]).oci_archive(place.directory / "image.tar")
    trees = await asyncio.gather(*(place.tree(path) for _ in range(8)))
    assert all(set(tree) == {"file"} for tree in trees)
    assert [action.verdict for action in place.actions] == ["allowed", "done"]
    Built([layer(entry(b"other"))]).oci_archive(path)
    assert set(await place.tree(path)) == {"other"}
    assert len(place.kept()) == 2


async def test_what_is_kept_is_used_only_while_it_is_roots_alone(place: Place) -> None:
    path = Built([layer(FILE)]).layout(place.directory / "image")
    await place.tree(path)
    (kept,) = (place.directory / "images" / "1").iterdir()
    store = place.directory / "images"
    spoils: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: kept.chmod(0o755), lambda: kept.chmod(0o700)),
        (lambda: os.chown(kept, 1000, -1), lambda: os.chown(kept, 0, -1)),
        (lambda: store.chmod(0o777), lambda: store.chmod(0o700)),
        (lambda: (kept / "image.json").write_text("{}"), lambda: None),
    ]
    for spoil, mend in spoils:
        spoil()
        with pytest.raises(Unavailable, match="cannot use the unpacked image"):
            await place.open(path)
        mend()
    kept.rename(kept.with_name("moved"))
    assert set(await place.tree(path)) == {"file"}


async def test_half_an_image_of_an_earlier_daemon_goes_away_and_is_never_used(place: Place) -> None:
    half = place.directory / "images" / ".unpack-0123456789abcdef"
    (half / "rootfs").mkdir(parents=True)
    (half / "rootfs" / "evil").symlink_to(VICTIM)
    await place.images.start()
    assert place.half() == []
    assert Path(VICTIM).is_dir()


async def test_an_unpacker_that_takes_too_long_is_ended(place: Place, tmp_path: Path) -> None:
    images = Images(
        directory=tmp_path / "images",
        records=tmp_path / "records",
        user="stockade-images",
        limits=ImageLimits(unpack_seconds_max=0),
        own=(),
        record=lambda _action: asyncio.sleep(0),
    )
    path = Built([layer(FILE)]).layout(place.directory / "image")
    with pytest.raises(CannotLaunch, match="not unpacked within 0 seconds"):
        await images.open(RootfsName(PurePosixPath(path)))


async def test_what_is_no_root_file_system(place: Place) -> None:
    (place.directory / "layout").mkdir()
    (place.directory / "layout" / "oci-layout").write_text("{}")
    (place.directory / "link").symlink_to("/usr")
    os.mkfifo(place.directory / "fifo")
    write_tar(place.directory / "x.tar", {"file": b""})
    for name, selector, says in (
        ("nothing", "", "No such file"),
        ("layout", "", "no index.json"),
        ("link", "", "symbolic link"),
        ("fifo", "", "neither a directory nor a file"),
        ("images", "v1", "plain directory"),
        ("x.tar", "", "neither oci-layout nor manifest.json"),
    ):
        with pytest.raises(StockadeError, match=says):
            await place.open(place.directory / name, selector)
    opened = await place.open(place.directory / "images")
    os.close(opened.fd)
    assert (opened.form, opened.digest) == ("directory", "")
