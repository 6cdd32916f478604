"""What is left to the embedded gateway after it gave up root: sockets, look-ups, threads, reading files."""

from __future__ import annotations

# asyncio and sockets import these late, when the files may be out of reach: an interpreter can lie in a 0700 directory.
import concurrent.futures.thread  # noqa: F401 - see above
import encodings.idna  # noqa: F401 - see above
from typing import Final

from gateway_client.egress.confine import DIAL, STEADY, Confinement, confine

# Names are resolved by the C library, in threads (getaddrinfo blocks): it reads /etc, loads its modules and asks over
# UDP or netlink. A local model adds threads, its affinity and a listener it insists on.
RESOLVE: Final = (
    "bind",
    "clone",
    "clone3",
    "connect",
    "get_mempolicy",
    "getdents64",
    "geteuid",
    "getegid",
    "getgid",
    "getuid",
    "listen",
    "mkdir",
    "mlock",
    "munlock",
    "openat",
    "pread64",
    "readlink",
    "recvmmsg",
    "rmdir",
    "sched_getaffinity",
    "sched_setaffinity",
    "sendmmsg",
    "set_robust_list",
    "set_tid_address",
    "stat",
    "statx",
    "sysinfo",
    "uname",
    "unlink",
    "unlinkat",
)
# epoll, its self-pipe and timers are made by asyncio.run, after the drop.
LOOP: Final = ("accept", "epoll_create1", "eventfd2", "pipe2", "socketpair")

THREADS_MAX: Final = 256


def give_up_root(user: str) -> tuple[str, ...]:
    """Become `user` for good; return the facts as the kernel reports them."""
    calls = tuple(dict.fromkeys((*STEADY, *DIAL, *RESOLVE, *LOOP)))
    return confine(Confinement(user=user, system_calls=calls, own_network=False, processes_max=THREADS_MAX))
