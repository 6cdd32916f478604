"""The plan of one sandbox: everything the launcher needs, as values; no I/O, no os, no clock.

The daemon builds a `SandboxPlan` from a launch request and a policy, the launcher performs it. Between them it travels
as JSON (`to_json`, `from_json`), and files travel beside it as descriptors: every `fd` field here is an *index* into
the descriptors that came with the message, never a path, because a path checked now is another thing later.

`from_json` takes nothing on trust: unknown keys, wrong types and values out of bounds raise `InvalidPlan` that names
the field. `describe()` gives the lines that `--dry-run` prints.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal

from sandbox.controls import NEGOTIABLE
from sandbox.decoding import InvalidPlan, decode, plain_values

# Host ids that agents may have: clear of every id systemd hands out (UIDS-GIDS.md) and of every person and service.
AGENT_ID_FIRST: Final = 1879048192
AGENT_ID_LAST: Final = 2147352575
IDS_PER_AGENT: Final = 65536

ROOT_INSIDE: Final = 0
AGENT_INSIDE: Final = 1000
# pid 1 has an id of its own, so that not even a "root" agent may signal, trace or read it.
INIT_INSIDE: Final = 65533
# Owns the user namespace, from above it; nothing inside or outside runs with it.
OWNER_INSIDE: Final = 65532

PLAN_BYTES_MAX: Final = 1 << 20
ARGUMENTS_MAX: Final = 4096
NO_RATE: Final = 1 << 50  # bytes per second that no device reaches: not limited
ENVIRONMENT_MAX: Final = 1024
BINDS_MAX: Final = 64
ETC_FILES_MAX: Final = 64
HIDDEN_MAX: Final = 64
TEXT_BYTES_MAX: Final = 256 << 10

# Controls that tests may leave out, to show that an attempt succeeds where it should. A launcher refuses a plan that
# names any of them unless it was itself started with --allow-weakened.
WEAKENINGS: Final = frozenset(
    {
        "capabilities",  # keep every capability inside the user namespace
        "devices",  # a /dev that is the host's
        "hidden_proc",  # /proc neither masked nor hidden, and its sysctls writable
        "landlock",
        "mount_flags",  # no nosuid, no nodev
        "network",  # the agent shares the launcher's network namespace
        "new_privileges",  # no_new_privs not set
        "private_ipc",  # System V IPC, POSIX queues and host name of the host
        "private_pid",  # sees and signals what its uid may on the host
        "read_only_root",
        "rlimits",
        "seccomp",
        "user_namespace",  # ids of the host: uid 0 is uid 0
    }
)


@dataclass(frozen=True, slots=True)
class IdRange:
    """Host ids of one agent: inside id n is host id `start + n`."""

    start: int
    size: int = IDS_PER_AGENT

    def host(self, inside: int) -> int:
        return self.start + inside

    def validate(self) -> None:
        if self.size != IDS_PER_AGENT:
            raise InvalidPlan(f"ids.size: must be {IDS_PER_AGENT}, not {self.size}")
        if not AGENT_ID_FIRST <= self.start <= AGENT_ID_LAST - self.size + 1:
            raise InvalidPlan(f"ids.start: {self.start} is outside of {AGENT_ID_FIRST}..{AGENT_ID_LAST}")
        if self.start % self.size:
            raise InvalidPlan(f"ids.start: {self.start} is not a multiple of {self.size}")

    def describe(self) -> str:
        return f"map ids 0..{self.size - 1} to host ids {self.start}..{self.start + self.size - 1}"


@dataclass(frozen=True, slots=True)
class Rootfs:
    """What the agent sees as `/`: the host's /usr with a minimal /etc, or a directory given by descriptor.

    `form`, `source` and `digest` say where that directory came from; they are for the posture and act on nothing.
    """

    kind: Literal["host", "directory"] = "host"
    fd: int | None = None
    form: str = ""
    source: str = ""
    digest: str = ""

    def describe(self) -> str:
        if self.kind == "host":
            return "read-only view of the host's /usr"
        origin = f", {self.form or 'directory'} {self.source}" if self.source else ""
        return f"read-only root from fd {self.fd}{origin}{f', {self.digest}' if self.digest else ''}"

    def facts(self) -> dict[str, str]:
        """Say it for the posture; a directory that is no image has no digest, for it can change at any time."""
        if self.kind == "host":
            return {"rootfs": "host", "rootfs_source": "", "rootfs_digest": ""}
        return {"rootfs": self.form or self.kind, "rootfs_source": self.source, "rootfs_digest": self.digest}


@dataclass(frozen=True, slots=True)
class Bind:
    """A directory or file of the host made visible inside.

    `owner_uid` and `owner_gid` are its owner on disk; they show as the agent's own ids inside, through an idmapped
    mount. Where the file system has no idmap, the launch fails, unless `without_idmap` is "read-only". With `layer` it
    is the lower part of an overlay: the agent writes to its scratch, and the directory itself stays as it is.
    """

    fd: int
    target: str
    writable: bool
    owner_uid: int
    owner_gid: int
    allow_root_owned: bool = False
    without_idmap: Literal["refuse", "read-only"] = "refuse"
    layer: bool = False
    name: str = ""

    def describe(self) -> str:
        if self.layer:
            return f"overlay at {self.target}: fd {self.fd} below, what the agent changes in a layer on its scratch"
        mode = "writable" if self.writable else "read-only"
        return f"bind fd {self.fd} at {self.target} {mode}, owner {self.owner_uid}:{self.owner_gid} shown as the agent"


@dataclass(frozen=True, slots=True)
class Scratch:
    """Private writable space, limited in bytes and files.

    `disk`: /tmp, home, an unbound /workspace and a layer share one image of `limits.disk_bytes`; "preferred" makes each
    a tmpfs of the size given here where the host can have none. /dev/shm is a tmpfs in any case.
    """

    disk: Literal["off", "preferred", "required"] = "off"
    root_bytes: int = 16 << 20
    tmp_bytes: int = 256 << 20
    home_bytes: int = 256 << 20
    shm_bytes: int = 64 << 20
    workspace_bytes: int = 256 << 20  # used only where the plan has no bind at /workspace
    inodes: int = 65536

    def describe(self) -> str:
        if self.disk == "off":
            sizes = f"/tmp {self.tmp_bytes}, home {self.home_bytes}, shm {self.shm_bytes}"  # noqa: S108 - the sandbox's own
            return f"scratch: tmpfs, counts as memory ({sizes})"
        return f"scratch: on disk ({self.disk}), within limits.disk_bytes; /dev/shm is tmpfs, {self.shm_bytes} bytes"


@dataclass(frozen=True, slots=True)
class EtcFile:
    """One file below /etc; the name may have directories (`ssl/extra.pem`)."""

    name: str
    text: str

    def describe(self) -> str:
        return f"write /etc/{self.name} ({len(self.text.encode())} bytes)"


@dataclass(frozen=True, slots=True)
class Network:
    """The one link of the sandbox; the addresses are the same in every agent, each has its own namespaces."""

    agent_address: str = "198.18.0.2"
    gate_address: str = "198.18.0.1"
    proxy_port: int = 3128
    device: str = "eth0"
    transparent: bool = False  # a name server at the gate, and addresses for the names that are granted

    @property
    def route(self) -> str:
        """The one route, as /proc/net/route has it."""
        if self.transparent:
            return f"198.18.0.0/15 via {self.gate_address} dev {self.device}"
        return f"{self.gate_address}/32 dev {self.device}"

    def describe(self) -> str:
        route = f"{self.route}, names at port 53" if self.transparent else self.gate_address
        return f"{self.device} {self.agent_address}, one route: {route}, proxy at port {self.proxy_port}"


# Least and most of each limit: below it nothing can start, above it no kernel has a number.
LIMIT_RANGES: Final = {
    "memory_bytes": (8 << 20, 1 << 50),
    "swap_bytes": (0, 1 << 50),
    "io_read_bytes_per_second": (4096, NO_RATE),
    "io_write_bytes_per_second": (4096, NO_RATE),
    "cpus": (0.01, 4096),
    "pids": (2, 4 << 20),
    "open_files": (16, 1 << 20),
    "disk_bytes": (1 << 16, 1 << 50),
    "output_bytes": (4096, 1 << 40),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What the agent may use; all of its processes together, but for `open_files`, which is for each of them."""

    memory_bytes: int = 1 << 30
    cpus: float = 1.0
    pids: int = 256
    open_files: int = 4096
    disk_bytes: int = 1 << 30
    output_bytes: int = 64 << 20
    swap_bytes: int = 0
    io_read_bytes_per_second: int = NO_RATE  # from each disk of the host
    io_write_bytes_per_second: int = NO_RATE

    @property
    def io_limited(self) -> bool:
        return min(self.io_read_bytes_per_second, self.io_write_bytes_per_second) < NO_RATE

    def validate(self) -> None:
        for name, (least, most) in LIMIT_RANGES.items():
            if not least <= getattr(self, name) <= most:
                raise InvalidPlan(f"limits.{name}: {getattr(self, name)} is outside of {least}..{most}")

    def describe(self) -> str:
        text = (
            f"limits: memory {self.memory_bytes} bytes, swap {self.swap_bytes}, {self.cpus:g} cpus, {self.pids} pids, "
            f"{self.open_files} open files, disk {self.disk_bytes} bytes, output {self.output_bytes} bytes"
        )
        rates = {"read": self.io_read_bytes_per_second, "written": self.io_write_bytes_per_second}
        return text + "".join(f", {rate} bytes/s {what}" for what, rate in rates.items() if rate < NO_RATE)


