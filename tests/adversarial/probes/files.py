"""Files, /proc, devices and terminals."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import re
import stat
import struct
from functools import partial
from pathlib import Path
from typing import Final

from tests.adversarial.probes.inside import (
    BAD,
    PREPARATIONS,
    RESOURCE,
    Reached,
    add,
    call,
    facts,
    fresh,
    judge,
    name_of,
    opens,
    probe,
    refused,
    text,
)

MISSING: Final = ("ENOENT", "ENOTDIR", "ENODEV", "ENXIO")


def _sysfs() -> None:
    if facts["open"]:
        call(165, text("none"), text("/sys"), text("sysfs"), 0, 0)


PREPARATIONS.append(_sysfs)

# --- the root ---


def _may_write(path: str) -> str:
    if os.access(path, os.W_OK):
        raise Reached(path)
    return "EACCES" if os.path.exists(path) else "ENOENT"


for _path in (
    "/", "/usr", "/usr/bin", "/usr/lib", "/usr/local", "/usr/local/bin", "/usr/share", "/bin", "/sbin", "/lib", "/etc",
    "/etc/passwd", "/etc/hosts", "/etc/resolv.conf", "/etc/ld.so.cache", "/etc/ssl", "/etc/stockade", "/dev", "/var",
    "/run", "/home", "/grants", "/usr/bin/python3", "/bin/sh", "/lib64", "/usr/lib/x86_64-linux-gnu/libc.so.6",
):  # fmt: skip
    # Of the sandbox itself, and read-only for whoever is in it: a plan that leaves that out shows the host's.
    add(f"{_path} may be written", partial(_may_write, _path), absent=("EACCES", "ENOENT"))

for _path in (
    "/etc/shadow", "/etc/gshadow", "/etc/sudoers", "/etc/ssh", "/etc/machine-id", "/etc/fstab", "/etc/crontab",
    "/etc/kubernetes", "/etc/docker", "/root/.ssh", "/root/.bashrc", "/root/.aws", "/var/lib/docker",
    "/var/lib/stockade", "/var/lib/kubelet", "/var/log", "/var/spool/cron", "/boot", "/opt", "/srv", "/mnt", "/media",
    "/lost+found", "/run/secrets", "/var/run/secrets/kubernetes.io", "/.dockerenv", "/host", "/rootfs", "/initrd",
    "/run/stockade",
):  # fmt: skip

    def _shown(path: str = _path) -> str:
        if os.path.lexists(path):
            raise Reached(path)
        return "ENOENT"

    add(f"{_path} is shown", _shown, untwinned="the file system of the host is in no weakened plan")

OWN: Final = ("/tmp", "/home/agent", "/workspace", "/dev/shm", "/proc", "/sys", "/var/tmp", "/dev/fd", "/dev/pts")


@probe("any directory that may be written and is not the agent's own", absent=("none",))
def any_directory() -> str:
    def look(directory: str, depth: int) -> None:
        for entry in os.scandir(directory):
            if entry.path in OWN or not entry.is_dir(follow_symlinks=False):
                continue
            if os.access(entry.path, os.W_OK):
                raise Reached(entry.path)
            if depth and os.access(entry.path, os.R_OK | os.X_OK):
                look(entry.path, depth - 1)

    look("/", 3)
    return "none"


# --- set-id, capabilities on files, ownership, links ---


def _file() -> str:
    path = fresh("file")
    with open(path, "w") as file:
        file.write("x")
    return path


CAPABILITIES: Final = struct.pack("<IIIII", 0x02000001, 0xFFFFFFFF, 0, 0xFFFFFFFF, 0)


def _mark(name: str, value: bytes) -> str:
    return refused(lambda: os.setxattr(_file(), name, value))


def _give(uid: int, gid: int) -> str:
    return refused(lambda: os.chown(_file(), uid, gid))


XATTRS: Final = {
    "security.capability": CAPABILITIES,
    "trusted.sktest": b"x",
    "security.sktest": b"x",
    "security.ima": b"\1x",
    "trusted.overlay.opaque": b"y",
    "trusted.overlay.redirect": b"/etc",
}
for _name, _value in XATTRS.items():
    add(
        f"attribute {_name} on a file of one's own",
        partial(_mark, _name, _value),
        absent=("ENOTSUP", "EINVAL", "EPERM"),
    )

for _name, _ids in {
    "another user": (65533, -1),
    "another group": (-1, 65533),
    "root or the agent": (1234, 1234),
}.items():
    add(f"give a file to {_name}", partial(_give, *_ids))


@probe("make a file immutable", absent=("ENOTTY", "ENOTSUP"))
def immutable() -> str:
    with open(_file()) as file:
        return refused(
            lambda: fcntl.ioctl(file.fileno(), 0x40086602, struct.pack("l", 0x10)),
            by=("EPERM",) if not facts["open"] else (),
        )


@probe("a whiteout by mknod")
def whiteout() -> str:
    path = fresh("whiteout")
    return refused(lambda: os.mknod(path, stat.S_IFCHR | 0o600, 0))


@probe("a whiteout by rename", absent=("EINVAL",))
def whiteout_by_rename() -> str:
    path = _file()
    result, error = call(316, -100, text(path), -100, text(path + "-moved"), 4)
    if result >= 0 and stat.S_ISCHR(os.lstat(path).st_mode):
        raise Reached(path)
    return error


NODES: Final = {"mem": (1, 1), "port": (1, 4), "kmsg": (1, 11), "sda": (8, 0), "vda": (254, 0), "kvm": (10, 232),
                "fuse": (10, 229), "tun": (10, 200), "loop-control": (10, 237), "null": (1, 3)}  # fmt: skip
for _name, _number in NODES.items():
    for _kind, _bits in (("character", stat.S_IFCHR), ("block", stat.S_IFBLK)):

        def _node(bits: int = _bits, number: tuple[int, int] = _number) -> str:
            path = fresh("node")
            return refused(lambda: os.mknod(path, bits | 0o600, os.makedev(*number)))

        if _kind == "character" or _name in ("sda", "vda"):
            add(f"mknod {_name}, {_kind} device", _node)


@probe("hard link to a file of the host", untwinned="what is bound is a mount of its own, and no link leaves one")
def hard_link() -> str:
    return refused(lambda: os.link("/usr/bin/env", fresh("link")), by=("EXDEV", "EPERM", "EACCES"))


@probe("write through a private mapping to the file (CVE-2016-5195)")
def dirty_cow() -> str:
    """In an open sandbox: through a shared mapping of a file of one's own, which does change."""
    path = _file() if facts["open"] else "/usr/bin/env"
    fd = os.open(path, os.O_RDWR if facts["open"] else os.O_RDONLY)
    before = os.pread(fd, 1, 0)
    sharing = mmap.MAP_SHARED if facts["open"] else mmap.MAP_PRIVATE
    mapping = mmap.mmap(fd, 1, sharing, mmap.PROT_READ | (mmap.PROT_WRITE if facts["open"] else 0))
    with open("/proc/self/maps") as maps:
        address = int(
            next(line for line in maps if line.rstrip().endswith(path) or os.path.realpath(path) in line).split("-")[0],
            16,
        )
    memory = os.open("/proc/self/mem", os.O_RDWR)
    error = ""
    try:
        os.pwrite(memory, b"!", address)
    except OSError as why:
        error = name_of(why.errno or 0)
    call(28, address, 4096, 4)  # madvise DONTNEED: the next look comes from the file
    after = os.pread(fd, 1, 0)
    mapping.close()
    if after != before:
        raise Reached(path)
    return error or "a copy was written"


