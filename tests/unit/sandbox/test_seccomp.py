"""Profiles are read strictly; what is compiled from them says the same, by a BPF interpreter of our own."""

from __future__ import annotations

import copy
import errno
import json
import platform
import struct
from pathlib import Path
from typing import Any

import pytest

from sandbox import seccomp

PROFILES = Path(__file__).resolve().parents[3] / "policies" / "seccomp"
NATIVE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
ALLOWED = "allowed"


def run(program: bytes, number: int, arguments: tuple[int, ...] = (), arch: int = NATIVE) -> int:
    """One BPF program over one struct seccomp_data; the value it returns (seccomp(2), <linux/filter.h>)."""
    data = struct.pack("<iIQ6Q", number, arch, 0, *[value % 2**64 for value in (*arguments, *[0] * 6)[:6]])
    accumulator, counter = 0, 0
    instructions = list(struct.iter_unpack("<HBBI", program))
    while True:
        code, true, false, constant = instructions[counter]
        counter += 1
        match code:
            case 0x20:
                (accumulator,) = struct.unpack_from("<I", data, constant)
            case 0x54:
                accumulator &= constant
            case 0x05:
                counter += constant
            case 0x15:
                counter += true if accumulator == constant else false
            case 0x25:
                counter += true if accumulator > constant else false
            case 0x35:
                counter += true if accumulator >= constant else false
            case 0x06:
                return int(constant)
            case _:
                pytest.fail(f"the interpreter of this test does not know instruction {code:#x}")


def verdict(filters: seccomp.Filters, number: int, arguments: tuple[int, ...] = (), arch: int = NATIVE) -> str:
    """What the kernel would do: the strictest answer, and among equals that of the program installed last."""
    answers = [run(program, number, arguments, arch) for program in reversed(filters.programs)]
    refused = [answer & 0xFFFF for answer in answers if answer & 0xFFFF0000 == 0x00050000]
    assert all(answer & 0xFFFF0000 in {0x00050000, 0x7FFF0000} for answer in answers)
    return errno.errorcode[refused[0]] if refused else ALLOWED


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads((PROFILES / "default.json").read_text())


@pytest.fixture(scope="module")
def filters(document: Any) -> seccomp.Filters:
    return seccomp.compile(seccomp.parse(document))


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.json")), ids=lambda path: path.name)
def test_every_shipped_profile_compiles_and_is_named_as_its_file(path: Path) -> None:
    profile = seccomp.load(path)
    assert profile.name == path.stem
    assert len(seccomp.compile(profile).programs) == 2
    assert all(group.reason.endswith(".") for group in profile.groups)


def test_compiling_twice_gives_the_same_digest_and_another_profile_another(document: Any) -> None:
    first = seccomp.compile(seccomp.parse(document))
    assert first.digest == seccomp.compile(seccomp.parse(document)).digest
    changed = copy.deepcopy(document)
    changed["ioctl_refused"].pop()
    assert seccomp.compile(seccomp.parse(changed)).digest != first.digest


def test_other_architectures_and_x32_are_refused_for_every_number(filters: seccomp.Filters) -> None:
    for number in range(460):
        assert verdict(filters, number, arch=0x40000003) == "ENOSYS"  # i386, the way of int 0x80
        assert verdict(filters, number, arch=0xC00000B7 if NATIVE == 0xC000003E else 0xC000003E) == "ENOSYS"
        if NATIVE == 0xC000003E:
            assert verdict(filters, number | 0x40000000) == "ENOSYS"


def test_numbers_above_the_profile_do_not_exist(filters: seccomp.Filters, document: Any) -> None:
    for number in (*range(document["highest_number"] + 1, 1200), 0x3FFFFFFF, -1, -(2**31)):
        assert verdict(filters, number) == "ENOSYS"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