@dataclass(frozen=True, slots=True)
class Tty:
    rows: int
    cols: int

    def describe(self) -> str:
        return f"terminal {self.rows}x{self.cols}"


ARGUMENTS_TOLD_MAX: Final = 16


@dataclass(frozen=True, slots=True)
class Record:
    """What the agent's processes do that is told of; the filter of the plan is one that asks (sandbox/watcher.py)."""

    execs: bool = False
    refusals: bool = False
    arguments: int = 1  # of each exec, from the first

    @property
    def listens(self) -> bool:
        return self.execs or self.refusals

    def validate(self) -> None:
        if not 0 <= self.arguments <= ARGUMENTS_TOLD_MAX:
            raise InvalidPlan(f"record.arguments: {self.arguments} is outside of 0..{ARGUMENTS_TOLD_MAX}")

    def describe(self) -> str:
        what = {"execs": self.execs, f"{self.arguments} arguments": self.execs, "refused calls": self.refusals}
        return f"tell of {', '.join(name for name, told in what.items() if told) or 'no system call'}"


@dataclass(frozen=True, slots=True)
class SandboxPlan:
    """One sandbox, complete. Order of the steps that perform it: `sandbox/init.py`."""

    agent_id: str
    instance: str
    hostname: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...]
    ids: IdRange
    cwd: str = "/workspace"
    uid: int = AGENT_INSIDE
    gid: int = AGENT_INSIDE
    rootfs: Rootfs = Rootfs()
    binds: tuple[Bind, ...] = ()
    hide: tuple[str, ...] = ()
    scratch: Scratch = Scratch()
    etc: tuple[EtcFile, ...] = ()
    network: Network = Network()
    limits: Limits = Limits()
    filter_digest: str = ""
    landlock: Literal["off", "if-present", "required"] = "if-present"
    require: tuple[str, ...] = ()  # controls that must be there (sandbox/controls.py)
    degraded_ok: tuple[str, ...] = ()  # controls that may be missing; for the rest the table of controls decides
    canary: bool = False  # the attempts of sandbox/canaries.py run before the program does
    tty: Tty | None = None
    stdin: bool = False
    ca_certificate: str | None = None  # PEM that only this sandbox trusts, added to the host's bundle
    weaken: tuple[str, ...] = ()
    home: str | None = None  # the name of a home that is kept; None: it ends with the agent
    record: Record = Record()

    VERSION: ClassVar[int] = 1

    def to_json(self) -> dict[str, Any]:
        return {"version": self.VERSION, **plain_values(self)}

    @classmethod
    def from_json(cls, value: object) -> "SandboxPlan":
        """Decode and check; raises `InvalidPlan`."""
        if not isinstance(value, dict):
            raise InvalidPlan("plan: must be an object")
        fields = dict(value)
        if fields.pop("version", None) != cls.VERSION:
            raise InvalidPlan(f"plan.version: must be {cls.VERSION}; daemon and launcher are of different releases")
        plan = decode(cls, fields, "plan")
        plan.validate()
        return plan

    def fds_needed(self) -> int:
        indices = [bind.fd for bind in self.binds] + ([self.rootfs.fd] if self.rootfs.fd is not None else [])
        return max(indices, default=-1) + 1

    def validate(self) -> None:
        """Check what types cannot say; raises `InvalidPlan`."""
        self.ids.validate()
        self.limits.validate()
        self.record.validate()
        _check_name("agent_id", self.agent_id, most=64)
        _check_name("instance", self.instance, most=24)
        _check_name("hostname", self.hostname, most=63)
        if not 1 <= len(self.argv) <= ARGUMENTS_MAX:
            raise InvalidPlan(f"argv: must have 1..{ARGUMENTS_MAX} entries")
        if not self.argv[0]:
            raise InvalidPlan("argv[0]: must not be empty")
        check_strings("argv", self.argv)
        check_environment("env", self.env)
        for inside, field in ((self.uid, "uid"), (self.gid, "gid")):
            if inside not in (ROOT_INSIDE, AGENT_INSIDE):
                raise InvalidPlan(f"{field}: must be {ROOT_INSIDE} or {AGENT_INSIDE} inside, not {inside}")
        check_target("cwd", self.cwd)
        if unknown := set(self.weaken) - WEAKENINGS:
            raise InvalidPlan(f"weaken: there is no {', '.join(sorted(unknown))}")
        if unknown := {*self.require, *self.degraded_ok} - set(NEGOTIABLE):
            raise InvalidPlan(f"require, degraded_ok: no policy decides on {', '.join(sorted(unknown))}")
        if self.tty is not None:
            check_terminal(self.tty)
        if self.home is not None:
            _check_name("home", self.home.replace(".", "-"), most=64)
            if self.home.startswith(".") or self.scratch.disk != "required":
                raise InvalidPlan(
                    "home: a name without a dot at its start; and it is kept on disk, so that is required"
                )
        self._check_files()

    def _check_files(self) -> None:
        if (self.rootfs.kind == "directory") != (self.rootfs.fd is not None):
            raise InvalidPlan("rootfs.fd: a directory needs one, the host's root takes none")
        if len(self.binds) > BINDS_MAX or len(self.hide) > HIDDEN_MAX or len(self.etc) > ETC_FILES_MAX:
            raise InvalidPlan(f"binds, hide, etc: at most {BINDS_MAX}, {HIDDEN_MAX}, {ETC_FILES_MAX}")
        for index, bind in enumerate(self.binds):
            check_bind(f"binds[{index}]", bind)
        if any(bind.layer for bind in self.binds) and self.scratch.disk != "required":
            raise InvalidPlan("scratch.disk: a layer is kept on disk, so it is required")
        for path in self.hide:
            check_target("hide", path)
        for file in self.etc:
            check_target("etc.name", "/" + file.name)
            if len(file.text) > TEXT_BYTES_MAX:
                raise InvalidPlan(f"etc.{file.name}: longer than {TEXT_BYTES_MAX} characters")

    @property
    def listens(self) -> bool:
        """Whether some calls of its processes ask the watcher."""
        return self.record.listens and "seccomp" not in self.weaken

    def describe(self) -> Iterator[str]:
        """Yield a line for each step, in the order in which they happen."""
        yield f"agent {self.agent_id} of instance {self.instance}, host name {self.hostname}"
        yield self.limits.describe()
        yield self.network.describe()
        yield "own mount, pid, ipc, uts, cgroup, net and user namespaces"
        yield self.ids.describe()
        yield self.rootfs.describe()
        yield from (file.describe() for file in self.etc)
        yield self.scratch.describe()
        if self.home is not None:
            yield f"keep the home of {self.home}, {self.limits.disk_bytes} bytes of its own"
        yield from (bind.describe() for bind in self.binds)
        yield from (f"hide {path}" for path in self.hide)
        yield "fresh /proc (masked, hidepid), six devices, own devpts; everything nosuid; pivot_root, old root detached"
        yield f"uid {self.uid} gid {self.gid} inside, no capability, no_new_privs, Landlock {self.landlock}"
        yield f"seccomp filter {self.filter_digest or 'none'}"
        if self.record.listens:
            yield self.record.describe()
        if self.require:
            yield f"refuse a host without {', '.join(self.require)}"
        if self.degraded_ok:
            yield f"do without {', '.join(self.degraded_ok)} where the host lacks it"
        if self.canary:
            yield "canaries: attempts to get out, each of which must fail, before the program runs"
        yield from (f"WEAKENED for a test: {name}" for name in self.weaken)
        if self.tty is not None:
            yield self.tty.describe()
        yield f"execve {self.argv[0]} in {self.cwd}"


