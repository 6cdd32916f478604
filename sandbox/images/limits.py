"""What an image may cost, and the error that says why one is refused; pure."""

from dataclasses import dataclass
from typing import Final

# Of one entry. A path is bounded well below PATH_MAX, so that every tool of the host can still remove it.
PATH_BYTES_MAX: Final = 2048
NAME_BYTES_MAX: Final = 255  # NAME_MAX
DEPTH_PARTS_MAX: Final = 128
LINK_BYTES_MAX: Final = 4095  # PATH_MAX without its NUL
PAX_BYTES_MAX: Final = 1 << 20

# Of what describes an image. 4 MiB is what the OCI distribution specification has registries accept for a manifest.
DOCUMENT_BYTES_MAX: Final = 4 << 20
INDEX_DEPTH_MAX: Final = 3
INDEXES_MAX: Final = 16
ARCHIVE_MEMBERS_MAX: Final = 4096

# A layer may be small and all zeros; its ratio counts from this size on.
RATIO_FROM_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class ImageLimits:
    """What the configuration can change; the whole image counts, all layers together."""

    unpacked_bytes_max: int = 8 << 30
    entries_max: int = 500_000
    layers_max: int = 128
    compression_ratio_max: int = 200
    unpack_seconds_max: int = 600


class BadImage(Exception):  # noqa: N818 - named for what it says
    """The image is refused: the text names what is wrong where, the remedy what to do."""

    def __init__(self, message: str, *, remedy: str = "get the image anew from whom you trust") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


def printable(raw: bytes) -> str:
    """Show bytes of an image in a message: no control character gets through, and no more than a line of it."""
    text = raw.decode("utf-8", "backslashreplace")
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:200])
    return safe + ("…" if len(text) > 200 else "")  # noqa: PLR2004 - a line