def test_pid_1_may_wait_and_end_and_little_else(filters: seccomp.Filters) -> None:
    allowed = {number for number in range(512) if run(filters.init, number) == 0x7FFF0000}
    assert {60, 61, 231} <= allowed, "exit, wait4, exit_group"
    assert len(allowed) == len(seccomp.INIT_CALLS)
    assert all(run(filters.programs[0], number) == 0x7FFF0000 for number in allowed), "nothing that agents may not"
    refused = {"open": 2, "openat": 257, "connect": 42, "clone": 56, "execve": 59, "kill": 62, "prctl": 157, "dup": 32}
    assert not allowed & set(refused.values())
    assert run(filters.init, 61, arch=0x40000003) & 0xFFFF == errno.ENOSYS


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
def test_each_program_alone_would_not_be_enough(filters: seccomp.Filters) -> None:
    """The twin of the stack: which of the two refuses what."""
    main, second = filters.programs
    tiocsti, ioctl, ptrace = 0x5412, 16, 101
    assert run(main, ioctl, (0, tiocsti)) == 0x7FFF0000
    assert run(second, ioctl, (0, tiocsti)) & 0xFFFF == errno.EPERM
    assert run(second, ptrace) == 0x7FFF0000
    assert run(main, ptrace) & 0xFFFF == errno.EPERM


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
@pytest.mark.parametrize("high", [0, 1 << 32, 0xFFFFFFFF << 32])
def test_the_request_of_an_ioctl_is_judged_by_its_low_bits(filters: seccomp.Filters, high: int) -> None:
    for request in (0x5412, 0x541C, 0x541D, 0x5423):
        assert verdict(filters, 16, (0, request | high)) == "EPERM"
    for request in (0x5411, 0x5413, 0x5401, 0x5421):
        assert verdict(filters, 16, (0, request | high)) == ALLOWED


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
def test_set_id_bits_are_refused_in_every_mode_and_only_there(filters: seccomp.Filters) -> None:
    chmod, fchmod, fchmodat, creat, mkdir, mkdirat = 90, 91, 268, 85, 83, 258
    for bits in (0o4755, 0o2755, 0o6000, 0o4755 | 0xFFFF0000, 0o2000 | 1 << 40):
        for call in (chmod, fchmod, creat, mkdir):
            assert verdict(filters, call, (0, bits)) == "EPERM"
        for call in (fchmodat, mkdirat):
            assert verdict(filters, call, (0, 0, bits)) == "EPERM"
    for bits in (0o755, 0o1777, 0o000):
        assert verdict(filters, chmod, (0, bits)) == verdict(filters, fchmodat, (0, 0, bits)) == ALLOWED
    create, temporary, write = 0o100, 0o20000000, 0o1
    for flags in (create, temporary, create | write, create | 1 << 50):
        assert verdict(filters, 2, (0, flags, 0o4755)) == verdict(filters, 257, (0, 0, flags, 0o2755)) == "EPERM"
        assert verdict(filters, 2, (0, flags, 0o644)) == verdict(filters, 257, (0, 0, flags, 0o644)) == ALLOWED
    # Without O_CREAT the register holds whatever was there before.
    assert verdict(filters, 2, (0, write, 0o6777)) == verdict(filters, 257, (0, 0, write, 0o6777)) == ALLOWED
    for kind in (0o020000, 0o060000, 0o104755, 0o012000):
        assert verdict(filters, 133, (0, kind)) == verdict(filters, 259, (0, 0, kind)) == "EPERM"
    for kind in (0o100644, 0o010600, 0o140600, 0o644):
        assert verdict(filters, 133, (0, kind)) == verdict(filters, 259, (0, 0, kind)) == ALLOWED


@pytest.mark.skipif(platform.machine() != "x86_64", reason="numbers of x86_64")
def test_sockets_are_those_of_the_list_and_no_others(filters: seccomp.Filters) -> None:
    nonblocking = 0o4000 | 0o2000000
    good = {(1, 1, 0), (1, 2, 0), (1, 5, 0), (2, 1, 0), (2, 1, 6), (2, 2, 0), (2, 2, 17), (16, 2, 0), (16, 3, 0)}
    for family in range(48):
        for kind in range(1, 11):
            for protocol in (0, 1, 2, 6, 17, 132, 136, 255, 262):
                expected = ALLOWED if (family, kind, protocol) in good else "EPERM"
                if family == 1 or (family == 16 and protocol == 0):
                    expected = ALLOWED
                elif family == 10:
                    expected = "EAFNOSUPPORT"
                elif family == 2 and protocol == 262:
                    expected = "EPROTONOSUPPORT"
                for flags in (0, nonblocking):
                    got = verdict(filters, 41, (family, kind | flags, protocol))
                    assert got == expected, (family, kind, protocol, flags)
    assert verdict(filters, 53, (1, 1, 0)) == ALLOWED
    assert verdict(filters, 53, (2, 1, 0)) == "EPERM"


BAD: list[tuple[str, Any, str]] = [
    ("default", "EPERMM", "default: EPERMM is no errno name"),
    ("name", "", "name: must be a text"),
    ("highest_number", -1, "highest_number: must be a number"),
    ("highest_number", True, "highest_number: must be a number"),
    ("groups", {}, "groups: must be a list"),
    ("groups", [{"name": "x"}], r"groups\[0\]: reason is missing"),
    ("surprise", 1, "unknown key 'surprise'; known are name, default"),
    ("ioctl_refused", [{"name": "x", "request": "0x1ffffffff", "reason": "r"}], "request: must be a number"),
]