# --- checks shared with exec and with binds into a running sandbox ------------------------------------------------


def check_strings(where: str, strings: Sequence[str]) -> None:
    if sum(len(text) + 1 for text in strings) > PLAN_BYTES_MAX:
        raise InvalidPlan(f"{where}: longer than {PLAN_BYTES_MAX} bytes")
    for index, text in enumerate(strings):
        if "\0" in text:
            raise InvalidPlan(f"{where}[{index}]: has a NUL byte")


def check_environment(where: str, env: Sequence[tuple[str, str]]) -> None:
    if len(env) > ENVIRONMENT_MAX:
        raise InvalidPlan(f"{where}: more than {ENVIRONMENT_MAX} variables")
    check_strings(where, [text for pair in env for text in pair])
    for name, _ in env:
        if not name or "=" in name:
            raise InvalidPlan(f"{where}: {name!r} is no name of a variable")


def check_target(where: str, path: str) -> None:
    """Accept an absolute path in its shortest form only; raises `InvalidPlan`."""
    parts = path.split("/")
    if parts[0] or len(path) > 4096 or "\0" in path or (path != "/" and any(p in {"", ".", ".."} for p in parts[1:])):  # noqa: PLR2004 - PATH_MAX
        raise InvalidPlan(f"{where}: {path!r} is not an absolute path without empty, '.' or '..' parts")