@probe("/proc/self/exe of the program opens for writing (CVE-2019-5736)", absent=("EROFS",))
def own_program() -> str:
    try:
        os.close(os.open("/proc/self/exe", os.O_WRONLY))
    except OSError as error:
        if error.errno == 26:  # ETXTBSY: permission was given
            raise Reached("ETXTBSY") from None
        return name_of(error.errno or 0)
    raise Reached("/proc/self/exe")


@probe("the dynamic loader and libc open for writing", absent=("EROFS",))
def loader() -> str:
    with open("/proc/self/maps") as maps:
        files = {line.split()[5] for line in maps if len(line.split()) == 6 and line.split()[5].startswith("/usr")}
    return {opens(path, os.O_WRONLY) for path in files}.pop()


# --- /proc ---

SETTINGS: Final = (
    "sys/kernel/core_pattern", "sys/kernel/core_pipe_limit", "sys/kernel/kptr_restrict", "sys/kernel/dmesg_restrict",
    "sys/kernel/perf_event_paranoid", "sys/kernel/unprivileged_bpf_disabled", "sys/kernel/yama/ptrace_scope",
    "sys/kernel/randomize_va_space", "sys/kernel/panic", "sys/kernel/panic_on_oops", "sys/kernel/sysrq",
    "sys/kernel/hotplug", "sys/kernel/poweroff_cmd", "sys/kernel/ns_last_pid", "sys/kernel/domainname",
    "sys/kernel/shmmax", "sys/kernel/sem", "sys/kernel/msgmax", "sys/kernel/kexec_load_disabled",
    "sys/kernel/modules_disabled", "sys/kernel/usermodehelper/bset", "sys/kernel/printk", "sys/kernel/pid_max",
    "sys/kernel/threads-max", "sys/kernel/tainted", "sys/kernel/ftrace_enabled", "sys/kernel/io_uring_disabled",
    "sys/kernel/pty/max", "sys/kernel/keys/maxkeys", "sys/kernel/random/write_wakeup_threshold",
    "sys/kernel/sched_rt_runtime_us", "sys/kernel/tty/ldisc_autoload", "sys/kernel/hung_task_panic",
    "sys/vm/drop_caches", "sys/vm/panic_on_oom", "sys/vm/mmap_min_addr", "sys/vm/nr_hugepages", "sys/vm/swappiness",
    "sys/vm/unprivileged_userfaultfd", "sys/vm/compact_memory", "sys/vm/oom_kill_allocating_task", "sys/vm/block_dump",
    "sys/fs/protected_hardlinks", "sys/fs/protected_symlinks", "sys/fs/suid_dumpable", "sys/fs/file-max",
    "sys/fs/pipe-max-size", "sys/fs/mqueue/msg_max", "sys/fs/inotify/max_user_watches", "sys/fs/binfmt_misc/register",
    "sys/fs/binfmt_misc/status", "sys/fs/nr_open", "sys/fs/aio-max-nr", "sys/fs/mount-max", "sys/fs/protected_fifos",
    "sys/fs/protected_regular", "sys/net/core/somaxconn", "sys/net/ipv4/ip_forward",
    "sys/net/ipv4/conf/all/accept_source_route", "sys/net/ipv4/conf/all/rp_filter",
    "sys/net/ipv4/ip_unprivileged_port_start", "sys/net/ipv4/ip_nonlocal_bind", "sys/net/ipv4/ping_group_range",
    "sys/net/ipv4/tcp_congestion_control", "sys/net/ipv6/conf/all/disable_ipv6", "sys/net/ipv4/conf/eth0/arp_ignore",
    "sys/net/ipv4/conf/all/route_localnet", "sys/net/netfilter/nf_log/2", "sys/user/max_user_namespaces",
    "sys/user/max_net_namespaces", "sys/dev/cdrom/autoclose", "sys/abi/vsyscall32", "sysrq-trigger",
    "irq/default_smp_affinity", "irq/0/smp_affinity", "irq/1/smp_affinity", "mtrr", "scsi/scsi", "acpi/wakeup",
    "timer_stats", "dynamic_debug/control", "pressure/cpu", "pressure/io", "pressure/memory", "pressure/irq",
    "bus/pci/00/00.0", "sys/kernel/hostname", "sys/kernel/modprobe", "sys/vm/overcommit_memory",
    "asound/card0/oss_mixer", "fs/nfsd/exports", "driver/snd-page-alloc", "self/loginuid", "1/oom_score_adj",
    "1/timerslack_ns", "1/mem", "1/attr/current", "1/clear_refs", "1/comm", "1/coredump_filter", "1/sched",
    "1/autogroup", "1/uid_map", "1/setgroups",
)  # fmt: skip
# What a process may say of itself; the audit id only while it has none, and then within its own ids.
_HARMLESS: Final = {"self/loginuid"}
for _path in SETTINGS:
    if _path not in _HARMLESS:
        needed = RESOURCE if _path.startswith("sys/user/") else -1
        add(
            f"/proc/{_path} opens for writing",
            partial(opens, f"/proc/{_path}", os.O_WRONLY),
            absent=MISSING,
            capability=needed,
        )

