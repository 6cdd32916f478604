"""Give up every capability for good: all five sets empty, and the securebits that could bring them back locked."""

from typing import Final

from sandbox import syscalls

# capabilities(7): each bit and its lock. NOROOT: uid 0 gains nothing by execve. NO_SETUID_FIXUP: no change of ids gives
# or takes capabilities. KEEP_CAPS stays off. NO_CAP_AMBIENT_RAISE: nothing survives execve.
_NOROOT: Final = 1 << 0
_NO_SETUID_FIXUP: Final = 1 << 2
_KEEP_CAPS: Final = 1 << 4
_NO_CAP_AMBIENT_RAISE: Final = 1 << 6
_LOCKS: Final = (_NOROOT | _NO_SETUID_FIXUP | _KEEP_CAPS | _NO_CAP_AMBIENT_RAISE) << 1
SECUREBITS: Final = _NOROOT | _NO_SETUID_FIXUP | _NO_CAP_AMBIENT_RAISE | _LOCKS


def last_capability() -> int:
    """Return the highest capability that this kernel knows (64 at most)."""
    number = 0
    while number < 64:  # noqa: PLR2004 - the sets are 64 bits wide
        try:
            syscalls.prctl(syscalls.PR_CAPBSET_READ, number)
        except OSError:
            break
        number += 1
    return number - 1


LAST: Final = last_capability()


def lock() -> None:
    """Empty the bounding and ambient sets and lock the securebits; needs CAP_SETPCAP, so it comes before `drop`."""
    syscalls.prctl(syscalls.PR_SET_SECUREBITS, SECUREBITS)
    syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(LAST + 1):
        syscalls.prctl(syscalls.PR_CAPBSET_DROP, number)


def drop() -> None:
    """Empty the effective, permitted and inheritable sets."""
    syscalls.capset(0, 0, 0)