# First parts of paths that are the sandbox's own: covering them would change what it is.
RESERVED_TOPS: Final = frozenset({"proc", "dev", "sys", "etc", "usr", "bin", "sbin", "lib", "lib64", ""})


def check_bind(where: str, bind: Bind) -> None:
    """Check what types cannot say of a bind; raises `InvalidPlan`."""
    check_target(f"{where}.target", bind.target)
    if bind.target.split("/")[1] in RESERVED_TOPS or bind.target == "/home":  # /home/agent is made in it
        raise InvalidPlan(f"{where}.target: {bind.target} would cover a part of the sandbox itself")
    if bind.fd < 0 or min(bind.owner_uid, bind.owner_gid) < 0:
        raise InvalidPlan(f"{where}: descriptor index and owner must not be negative")
    if bind.layer and (bind.writable or bind.target != "/workspace" or bind.without_idmap != "refuse"):
        raise InvalidPlan(f"{where}.layer: is for /workspace, and what is below it is read-only and idmapped")
    if bind.writable and bind.owner_uid == 0 and not bind.allow_root_owned:
        raise InvalidPlan(f"{where}: a writable bind owned by uid 0 needs allow_root_owned")


def check_terminal(tty: Tty) -> None:
    if not (0 < tty.rows < 1 << 16 and 0 < tty.cols < 1 << 16):
        raise InvalidPlan("tty: rows and cols must be 1..65535")


def _check_name(where: str, text: str, *, most: int) -> None:
    if not 0 < len(text) <= most or not all(c.isascii() and (c.isalnum() or c in "-_") for c in text):
        raise InvalidPlan(f"{where}: {text!r} must be 1..{most} letters, digits, '-' or '_'")
