"""The documents of an image: index, manifest, configuration; which image is meant and what it is made of; pure.

Sources: OCI image specification (image-index.md, manifest.md, config.md, annotations.md); the archive of `docker save`.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sandbox.images.limits import DOCUMENT_BYTES_MAX, BadImage, printable

OS: Final = "linux"
ARCHITECTURE: Final = "amd64"
DESCRIPTORS_MAX: Final = 1024
LISTED_MAX: Final = 16
ENV_BYTES_MAX: Final = 4096
BLOB_BYTES_MAX: Final = 1 << 40

INDEXES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFESTS: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
PLAIN: Final = ("application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar")
GZIP: Final = ("application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.docker.image.rootfs.diff.tar.gzip")
_REF: Final = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_PATH_VARIABLE: Final = re.compile(r"PATH=(/[!-~]*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What points at a blob: its digest and size are held against what is there."""

    media_type: str
    digest: str
    size: int
    platform: str = ""
    """`os/architecture`; empty where it does not say."""
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        names = f" {', '.join(self.names)}" if self.names else ""
        return f"{self.digest} ({self.platform or 'no platform'}){names}"


@dataclass(frozen=True, slots=True)
class Configuration:
    platform: str
    diff_ids: tuple[str, ...]
    path: str
    """The search path of its environment; empty where it has none, or an odd one."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer by where it is and what it must be; an empty digest is one that nothing names."""

    place: str
    digest: str
    size: int | None
    diff_id: str
    gzip: bool | None
    """None: its first bytes tell."""


@dataclass(frozen=True, slots=True)
class Image:
    """One image, its documents verified. `digest` names it: of the manifest, of the configuration where none is."""

    digest: str
    layers: tuple[Layer, ...]
    path: str


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def verified(data: bytes, digest: str, size: int | None, what: str) -> bytes:
    """Return the data, if it is what the digest says; raises `BadImage`."""
    if size is not None and len(data) != size:
        raise BadImage(f"{what}: it has {len(data)} bytes and not {size}")
    if digest_of(data) != digest:
        raise BadImage(f"{what}: its digest is {digest_of(data)} and not {digest}")
    return data


def check_digest(value: object, what: str) -> str:
    if not isinstance(value, str) or _DIGEST.fullmatch(value) is None:
        raise BadImage(
            f"{what}: its digest is {printable(str(value).encode('utf-8', 'surrogatepass'))}, and not one of sha256",
            remedy="save the image with sha256 digests",
        )
    return value


def blob(digest: str) -> str:
    """Return where a blob lies in a layout."""
    return f"blobs/sha256/{digest.removeprefix('sha256:')}"


def read(data: bytes, what: str) -> dict[str, Any]:
    """Read a JSON object; raises `BadImage`."""
    value = _json(data, what)
    if not isinstance(value, dict):
        raise BadImage(f"{what}: it is not a JSON object")
    return value


def _json(data: bytes, what: str) -> Any:
    if len(data) > DOCUMENT_BYTES_MAX:
        raise BadImage(f"{what}: longer than {DOCUMENT_BYTES_MAX} bytes")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadImage(f"{what}: it is not JSON, or has a key twice") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def layout_version(data: bytes) -> None:
    version = read(data, "oci-layout").get("imageLayoutVersion")
    if version != "1.0.0":
        raise BadImage(f"oci-layout: its version is {printable(str(version).encode())}, and 1.0.0 is the known one")


def index(data: bytes, what: str) -> tuple[Descriptor, ...]:
    """Return what an index points at, indexes and manifests of images only."""
    found = _list(read(data, what), "manifests", what)
    return tuple(d for entry in found if (d := _descriptor(entry, what)).media_type in (*INDEXES, *MANIFESTS))


