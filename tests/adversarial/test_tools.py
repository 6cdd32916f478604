"""Programs that everybody has, used as an intruder would; each does its work where the controls are left out."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.attempt import ROOT, TALLY

if TYPE_CHECKING:
    from tests.support.launcher import Launcher

DONE = {"code": 0, "signal": None}
OPEN: dict[str, Any] = ROOT | {"weaken": (*ROOT["weaken"], "hidden_proc")}

# What only root of the host in namespaces of its own can do, and which does nothing outside of them.
COMMANDS = {
    "unshare a user namespace": "unshare --user --map-root-user true",
    "unshare a network": "unshare --net true",
    "unshare mounts": "unshare --mount true",
    "unshare processes": "unshare --pid --fork true",
    "unshare time": "unshare --time true",
    "bubblewrap": "bwrap --ro-bind / / --unshare-all true",
    "nsenter pid 1": "nsenter --target 1 --mount --net true",
    "nsenter one's own": "nsenter --net=/proc/self/ns/net true",
    "mount": "mount -t tmpfs none /tmp",
    "mount a bind": "mount --bind /usr /tmp",
    "remount": "mount -o remount,bind,rw /usr",
    "umount": "umount -l /dev/shm",
    "chroot": "chroot / true",
    "pivot_root": "cd /tmp && mount -t tmpfs none /tmp && mkdir /tmp/o && cd /tmp && unshare -m pivot_root . o",
    "strace": "strace -o /dev/null true",
    "strace of pid 1": "timeout -s INT 4 strace -o /tmp/out -p 1; grep -q wait4 /tmp/out",
    "ip link": "ip link set lo down",
    "ip route": "ip route add 192.0.2.0/24 dev eth0",
    "ip address": "ip address add 192.0.2.1/32 dev eth0",
    "ip neighbour": "ip neighbour replace 192.0.2.1 lladdr 02:00:00:00:00:09 dev eth0",
    "ip rule": "ip rule add from 192.0.2.1 table 100",
    "tc": "tc qdisc add dev lo root pfifo",
    "nft": "nft flush ruleset",
    "tcpdump": "timeout -s INT 4 tcpdump -Z root -i lo -c 1 2>&1 | grep -q 'listening on'",
    "hostname": "hostname sktest",
    "sysctl": "sysctl -w net.ipv4.ip_forward=0",
    "setpriv": "setpriv --reuid=1234 true",
    "setpriv groups": "setpriv --groups=0 true",
    "capsh": "capsh --caps=cap_sys_admin+ep -- -c true",
    "capsh shows some": "capsh --print | grep -q '^Current: .*[a-z]'",
    "filecap": "cp /bin/true /tmp/x && filecap /tmp/x net_raw && filecap /tmp/x | grep -q net_raw",
    "captest": "captest --text 2>&1 | grep -q 'regain root...SUCCESS'",
    "captest keeps some": "captest --text 2>&1 | grep -q 'Effective: *[0-9a-z]'",
    "mknod": "mknod /tmp/null c 1 3",
    "chown": "touch /tmp/x && chown 1234 /tmp/x",
    "chmod": "touch /tmp/x && chmod u+s /tmp/x",
    "install": "install -m 4755 /bin/true /tmp/x",
    "cp keeps the bit": "umask 0; cp --preserve=mode /usr/bin/passwd /tmp/x && test -u /tmp/x",
    "tar keeps the bit": "cd /tmp && tar -C /usr/bin -cf - passwd | tar -xpf - && test -u /tmp/passwd",
    "renice": "renice -n -5 $$",
    "ionice": "ionice -c 1 true",
    "dmesg": "dmesg | head -1 | grep -q .",
    "lsns of pid 1": "lsns -p 1 | grep -q mnt",
    "kill pid 1": "kill -0 1",
}
# Two of them are about being root: one who is root inside may call itself so.
ONLY_AGENT = {"captest"}


@pytest.mark.parametrize("name", COMMANDS)
def test_tool_is_of_no_use(launcher: Launcher, weak_launcher: Launcher, name: str) -> None:
    command = COMMANDS[name]
    for uid in (1000,) if name in ONLY_AGENT else (1000, 0):
        agent = launcher.sh(command, uid=uid, gid=uid)
        assert agent.status != DONE, (uid, agent.stdout)
        assert agent.status is not None
        assert agent.status["code"] != 127, "it has to be there"
    TALLY.refused += 1
    twin = weak_launcher.sh(command, **OPEN)
    assert twin.status == DONE, (twin.status, twin.stdout, twin.stderr)
    TALLY.twins += 1


def test_they_are_installed() -> None:
    for tool in ("bwrap", "captest", "capsh", "strace", "nft", "tcpdump", "tc"):
        assert shutil.which(tool), f"needs {tool} (./bootstrap test installs it)"
