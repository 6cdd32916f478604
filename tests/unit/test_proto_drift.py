"""The stubs are what the protos say, and the protos are what buf calls well-formed and compatible."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from stockade.v1 import (
    actions_pb2,
    agents_pb2,
    changes_pb2,
    grants_pb2,
    policies_pb2,
    registry_pb2,
    requests_pb2,
    system_pb2,
)

from supervisord.callers import METHOD_ROLES

PROTO = Path(__file__).resolve().parents[2] / "proto"
BUF = Path(sys.executable).with_name("buf")


def run(*command: str | Path, cwd: Path = PROTO) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)


def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PROTO, tmp_path / "proto"))


def test_the_stubs_are_what_the_protos_say() -> None:
    found = run(sys.executable, "generate", "--check")
    assert (found.returncode, found.stderr) == (0, "")


def test_a_proto_changed_alone_is_found(tmp_path: Path) -> None:
    copied = copy(tmp_path)
    proto = copied / "stockade/v1/grants.proto"
    proto.write_text(proto.read_text().replace("string reason = 11;", "string reason = 11;\n  string more = 99;"))
    found = run(sys.executable, "generate", "--check", cwd=copied)
    assert found.returncode == 1
    assert "stockade/v1/grants_pb2.py is not what its .proto says" in found.stderr
    assert run(sys.executable, "generate", cwd=copied).returncode == 0
    assert run(sys.executable, "generate", "--check", cwd=copied).returncode == 0


def test_buf_finds_nothing() -> None:
    found = run(BUF, "lint")
    assert (found.returncode, found.stdout) == (0, "")


def test_buf_would_find_a_break_and_a_bad_name(tmp_path: Path) -> None:
    copied = copy(tmp_path)
    proto = copied / "stockade/v1/grants.proto"
    assert run(BUF, "breaking", "--against", PROTO, cwd=copied).returncode == 0
    proto.write_text(proto.read_text().replace("string reason = 11;", "string Reason = 99;"))
    assert "FIELD_LOWER_SNAKE_CASE" in run(BUF, "lint", "--error-format", "json", cwd=copied).stdout
    assert "reason" in run(BUF, "breaking", "--against", PROTO, cwd=copied).stdout


def test_every_method_has_a_role_and_no_other_has() -> None:
    protos = (
        actions_pb2, agents_pb2, changes_pb2, grants_pb2, policies_pb2, registry_pb2, requests_pb2, system_pb2
    )  # fmt: skip
    served = {
        f"/{service.full_name}/{method.name}"
        for proto in protos
        for service in proto.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    assert {method for method in METHOD_ROLES if method.startswith("/stockade.")} == served