def choose(found: Sequence[Descriptor], selector: str) -> Descriptor:
    """Return the one manifest that is meant, given all there are with their platforms known; raises `BadImage`."""
    fits = list(dict.fromkeys(d for d in found if d.platform == f"{OS}/{ARCHITECTURE}" and _selected(d, selector)))
    if len({d.digest for d in fits}) == 1:
        return fits[0]
    wanted = f"of {OS}/{ARCHITECTURE}" + (f" named {selector}" if selector else "")
    listed = "; ".join(str(d) for d in found[:LISTED_MAX]) or "nothing"
    count = "no image" if not fits else f"{len(fits)} images"
    raise BadImage(
        f"{count} {wanted} in it; there is: {listed}", remedy="choose one: rootfs: PATH#TAG or PATH@sha256:…"
    )


def _selected(descriptor: Descriptor, selector: str) -> bool:
    if selector.startswith("sha256:"):
        return descriptor.digest == selector or f"@{selector}" in descriptor.names
    return not selector or any(_named(name, selector) for name in descriptor.names)


def _named(name: str, selector: str) -> bool:
    return name == selector or name.rpartition(":")[2] == selector


def manifest(data: bytes, what: str) -> tuple[Descriptor, tuple[Descriptor, ...]]:
    """Return the configuration's descriptor and the layers', lowest first."""
    value = read(data, what)
    if value.get("schemaVersion") != 2:  # noqa: PLR2004 - of the specification
        raise BadImage(f"{what}: it is not of schema version 2", remedy="pull and save the image with a current tool")
    layers = tuple(_descriptor(entry, what) for entry in _list(value, "layers", what))
    return _descriptor(value.get("config"), what), layers


def configuration(data: bytes, what: str) -> Configuration:
    value = read(data, what)
    rootfs, config = value.get("rootfs"), value.get("config")
    if not isinstance(rootfs, dict) or rootfs.get("type") != "layers":
        raise BadImage(f"{what}: it names no layers (rootfs.diff_ids)")
    diff_ids = tuple(check_digest(item, f"{what}: a layer") for item in _list(rootfs, "diff_ids", what))
    env = config.get("Env") if isinstance(config, dict) else None
    paths = [
        found[1]
        for item in (env if isinstance(env, list) else [])
        if isinstance(item, str) and len(item) <= ENV_BYTES_MAX and (found := _PATH_VARIABLE.fullmatch(item))
    ]
    return Configuration(_platform(value), diff_ids, paths[-1] if paths else "")


def layers(descriptors: Sequence[Descriptor], config: Configuration, *, most: int) -> tuple[Layer, ...]:
    """Pair each layer of a manifest with its diff_id."""
    _check_count(len(descriptors), len(config.diff_ids), most)
    return tuple(
        Layer(blob(d.digest), d.digest, d.size, diff_id, _gzip(d))
        for d, diff_id in zip(descriptors, config.diff_ids, strict=True)
    )


def _gzip(descriptor: Descriptor) -> bool:
    kind = descriptor.media_type
    if kind not in (*PLAIN, *GZIP):
        raise BadImage(
            f"layer {descriptor.digest}: it is {printable(kind.encode())}; plain and gzip tar are known",
            remedy="save the image with gzip, say `skopeo copy --dest-compress-format gzip …`",
        )
    return kind in GZIP


def _check_count(layer_count: int, diff_count: int, most: int) -> None:
    if layer_count != diff_count:
        raise BadImage(f"manifest: {layer_count} layers, and {diff_count} in the configuration")
    if not 0 < layer_count <= most:
        raise BadImage(f"manifest: {layer_count} layers; 1 to {most} are taken", remedy="see [images] layers_max")


# --- the archive of `docker save` ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Saved:
    """One image of such an archive: its members' names."""

    config: str
    layers: tuple[str, ...]
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{printable(self.config.encode())} {', '.join(self.names)}"


