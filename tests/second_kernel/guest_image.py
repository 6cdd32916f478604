"""A second Linux with systemd as pid 1: Debian's User-Mode Linux kernel over a small Debian image, a mere process.

The image is made once and kept outside the clone; each boot writes to a copy-on-write file of its own. The guest sees
the host's files under /host (hostfs) and runs one program, whose last act is to write what it found; then it is off.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Final

from tests.support import standin

KERNEL: Final = Path("/usr/bin/linux.uml")
MODULES: Final = Path("/usr/lib/uml/modules")
IMAGE_MIB: Final = 1024
PACKAGES: Final = "systemd,systemd-sysv,dbus,kmod,iproute2,python3,libseccomp2,curl,ca-certificates,procps"
EXCLUDED: Final = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
# Nothing that waits for hardware, logins or the network: a boot is some seconds of a slow kernel.
MASKED: Final = (
    "systemd-udevd.service systemd-udev-trigger.service systemd-udevd-kernel.socket systemd-udevd-control.socket "
    "getty.target console-getty.service systemd-timesyncd.service systemd-remount-fs.service "
    "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer e2scrub_all.timer "
    "e2scrub_reap.service systemd-tmpfiles-clean.timer"
)
GUEST_UNIT: Final = """\
[Unit]
Description=Runs the program that the kernel command line names as guest=
After=multi-user.target

[Service]
Type=oneshot
ExecStart=/usr/local/sbin/guest
ExecStopPost=/usr/bin/systemctl --force --force poweroff
StandardOutput=tty
StandardError=tty
TTYPath=/dev/console
TimeoutStartSec=infinity
"""
GUEST: Final = """\
#!/bin/sh
set -e
mkdir -p /host
mount -t hostfs -o / none /host
kernel=$(uname -r)
mkdir -p /lib/modules/"$kernel"
mount --bind /host/usr/lib/uml/modules/"$kernel" /lib/modules/"$kernel"
for word in $(cat /proc/cmdline); do
    case $word in guest=*) program=${word#guest=} ;; out=*) out=${word#out=} ;; esac
done
exec "/host$program" "/host$out"
"""


def cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "stockade-tests" if base else Path("/var/cache/stockade-tests")


def host_codename() -> str:
    """The Debian release of this host: a guest of the same one runs the host's virtual environment as it is."""
    for line in Path("/etc/os-release").read_text().splitlines():
        name, _, value = line.partition("=")
        if name == "VERSION_CODENAME":
            return value.strip('"')
    raise RuntimeError("cannot choose a guest: /etc/os-release names no VERSION_CODENAME")


def image() -> Path:
    """The guest's root file system, made on first use (a minute; Debian packages are fetched)."""
    codename = host_codename()
    recipe = "\0".join((codename, str(IMAGE_MIB), PACKAGES, *EXCLUDED, MASKED, GUEST_UNIT, GUEST))
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"guest-{codename}-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.ext4"
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            for stale in directory.glob("guest-*"):
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
            _make(path, codename)
    return path


def _make(path: Path, codename: str) -> None:
    tree = path.with_suffix(".tree")
    excludes = [f"--dpkgopt=path-exclude={pattern}" for pattern in EXCLUDED]
    options = ["--quiet", "--variant=minbase", f"--include={PACKAGES}", *excludes]
    _run(*standin.outside(), "mmdebstrap", *options, codename, str(tree))
    (tree / "etc/systemd/system/guest.service").write_text(GUEST_UNIT)
    wants = tree / "etc/systemd/system/multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    (wants / "guest.service").symlink_to("/etc/systemd/system/guest.service")
    for unit in MASKED.split():
        link = tree / "etc/systemd/system" / unit
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")
    (tree / "etc/fstab").write_text("")
    (tree / "usr/local/sbin/guest").write_text(GUEST)
    (tree / "usr/local/sbin/guest").chmod(0o755)
    unfinished = path.with_suffix(".new")
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-d", str(tree), str(unfinished), f"{IMAGE_MIB}M")
    shutil.rmtree(tree)
    unfinished.rename(path)


def _run(*command: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"cannot make the guest image: {command[0]} said: {done.stderr[-2000:]}")


def boot(program: Path, scratch: Path, *, memory_mib: int, seconds_max: float) -> str:
    """Boots, runs `program` in the guest with `scratch` (as seen there) as its argument; gives the console's text.

    Raises TimeoutError with the end of the console when the guest has not powered off in time; nothing of it is left.
    """
    arguments = (
        f"ubd0={scratch / 'cow'},{image()}",
        *("root=/dev/ubda", "rw", "rootfstype=ext4", f"mem={memory_mib}M", "quiet", "selinux=0", "audit=0"),
        *("con=null", "con0=null,fd:1", "systemd.unified_cgroup_hierarchy=1", "systemd.show_status=0"),
        *(f"uml_dir={scratch}", "umid=guest", f"guest={program}", f"out={scratch}"),
    )
    console = scratch / "console"
    # A group of its own: the kernel runs as several processes, which are ended together.
    with console.open("wb") as output:
        guest = subprocess.Popen(
            (str(KERNEL), *arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TERM": "dumb"},
            process_group=0,
        )
        try:
            guest.wait(seconds_max)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the guest did not power off in {seconds_max:.0f} s:\n{_shown(console)}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(guest.pid, signal.SIGKILL)
            guest.wait()
    return _shown(console)


def _shown(console: Path) -> str:
    return console.read_bytes().decode(errors="replace")[-20_000:]