@pytest.mark.parametrize(("key", "value", "message"), BAD)
def test_a_wrong_profile_is_refused_by_place(document: Any, key: str, value: Any, message: str) -> None:
    with pytest.raises(seccomp.InvalidProfile, match=message):
        seccomp.parse({**document, key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"calls": []}, "at least one call"),
        ({"calls": ["read", "read"]}, "none twice"),
        ({"action": "permit"}, "permit is no errno name"),
        ({"when": [{"argument": 6, "mask": 1, "equals": 0}]}, "argument: must be a number from 0 to 5"),
        ({"when": [{"argument": 0, "mask": "0x1", "equals": "0x2"}]}, "can never hold"),
        ({"when": [{"argument": 0, "mask": "1x", "equals": 0}]}, "mask: must be a number"),
    ],
)
def test_a_wrong_group_is_refused_by_place(document: Any, change: dict[str, Any], message: str) -> None:
    group = {"name": "g", "reason": "r", "action": "allow", "calls": ["getpid"], **change}
    with pytest.raises(seccomp.InvalidProfile, match=message):
        seccomp.parse({**document, "groups": [group]})


def test_a_condition_beside_an_unconditional_rule_is_refused(document: Any) -> None:
    """Libseccomp takes both and drops the condition in silence."""
    plain = {"name": "a", "reason": "r", "action": "allow", "calls": ["ioctl"]}
    when = {**plain, "name": "b", "action": "EACCES", "when": [{"argument": 1, "mask": "0xff", "equals": 1}]}
    for groups in ([plain, when], [when, plain], [plain, {**plain, "name": "c"}]):
        with pytest.raises(seccomp.InvalidProfile, match="ioctl is in group"):
            seccomp.parse({**document, "groups": groups})


def test_a_file_that_is_no_profile_is_named_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{\n "name": }')
    with pytest.raises(seccomp.InvalidProfile, match=r"x\.json:2: "):
        seccomp.load(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(seccomp.InvalidProfile, match="not UTF-8"):
        seccomp.load(file)
    file.write_bytes(b" " * (seccomp.PROFILE_BYTES_MAX + 1))
    with pytest.raises(seccomp.InvalidProfile, match="larger than"):
        seccomp.load(file)
    with pytest.raises(seccomp.InvalidProfile, match="cannot read seccomp profile"):
        seccomp.load(tmp_path / "none.json")


def test_a_call_this_libseccomp_does_not_know_is_reported_and_stays_refused(document: Any) -> None:
    groups = [{"name": "future", "reason": "r", "action": "allow", "calls": ["getpid", "call_of_the_year_2040"]}]
    filters = seccomp.compile(seccomp.parse({**document, "groups": groups}))
    assert filters.unknown == ("call_of_the_year_2040",)


USER_NOTIF = 0x7FC00000


@pytest.mark.parametrize("execs", [False, True])
@pytest.mark.parametrize("refusals", [False, True])
def test_what_is_told_asks_and_everything_else_is_answered_as_before(
    document: Any, filters: seccomp.Filters, *, execs: bool, refusals: bool
) -> None:
    told = seccomp.compile(seccomp.parse(document), execs=execs, refusals=refusals)
    asked = set()
    for number in range(document["highest_number"] + 20):
        before = [run(program, number) for program in filters.programs]
        after = [run(program, number) for program in told.programs]
        assert after[1] == before[1], "only the program with the listener may ask"
        if after[0] == USER_NOTIF:
            asked.add(seccomp.call_name(number))
            assert before[0] in (0x7FFF0000, 0x00050000 | errno.EPERM)
        else:
            assert after[0] == before[0]
    assert (set(seccomp.EXEC_CALLS) <= asked) is execs
    assert ({"mount", "ptrace", "bpf", "setns", "keyctl", "init_module", "io_uring_setup"} <= asked) is refusals
    assert not asked & {"read", "sendmsg", "openat2", "clone3", "exit_group"}
    assert (told.digest == filters.digest) is not (execs or refusals)


def test_numbers_that_agents_make_up_have_no_name_and_do_no_harm() -> None:
    assert seccomp.call_name(0) == "read"
    assert [seccomp.call_name(number) for number in (400, 2**31 - 1, -7)] == ["400", str(2**31 - 1), "-7"]


@pytest.mark.parametrize("told", [{"execs": True}, {"refusals": True}])
def test_things_are_told_only_where_the_watcher_knows_the_answer(document: Any, told: dict[str, bool]) -> None:
    """It lets every exec go on, and refuses the rest with EPERM: it knows no profile."""
    other = seccomp.parse({**document, "default": "ENOSYS"})
    with pytest.raises(seccomp.InvalidProfile, match="default is not EPERM"):
        seccomp.compile(other, **told)
    seccomp.compile(other)
    for refused in ([], [{"argument": 2, "mask": 1, "equals": 0}]):
        groups = [
            {**group, "calls": [call for call in group["calls"] if call != "execveat"] or ["read"]}
            for group in document["groups"]
        ]
        if refused:
            groups.append({"name": "x", "reason": "x", "action": "allow", "calls": ["execveat"], "when": refused})
        without = seccomp.parse({**document, "groups": groups})
        with pytest.raises(seccomp.InvalidProfile, match="execveat is not always allowed"):
            seccomp.compile(without, **told)
        seccomp.compile(without)
