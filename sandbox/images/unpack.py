"""An image from its documents to its files: which one is meant, then layer by layer into a directory."""

from collections import Counter
from typing import Final

from sandbox.images import documents
from sandbox.images.archive import Kind, Member, Reader
from sandbox.images.blobs import LayerStream, Source, Spent, document
from sandbox.images.documents import Descriptor, Image
from sandbox.images.entries import Empty, Put, Remove, judge, link_text, path_parts, shown_mode
from sandbox.images.limits import INDEX_DEPTH_MAX, INDEXES_MAX, BadImage, ImageLimits, printable
from sandbox.images.tree import Tree

_SET_ID_BITS: Final = 0o6000


def resolve(source: Source, selector: str, limits: ImageLimits) -> tuple[Image, str]:
    """Return the one image that is meant, its documents verified, and what the source is; raises `BadImage`."""
    if source.find("oci-layout") is not None:
        return _resolve_layout(source, selector, limits), "oci"
    if source.find("manifest.json") is not None:
        return _resolve_saved(source, selector, limits), "docker"
    raise BadImage(
        "the image: it has neither oci-layout nor manifest.json",
        remedy="save it with `docker save`, `podman save --format oci-archive` or `skopeo copy … oci-archive:FILE`",
    )


def _resolve_layout(source: Source, selector: str, limits: ImageLimits) -> Image:
    documents.layout_version(document(source, "oci-layout", "oci-layout"))
    found = _manifests(source, documents.index(document(source, "index.json", "index.json"), "index.json"))
    chosen = documents.choose(found, selector)
    what = f"manifest {chosen.digest}"
    config, layers = documents.manifest(_blob(source, chosen, what), what)
    meaning = documents.configuration(_blob(source, config, "configuration"), "configuration")
    documents.check_platform(meaning, what)
    return Image(chosen.digest, documents.layers(layers, meaning, most=limits.layers_max), meaning.path)


def _manifests(source: Source, top: tuple[Descriptor, ...]) -> list[Descriptor]:
    """Follow indexes in indexes; each manifest comes with a platform, and with the names of what led to it."""
    found: list[Descriptor] = []
    todo = [(descriptor, 1) for descriptor in reversed(top)]
    indexes = 0
    while todo:
        descriptor, depth = todo.pop()
        if descriptor.media_type in documents.MANIFESTS:
            found.append(_with_platform(source, descriptor))
            continue
        indexes += 1
        if depth > INDEX_DEPTH_MAX or indexes > INDEXES_MAX:
            raise BadImage(f"index.json: indexes more than {INDEX_DEPTH_MAX} deep, or more than {INDEXES_MAX}")
        what = f"index {descriptor.digest}"
        inner = documents.index(_blob(source, descriptor, what), what)
        names = (*descriptor.names, f"@{descriptor.digest}")
        todo += [
            (Descriptor(d.media_type, d.digest, d.size, d.platform, (*names, *d.names)), depth + 1)
            for d in reversed(inner)
        ]
        if len(todo) + len(found) > documents.DESCRIPTORS_MAX:
            raise BadImage(f"index.json: more than {documents.DESCRIPTORS_MAX} images")
    return found


def _with_platform(source: Source, descriptor: Descriptor) -> Descriptor:
    """Ask manifest and configuration where the index does not say for which platform it is."""
    if descriptor.platform:
        return descriptor
    what = f"manifest {descriptor.digest}"
    config, _ = documents.manifest(_blob(source, descriptor, what), what)
    meaning = documents.configuration(_blob(source, config, "configuration"), "configuration")
    return Descriptor(descriptor.media_type, descriptor.digest, descriptor.size, meaning.platform, descriptor.names)


def _blob(source: Source, descriptor: Descriptor, what: str) -> bytes:
    data = document(source, documents.blob(descriptor.digest), what)
    return documents.verified(data, descriptor.digest, descriptor.size, what)


def _resolve_saved(source: Source, selector: str, limits: ImageLimits) -> Image:
    chosen = documents.saved(document(source, "manifest.json", "manifest.json"), selector)
    digest, meaning = documents.saved_config(document(source, chosen.config, "configuration"), chosen.config)
    if selector.startswith("sha256:") and digest != selector:
        raise BadImage(f"configuration: its digest is {digest} and not {selector}")
    documents.check_platform(meaning, "configuration")
    return Image(digest, documents.saved_layers(chosen.layers, meaning, most=limits.layers_max), meaning.path)


class Unpacking:
    """Unpacks one image into the directory behind `root`, and counts what it left out."""

    def __init__(self, source: Source, image: Image, root: int, limits: ImageLimits) -> None:
        self._source = source
        self._image = image
        self._spent = Spent(limits)
        self._tree = Tree(root, self._spent.enter)
        self._left_out: Counter[str] = Counter()

    def run(self) -> dict[str, int]:
        """Do it; return the counts. Raises `BadImage`, with whatever half there is left to the caller to remove."""
        for layer in self._image.layers:
            stream = LayerStream(self._source, layer, self._spent)
            self._tree.begin_layer()
            reader = Reader(stream.read)
            for member in reader:
                self._apply(member, reader)
            stream.finish()
        self._tree.finish()
        return {
            "entries": self._spent.entries,
            "unpacked_bytes": self._spent.unpacked_bytes,
            "layers": len(self._image.layers),
            **{f"dropped_{what}": count for what, count in sorted(self._left_out.items())},
        }

    def _apply(self, member: Member, reader: Reader) -> None:
        self._left_out["xattrs"] += member.xattrs
        self._left_out["set_id_bits"] += bool(member.mode & _SET_ID_BITS)
        match judge(member.name, regular=member.kind is Kind.FILE):
            case Remove(parts):
                self._whiteout(member)
                self._tree.remove(parts)
            case Empty(parts):
                self._whiteout(member)
                self._tree.empty(parts)
            case Put(parts):
                self._put(parts, member, reader)

    def _whiteout(self, member: Member) -> None:
        self._spent.enter()
        if member.size:
            raise BadImage(f"entry {printable(member.name)}: a whiteout with content")

    def _put(self, parts: tuple[bytes, ...], member: Member, reader: Reader) -> None:
        match member.kind:
            case Kind.DIRECTORY:
                self._tree.directory(parts, shown_mode(member.mode, member.uid, directory=True))
            case Kind.FILE:
                mode = shown_mode(member.mode, member.uid, directory=False)
                self._tree.file(parts, reader.content(), mode=mode, mtime=member.mtime)
            case Kind.SYMLINK:
                self._tree.symlink(parts, link_text(member.link, name=member.name))
            case Kind.HARDLINK:
                self._tree.hardlink(parts, path_parts(member.link))
            case Kind.DEVICE | Kind.FIFO:
                # A sandbox has a /dev of its own, so what an image has there is never seen: left out, and counted.
                if parts[:1] != (b"dev",):
                    raise BadImage(
                        f"entry {printable(member.name)}: a {member.kind.value} outside of /dev",
                        remedy="build the image anew without it",
                    )
                self._spent.enter()
                self._left_out["devices"] += 1