def saved(data: bytes, selector: str) -> Saved:
    """Return the one image that is meant, by `manifest.json`; a digest is held against the configuration later."""
    what = "manifest.json"
    value = _json(data, what)
    if not isinstance(value, list) or len(value) > DESCRIPTORS_MAX:
        raise BadImage(f"{what}: it is not a list of up to {DESCRIPTORS_MAX} images")
    found = []
    for entry in value:
        if not isinstance(entry, dict):
            raise BadImage(f"{what}: an image in it is no JSON object")
        config = entry.get("Config")
        names = entry.get("RepoTags") or []
        layer_names = _list(entry, "Layers", what)
        if not isinstance(config, str) or not isinstance(names, list) or not _texts([*names, *layer_names]):
            raise BadImage(f"{what}: Config, RepoTags and Layers of an image are not texts")
        found.append(Saved(config, tuple(layer_names), tuple(printable(name.encode()) for name in names)))
    digest = selector.removeprefix("sha256:") if selector.startswith("sha256:") else ""
    fits = [
        image
        for image in found
        if (digest in image.config if digest else not selector or any(_named(name, selector) for name in image.names))
    ]
    if len(fits) == 1:
        return fits[0]
    listed = "; ".join(str(image) for image in found[:LISTED_MAX]) or "nothing"
    raise BadImage(
        f"{len(fits)} images named {selector or 'anything'} in it; there is: {listed}",
        remedy="choose one: rootfs: PATH#TAG or PATH@sha256:…",
    )


def saved_config(data: bytes, name: str) -> tuple[str, Configuration]:
    """Return digest and meaning of a configuration; where its name is a digest, it has to be the right one."""
    digest = digest_of(data)
    stem = name.removesuffix(".json").rpartition("/")[2]
    if re.fullmatch(r"[0-9a-f]{64}", stem, re.ASCII):
        verified(data, f"sha256:{stem}", None, f"configuration {stem}")
    return digest, configuration(data, "configuration")


def saved_layers(names: Sequence[str], config: Configuration, *, most: int) -> tuple[Layer, ...]:
    _check_count(len(names), len(config.diff_ids), most)
    return tuple(Layer(name, "", None, diff_id, None) for name, diff_id in zip(names, config.diff_ids, strict=True))


def check_platform(config: Configuration, what: str) -> None:
    if config.platform != f"{OS}/{ARCHITECTURE}":
        raise BadImage(f"{what}: it is for {config.platform or 'no platform'}, this host is {OS}/{ARCHITECTURE}")


# --- pieces --------------------------------------------------------------------------------------------------------


def _descriptor(value: object, what: str) -> Descriptor:
    if not isinstance(value, dict):
        raise BadImage(f"{what}: a descriptor is no JSON object")
    size, kind = value.get("size"), value.get("mediaType")
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= BLOB_BYTES_MAX:
        raise BadImage(f"{what}: a descriptor without a size from 0 to {BLOB_BYTES_MAX}")
    if not isinstance(kind, str):
        raise BadImage(f"{what}: a descriptor without a mediaType")
    notes = value.get("annotations")
    names = [notes[key] for key in _REF if key in notes] if isinstance(notes, dict) else []
    platform = value.get("platform")
    return Descriptor(
        media_type=kind,
        digest=check_digest(value.get("digest"), what),
        size=size,
        platform=_platform(platform) if isinstance(platform, dict) else "",
        names=tuple(printable(name.encode("utf-8", "replace")) for name in names if isinstance(name, str)),
    )


def _platform(value: dict[str, Any]) -> str:
    system, machine = value.get("os"), value.get("architecture")
    if not isinstance(system, str) or not isinstance(machine, str):
        return ""
    return printable(f"{system}/{machine}".encode("utf-8", "replace"))


def _list(value: dict[str, Any], key: str, what: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list) or len(found) > DESCRIPTORS_MAX:
        raise BadImage(f"{what}: {key} is not a list of up to {DESCRIPTORS_MAX}")
    return found


def _texts(values: Sequence[object]) -> bool:
    return all(isinstance(value, str) for value in values)