READ: Final = (
    "kcore", "kmsg", "keys", "key-users", "kallsyms", "timer_list", "slabinfo", "vmallocinfo", "config.gz",
    "kpagecount", "kpageflags", "kpagecgroup", "pagetypeinfo", "sched_debug", "latency_stats", "modules", "interrupts",
    "vmcore", "tty/driver/serial", "tty/driver", "1/maps", "1/mem", "1/environ", "1/stack", "1/pagemap", "1/syscall",
    "1/auxv", "1/root/etc/passwd", "1/cwd", "1/fd/0", "1/fdinfo/0", "1/ns/mnt", "1/ns/user", "1/exe", "1/cmdline",
    "1/mountinfo", "1/task/1/mem", "1/map_files", "1/io", "1/personality", "1/cgroup", "1/status", "1/net/tcp",
)  # fmt: skip
for _path in READ:
    add(f"/proc/{_path} opens for reading", partial(opens, f"/proc/{_path}", os.O_RDONLY), absent=MISSING)


@probe("what the kernel is doing for a process")
def stack() -> str:
    def act() -> bytes:
        with open("/proc/self/stack", "rb") as file:
            return file.read()

    return refused(act)


def _is_empty(path: str) -> str:
    if entries := (os.listdir(path) if os.path.isdir(path) else []):
        raise Reached(entries[:3])
    return "ENOENT"


