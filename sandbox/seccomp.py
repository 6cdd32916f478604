"""Compile a seccomp profile (policies/seccomp/*.json) into the BPF programs that every agent is started under.

Two programs, stacked in this order. The first is an allow-list from libseccomp. The second, written by hand, does what
libseccomp cannot. It judges the request of an ioctl, and a flag of another call, that is otherwise allowed (libseccomp
silently drops a deny rule beside an unconditional ALLOW), by the low 32 bits as the kernel does (CVE-2019-10063). And
it answers ENOSYS to calls
newer than the profile, as libc expects before it falls back: where both refuse, the errno of the program installed last
counts (seccomp(2)).

Used in the daemon at its start; the launcher only ever sees the bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import struct
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import pyseccomp  # type: ignore[import-untyped]  # ships no types

if TYPE_CHECKING:
    from pathlib import Path

ALLOW: Final = "allow"
NOTHING: Final = "nothing"  # says that it was done, and does nothing: errno 0 (seccomp(2))
PROFILE_BYTES_MAX: Final = 1 << 20
INSTRUCTIONS_MAX: Final = 4096  # BPF_MAXINSNS
ARGUMENT_MAX: Final = 5
EXEC_CALLS: Final = ("execve", "execveat")
TOLD_ANSWER: Final = "EPERM"  # what a process answers that does not know the profile (sandbox/watcher.py)
_U64_MAX: Final = 2**64 - 1
_JUMP_MAX: Final = 255
_Instruction: TypeAlias = tuple[int, str, str, int]

# What pid 1 of a sandbox does once it has given up everything: tell the launcher, wait, write one file, end; and what
# its interpreter needs for that (memory, signals).
INIT_CALLS: Final = (
    "brk", "clock_gettime", "close", "exit", "exit_group", "futex", "madvise", "mmap", "mremap", "munmap", "pwrite64",
    "restart_syscall", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sendmsg", "wait4", "write",
)  # fmt: skip

# <linux/filter.h>, <linux/seccomp.h>, <linux/audit.h>: only what the second program uses.
_LD_W_ABS, _JEQ_K, _JGE_K, _RET_K, _AND_K = 0x20, 0x15, 0x35, 0x06, 0x54
_OFFSET_NUMBER, _OFFSET_ARCH, _OFFSET_ARGUMENTS = 0, 4, 16
_RET_ALLOW: Final = 0x7FFF0000
_RET_ERRNO: Final = 0x00050000
_X32_BIT: Final = 0x40000000
_AUDIT_ARCH: Final = {"X86_64": 0xC000003E, "AARCH64": 0xC00000B7}


class InvalidProfile(ValueError):  # noqa: N818 - reads as what the profile is
    """The profile cannot be compiled as written; the text names the place."""


@dataclass(frozen=True, slots=True)
class Condition:
    """`argument & mask == equals`."""

    argument: int
    mask: int
    equals: int


@dataclass(frozen=True, slots=True)
class Group:
    """Calls that share an answer and a reason; all its conditions hold. Groups for the same call are alternatives."""

    name: str
    reason: str
    action: str
    calls: tuple[str, ...]
    when: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class IoctlRefused:
    name: str
    request: int
    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """What is taken out of an allowed call; conditions are of the low 32 bits. `answer`: an errno name, or nothing."""

    name: str
    reason: str
    call: str
    answer: str
    when: tuple[Condition, ...] = ()


@dataclass(frozen=True, slots=True)
class Profile:
    """What `policies/seccomp/NAME.json` says; errors are errno names."""

    name: str
    default: str
    other_architectures: str
    highest_number: int
    above_highest: str
    groups: tuple[Group, ...]
    ioctl_refused: tuple[IoctlRefused, ...]
    refused: tuple[Refused, ...] = ()


@dataclass(frozen=True, slots=True)
class Filters:
    """BPF programs in the order of installation, and the one of pid 1.

    `unknown` are calls that this libseccomp has no number for; they are refused.
    """

    digest: str
    programs: tuple[bytes, ...]
    init: bytes
    unknown: tuple[str, ...] = ()


# --- reading -------------------------------------------------------------------------------------------------------


def load(path: Path) -> Profile:
    """Read a profile; raises `InvalidProfile` that names the file and the place in it."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InvalidProfile(f"cannot read seccomp profile {path}: {error.strerror}") from error
    if len(raw) > PROFILE_BYTES_MAX:
        raise InvalidProfile(f"cannot read seccomp profile {path}: larger than {PROFILE_BYTES_MAX} bytes")
    try:
        return parse(json.loads(raw.decode("utf-8")))
    except json.JSONDecodeError as error:
        raise InvalidProfile(f"{path}:{error.lineno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise InvalidProfile(f"{path}: not UTF-8 at byte {error.start}") from error
    except InvalidProfile as error:
        raise InvalidProfile(f"{path}: {error}") from None


def parse(document: object) -> Profile:
    """Decode and check a profile; raises `InvalidProfile`."""
    value = _object("profile", document, Profile, optional=("refused",))
    profile = Profile(
        name=_text("name", value["name"]),
        default=_errno("default", value["default"]),
        other_architectures=_errno("other_architectures", value["other_architectures"]),
        highest_number=_number("highest_number", value["highest_number"], most=_X32_BIT - 1),
        above_highest=_errno("above_highest", value["above_highest"]),
        groups=tuple(_group(f"groups[{i}]", item) for i, item in enumerate(_list("groups", value["groups"]))),
        ioctl_refused=tuple(
            _ioctl(f"ioctl_refused[{i}]", item) for i, item in enumerate(_list("ioctl_refused", value["ioctl_refused"]))
        ),
        refused=tuple(
            _refused(f"refused[{i}]", item) for i, item in enumerate(_list("refused", value.get("refused", [])))
        ),
    )
    _check_unconditional(profile)
    return profile


def _check_unconditional(profile: Profile) -> None:
    """Refuse a condition beside an unconditional rule for the same call: libseccomp drops one of them in silence."""
    unconditional: dict[str, str] = {}
    conditional: dict[str, str] = {}
    for group in profile.groups:
        for call in group.calls:
            if call in unconditional or (not group.when and call in conditional):
                other = unconditional.get(call) or conditional[call]
                raise InvalidProfile(f"group {group.name}: {call} is in group {other} too, and one has no condition")
            (conditional if group.when else unconditional)[call] = group.name


def _group(where: str, document: object) -> Group:
    value = _object(where, document, Group, optional=("when",))
    action = _text(f"{where}.action", value["action"])
    conditions = [
        _condition(f"{where}.when[{i}]", item) for i, item in enumerate(_list(f"{where}.when", value.get("when", [])))
    ]
    calls = tuple(_text(f"{where}.calls", item) for item in _list(f"{where}.calls", value["calls"]))
    if not calls or len(set(calls)) != len(calls):
        raise InvalidProfile(f"{where}.calls: must name at least one call, and none twice")
    return Group(
        name=_text(f"{where}.name", value["name"]),
        reason=_text(f"{where}.reason", value["reason"]),
        action=action if action == ALLOW else _errno(f"{where}.action", action),
        calls=calls,
        when=tuple(conditions),
    )


def _condition(where: str, document: object, *, most: int = _U64_MAX) -> Condition:
    value = _object(where, document, Condition)
    condition = Condition(
        argument=_number(f"{where}.argument", value["argument"], most=ARGUMENT_MAX),
        mask=_number(f"{where}.mask", value["mask"], most=most),
        equals=_number(f"{where}.equals", value["equals"], most=most),
    )
    if condition.equals & ~condition.mask:
        raise InvalidProfile(f"{where}: can never hold, equals has bits outside of the mask")
    return condition


def _ioctl(where: str, document: object) -> IoctlRefused:
    value = _object(where, document, IoctlRefused)
    return IoctlRefused(
        name=_text(f"{where}.name", value["name"]),
        request=_number(f"{where}.request", value["request"], most=2**32 - 1),
        reason=_text(f"{where}.reason", value["reason"]),
    )


def _refused(where: str, document: object) -> Refused:
    value = _object(where, document, Refused, optional=("when",))
    answer = _text(f"{where}.answer", value["answer"])
    return Refused(
        name=_text(f"{where}.name", value["name"]),
        reason=_text(f"{where}.reason", value["reason"]),
        call=_text(f"{where}.call", value["call"]),
        answer=answer if answer == NOTHING else _errno(f"{where}.answer", answer),
        when=tuple(
            _condition(f"{where}.when[{i}]", item, most=2**32 - 1)
            for i, item in enumerate(_list(f"{where}.when", value.get("when", [])))
        ),
    )


def _object(where: str, document: object, kind: type, *, optional: tuple[str, ...] = ()) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise InvalidProfile(f"{where}: must be an object")
    known = tuple(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    if unknown := sorted(set(document) - set(known)):
        raise InvalidProfile(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    if missing := [name for name in known if name not in document and name not in optional]:
        raise InvalidProfile(f"{where}: {missing[0]} is missing")
    return document


def _list(where: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise InvalidProfile(f"{where}: must be a list")
    return value


def _text(where: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidProfile(f"{where}: must be a text that is not empty")
    return value


def _number(where: str, value: object, *, most: int) -> int:
    """A number, or a text such as 0x5412 or 0o6000 (JSON has decimal numbers only)."""
    try:
        number = int(value, 0) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= most:
        raise InvalidProfile(f"{where}: must be a number from 0 to {most}, not {value!r}")
    return number


def _errno(where: str, value: object) -> str:
    name = _text(where, value)
    if not hasattr(errno, name):
        raise InvalidProfile(f"{where}: {name} is no errno name (EPERM, ENOSYS, …), nor {ALLOW!r} where that may stand")
    return name


# --- compiling -----------------------------------------------------------------------------------------------------


def compile(profile: Profile, *, execs: bool = False, refusals: bool = False) -> Filters:  # noqa: A001 - always used as seccomp.compile
    """The programs for this machine's architecture; raises `InvalidProfile` where there is none.

    With `execs` every execve asks whoever listens on the first program, with `refusals` so does what no group allows.
    Nobody listening is ENOSYS for all of these (seccomp_unotify(2)): they fail closed.
    """
    if execs or refusals:
        _check_tellable(profile)
    main, unknown = _allow_list(profile, execs=execs, refusals=refusals)
    programs, init = (main, _second(profile)), _init(profile)
    for program in (init, *programs):
        if len(program) // 8 > INSTRUCTIONS_MAX:
            raise InvalidProfile(f"profile {profile.name}: more than {INSTRUCTIONS_MAX} instructions")
    digest = hashlib.sha256()
    for program in (init, *programs):
        digest.update(struct.pack("<I", len(program)) + program)
    return Filters(f"sha256:{digest.hexdigest()}", programs, init, tuple(unknown))


def _check_tellable(profile: Profile) -> None:
    """Refuse a profile whose answers are not what the watcher says, which knows none: an exec goes on, the rest EPERM.

    An exec that the profile refuses, or allows under a condition, would go on; a default of another errno would change.
    """
    allowed = {call for group in profile.groups if group.action == ALLOW and not group.when for call in group.calls}
    if missing := [call for call in EXEC_CALLS if call not in allowed]:
        raise InvalidProfile(f"profile {profile.name}: nothing can be told where {missing[0]} is not always allowed")
    if profile.default != TOLD_ANSWER:
        raise InvalidProfile(f"profile {profile.name}: nothing can be told where the default is not {TOLD_ANSWER}")


def _init(profile: Profile) -> bytes:
    """The program of pid 1, whatever the profile allows the agent."""
    built = _filter(_refuse(profile.default), profile)
    for call in INIT_CALLS:
        number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call)
        if number >= 0:
            built.add_rule(pyseccomp.ALLOW, number)
    return _exported(built)


def _refuse(name: str) -> int:
    return int(pyseccomp.ERRNO(getattr(errno, name)))


def call_name(number: int) -> str:
    """Return the name of a call of this machine, or its number where this libseccomp has none: agents make them up."""
    try:
        name = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, number)
    except ValueError:
        return str(number)
    return name.decode() if isinstance(name, bytes) else str(number)


def _allow_list(profile: Profile, *, execs: bool, refusals: bool) -> tuple[bytes, list[str]]:
    """The first program, and the calls that this libseccomp does not know, which stay refused."""
    built = _filter(int(pyseccomp.NOTIFY) if refusals else _refuse(profile.default), profile)
    # A binary tree: the kernel runs a program for every call number when it is loaded (seccomp_cache_prepare).
    built.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
    unknown = []
    for group in profile.groups:
        action = int(pyseccomp.ALLOW) if group.action == ALLOW else _refuse(group.action)
        if action == _refuse(profile.default):
            continue  # also where the default is told of: it is the same answer
        conditions = [pyseccomp.Arg(c.argument, pyseccomp.MASKED_EQ, c.mask, c.equals) for c in group.when]
        for call in group.calls:
            number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, call)
            if number == -1:  # __NR_SCMP_ERROR
                unknown.append(call)
            elif number >= 0:  # below -1: a call of other architectures only
                told = execs and call in EXEC_CALLS and group.action == ALLOW
                if told and refusals:
                    continue  # the default; libseccomp takes no rule that says the same
                built.add_rule(int(pyseccomp.NOTIFY) if told else action, number, *conditions)
    return _exported(built), unknown


def _filter(default: int, profile: Profile) -> pyseccomp.SyscallFilter:
    built = pyseccomp.SyscallFilter(default)
    # Also the answer to x32 numbers and to int 0x80: only the native ABI is in the filter.
    built.set_attr(pyseccomp.Attr.ACT_BADARCH, _refuse(profile.other_architectures))
    return built


def _exported(built: pyseccomp.SyscallFilter) -> bytes:
    with tempfile.TemporaryFile() as file:
        built.export_bpf(file)
        file.seek(0)
        return bytes(file.read())


def _second(profile: Profile) -> bytes:
    """The stacked program: architecture, numbers above the highest known one, refused ioctl requests and flags."""
    architecture = pyseccomp.system_arch()
    names = {getattr(pyseccomp.Arch, name): number for name, number in _AUDIT_ARCH.items()}
    if architecture not in names or sys.byteorder != "little":
        raise InvalidProfile("cannot compile a seccomp filter for this architecture: x86_64 and aarch64 are supported")
    ioctl = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, "ioctl")
    # (code, where to go if true, if false, constant); "" is the next instruction. A label on a line of its own names
    # the place that follows it; the answers stand at the end.
    lines: list[_Instruction | str] = [
        (_LD_W_ABS, "", "", _OFFSET_ARCH),
        (_JEQ_K, "", "other", names[architecture]),
        (_LD_W_ABS, "", "", _OFFSET_NUMBER),
        (_JGE_K, "other", "", _X32_BIT),
        (_JGE_K, "above", "", profile.highest_number + 1),
        (_JEQ_K, "", "not ioctl", ioctl),
        (_LD_W_ABS, "", "", _OFFSET_ARGUMENTS + 8),
        *((_JEQ_K, "refuse", "", item.request) for item in profile.ioctl_refused),
        (_RET_K, "", "", _RET_ALLOW),
        "not ioctl",
    ]
    for item in profile.refused:
        lines += _taken_out(item)
    lines.append((_RET_K, "", "", _RET_ALLOW))
    numbers = {
        "refuse": errno.EPERM,
        "other": getattr(errno, profile.other_architectures),
        "above": getattr(errno, profile.above_highest),
    }
    for label, number in numbers.items():
        lines += [label, (_RET_K, "", "", _RET_ERRNO | number)]
    return _assembled(lines)


def _taken_out(item: Refused) -> list[_Instruction | str]:
    """The instructions for one refusal; nothing where this architecture has no such call."""
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, item.call)
    if number < 0:
        return []
    after = f"after {item.name}"
    lines: list[_Instruction | str] = [(_LD_W_ABS, "", "", _OFFSET_NUMBER), (_JEQ_K, "", after, number)]
    for condition in item.when:
        # Low halves: both architectures are little-endian.
        lines += [
            (_LD_W_ABS, "", "", _OFFSET_ARGUMENTS + 8 * condition.argument),
            (_AND_K, "", "", condition.mask),
            (_JEQ_K, "", after, condition.equals),
        ]
    number = 0 if item.answer == NOTHING else getattr(errno, item.answer)
    return [*lines, (_RET_K, "", "", _RET_ERRNO | number), after]


def _assembled(lines: list[_Instruction | str]) -> bytes:
    place: dict[str, int] = {}
    body: list[_Instruction] = []
    for line in lines:
        if isinstance(line, str):
            place[line] = len(body)
        else:
            body.append(line)
    program = b""
    for index, (code, true, false, constant) in enumerate(body):
        jumps = [place[label] - index - 1 if label else 0 for label in (true, false)]
        if max(jumps) > _JUMP_MAX:
            raise InvalidProfile(f"refused: too many entries, a jump goes over {_JUMP_MAX} instructions")
        program += struct.pack("<HBBI", code, *jumps, constant)
    return program