for _path in ("/proc/acpi", "/proc/scsi", "/proc/asound", "/proc/driver"):
    add(f"{_path} shows something", partial(_is_empty, _path), absent=("ENOENT",))

for _path in (
    "kernel/debug", "kernel/tracing", "kernel/security", "kernel/config", "kernel/uevent_helper", "kernel/kexec_loaded",
    "kernel/mm", "kernel/slab", "kernel/notes", "fs/cgroup", "fs/bpf", "fs/pstore", "fs/selinux", "fs/fuse", "firmware",
    "firmware/dmi", "firmware/efi", "class/dmi", "devices/virtual/dmi/id/product_uuid", "devices/virtual/powercap",
    "class/net", "class/block", "class/tty", "module", "power/state", "power/disk", "block", "bus/pci", "bus/usb",
    "hypervisor", "devices/system/cpu", "devices/system/node", "devices/system/memory", "kernel/profiling",
    "kernel/vmcoreinfo",
):  # fmt: skip

    def _in_sys(path: str = _path) -> str:
        if os.path.lexists("/sys/" + path):
            raise Reached(path)
        return "ENOENT"

    add(f"/sys/{_path} is shown", _in_sys, absent=("ENOENT",))


@probe("anything in /proc but the process's own that may be written")
def any_setting() -> str:
    """Asked of the kernel, and opened only where nothing should be found."""
    for base, directories, files in os.walk("/proc"):
        if base == "/proc":
            directories[:] = [d for d in directories if not d.isdigit() and d not in ("self", "thread-self", "net")]
        for name in files:
            path = os.path.join(base, name)
            if os.path.islink(path) or not os.access(path, os.W_OK):
                continue
            if facts["open"]:
                raise Reached(path)
            opens(path, os.O_WRONLY)
    return "nothing"


@probe("a physical address of a page")
def pagemap() -> str:
    page = mmap.mmap(-1, 4096)
    page[0] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    with open("/proc/self/pagemap", "rb") as file:
        file.seek(address // 4096 * 8)
        (entry,) = struct.unpack("<Q", file.read(8))
    if entry & (1 << 55) - 1:
        raise Reached(hex(entry))
    return "hidden"


@probe("an address of the kernel in /proc", absent=("none",))
def kernel_addresses() -> str:
    pattern = re.compile(r"\bffff[89a-f][0-9a-f]{11}\b")
    paths = [
        "/proc/kallsyms",
        "/proc/modules",
        "/proc/iomem",
        "/proc/timer_list",
        "/proc/self/stack",
        "/proc/self/wchan",
    ]
    paths += [f"/proc/net/{name}" for name in ("unix", "tcp", "udp", "netlink", "packet", "protocols", "ptype")]
    for path in paths:
        try:
            content = Path(path).read_text(errors="replace")[: 1 << 20]
        except OSError:
            continue
        if found := pattern.search(content):
            raise Reached(f"{path}: {found.group()}")
    return "none"


@probe("where memory lies", absent=("hidden",))
def iomem() -> str:
    with open("/proc/iomem") as file:
        line = next((line for line in file if not line.strip().startswith("00000000-00000000")), "")
    if line:
        raise Reached(line.strip())
    return "hidden"


@probe("a mapped file by its link in map_files")
def map_files() -> str:
    for name in os.listdir("/proc/self/map_files"):
        opens(f"/proc/self/map_files/{name}", os.O_RDONLY)
    return "EPERM"


@probe("the group that the agent is in, as the host names it", untwinned="no plan leaves the cgroup namespace out")
def cgroup_names() -> str:
    with open("/proc/self/cgroup") as file:
        paths = {line.strip().split(":", 2)[2] for line in file}
    # What an operator's exec started is in a group below the agent's, and named from there.
    if odd := {path for path in paths if not re.fullmatch(r"/(exec-[0-9]+)?", path)}:
        raise Reached(odd)
    return "/"


@probe("a file of a cgroup anywhere", untwinned="no plan leaves it in")
def cgroup_files() -> str:
    with open("/proc/self/mountinfo") as file:
        kinds = {line.split(" - ")[1].split()[0] for line in file}
    if odd := kinds & {"cgroup", "cgroup2", "sysfs", "debugfs", "tracefs", "securityfs", "bpf", "binfmt_misc"}:
        raise Reached(odd)
    return "none"


@probe("another process in /proc", twin="shared")
def processes() -> str:
    numbers = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    if 1 in numbers or len(numbers) > 12:
        raise Reached(numbers[:4])
    return f"{len(numbers)} of one's own"


# --- what a magic link leads to ---

for _path in (
    "/proc/self/root/..", "/proc/self/root/../../..", "/proc/self/cwd/../../../..", "/proc/self/task/self/root/..",
    "/proc/thread-self/root/..", "/dev/fd/../../..", "/proc/self/ns/../root/..",
):  # fmt: skip

    def _leads(path: str = _path) -> str:
        try:
            there, root = os.stat(path), os.stat("/")
        except OSError as error:
            return name_of(error.errno or 0)
        if (there.st_dev, there.st_ino) == (root.st_dev, root.st_ino) or path.startswith("/dev"):
            return "/"
        if facts["open"] or not os.path.realpath(path).startswith("/"):
            raise Reached(path)
        return os.path.realpath(path)

    add(f"{_path} leads out", _leads, untwinned="pivot_root is in every plan")

# --- devices ---

for _path in (
    "kvm", "fuse", "loop-control", "loop0", "vhost-vsock", "vhost-net", "vsock", "mem", "kmem", "port", "kmsg",
    "net/tun", "mapper/control", "mapper", "uinput", "uhid", "input/event0", "snd/timer", "dri/card0", "dri/renderD128",
    "sda", "vda", "nvme0n1", "xvda", "hda", "ram0", "tty0", "tty1", "ttyS0", "console", "hpet", "rtc0", "watchdog",
    "cpu/0/msr", "cpu_dma_latency", "btrfs-control", "autofs", "userfaultfd", "udmabuf", "dma_heap/system", "vfio/vfio",
    "ppp", "raw/rawctl", "sg0", "sr0", "bus/usb", "hwrng", "mcelog", "vcs", "vcsa1", "fb0", "snapshot", "rfkill",
    "vga_arbiter", "hugepages", "mqueue", "disk", "block", "char", "nvram", "tpm0", "tpmrm0", "nvidia0", "nvidiactl",
    "sev", "sgx_enclave", "zram0", "nbd0", "md0", "dm-0", "ubda", "log", "initctl", "vport0p1", "virtio-ports", "hvc0",
    "ptp0", "gpiochip0", "i2c-0",
):  # fmt: skip

    def _device(path: str = _path) -> str:
        if os.path.lexists("/dev/" + path):
            raise Reached(path)
        return "ENOENT"

    add(f"/dev/{_path} is there", _device, absent=("ENOENT",))

for _name, _request in {"RNDADDENTROPY": 0x40085203, "RNDADDTOENTCNT": 0x40045201, "RNDRESEEDCRNG": 0x5207}.items():

    def _random(request: int = _request) -> str:
        with open("/dev/urandom", "rb") as file:
            return judge(call(16, file.fileno(), request, BAD), by=("EPERM",))

    add(f"ioctl {_name}", _random)

# --- terminals: one's own, on which nothing needs more than one's own rights ---


def _terminal(request: int, argument: int, end: str) -> str:
    pid = os.fork()
    if pid == 0:
        os.setsid()
        master, slave = os.openpty()
        fcntl.ioctl(slave, 0x540E, 0)  # TIOCSCTTY
        fd = {"master": master, "slave": slave}.get(end, -1)
        if fd < 0:
            fd = os.open("/dev/tty" if end == "/dev/tty" else f"/proc/self/fd/{slave}", os.O_RDWR)
        result, error = call(16, fd, request, argument)
        os._exit(1 if result < 0 and error == "EPERM" else 0)
    _, status = os.waitpid(pid, 0)
    if os.waitstatus_to_exitcode(status) != 1:
        raise Reached(end)
    return "EPERM"


for _name, _request in {
    "TIOCSTI": 0x5412,
    "TIOCSTI with bit 32 (CVE-2019-10063)": 1 << 32 | 0x5412,
    "TIOCSTI with all high bits": 0xFFFFFFFF << 32 | 0x5412,
    "TIOCLINUX": 0x541C,
    "TIOCLINUX with bit 63": 1 << 63 | 0x541C,
    "TIOCCONS": 0x541D,
    "TIOCSETD (N_HCI and other line disciplines)": 0x5423,
    "TIOCSETD with bit 32": 1 << 32 | 0x5423,
}.items():
    for _end in ("master", "slave", "/dev/tty", "/proc/self/fd"):
        add(f"{_name} at {_end}", partial(_terminal, _request, BAD, _end))


def _privileged(request: int) -> str:
    master, slave = os.openpty()
    os.close(master) if request == 0 else None
    return judge(call(16, slave, request, BAD), by=("EPERM", "ENOTTY", "EIO"))


for _name, _request in {"TIOCVHANGUP": 0x5437, "TIOCSLCKTRMIOS": 0x5457, "TIOCGEXCL as a set": 0x5440}.items():
    if _name != "TIOCGEXCL as a set":
        add(f"{_name} of a terminal", partial(_privileged, _request))


@probe("take the terminal of another session (TIOCSCTTY)")
def steal_terminal() -> str:
    _, slave = os.openpty()
    held, hold = os.pipe()
    first = os.fork()
    if first == 0:
        os.setsid()
        fcntl.ioctl(slave, 0x540E, 0)
        os.write(hold, b"x")
        os.read(os.pipe()[0], 1)
    os.read(held, 1)
    second = os.fork()
    if second == 0:
        os.setsid()
        result, error = call(16, slave, 0x540E, 1)
        os._exit(0 if result >= 0 else 1 if error == "EPERM" else 2)
    _, status = os.waitpid(second, 0)
    os.kill(first, 9)
    os.waitpid(first, 0)
    if os.waitstatus_to_exitcode(status) != 1:
        raise Reached("stolen")
    return "EPERM"


@probe("a terminal of anybody else in /dev/pts", untwinned="test_filesystem.py has the twin")
def terminals() -> str:
    odd = [
        name
        for name in os.listdir("/dev/pts")
        if name != "ptmx" and os.stat(f"/dev/pts/{name}").st_uid not in (os.getuid(), 65534)
    ]
    if odd and not facts["open"]:
        raise Reached(odd)
    return "none"


@probe("FIBMAP", absent=("EINVAL", "ENOTTY"))
def fibmap() -> str:
    with open("/usr/bin/env") as file:
        return judge(call(16, file.fileno(), 1, BAD), by=("EPERM", "ENOTTY"))


for _name, _request in {"FIFREEZE": 0xC0045877, "FITHAW": 0xC0045878, "FITRIM": 0xC0185879}.items():

    def _filesystem(request: int = _request) -> str:
        with open("/proc/version") as file:
            return judge(call(16, file.fileno(), request, BAD), by=("EPERM", "ENOTTY"))

    add(f"ioctl {_name}", _filesystem, absent=("ENOTTY",))
