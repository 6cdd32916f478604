"""What is shipped beside the code says what the code says."""

from __future__ import annotations

import configparser
import re
from dataclasses import replace
from pathlib import Path

import pytest

import supervisord
from supervisord.config import Config
from supervisord.config_reader import parse_config

HERE = Path(supervisord.__file__).parent
EXAMPLE = (HERE / "stockade.example.toml").read_text()
UNITS = HERE / "systemd"


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign, assignment]  # keys of units are case-sensitive
    parser.read_string((UNITS / name).read_text())
    return parser


def test_the_example_configuration_is_the_defaults() -> None:
    assert replace(parse_config(EXAMPLE, source="example"), source="") == Config()


def test_every_example_in_it_is_a_line_that_works() -> None:
    config = parse_config(re.sub(r"^#(?=[^ ])", "", EXAMPLE, flags=re.MULTILINE), source="example")
    assert [model.name for model in config.gateway.models] == ["claude-*"]
    assert dict(config.gateway.hosts) == {"wiki.example.internal": "10.0.0.5:443"}
    assert list(config.control.roles) == ["cn:orchestrator"]


def test_units_and_configuration_name_the_same_places_and_users() -> None:
    assert unit("stockaded.socket")["Socket"]["ListenStream"] == str(Config().run_dir / "control.sock")
    assert unit("stockaded.socket")["Socket"]["SocketGroup"] == Config().control.group
    users = (UNITS / "stockade.sysusers.conf").read_text()
    for name in (Config().users.egress, Config().users.dialer, Config().users.gateway):
        assert f"u {name}" in " ".join(users.split())
    directories = (UNITS / "stockade.tmpfiles.conf").read_text()
    assert f"d {Config().run_dir} " in " ".join(directories.split()) + " "
    assert str(Config().state_dir) in directories


@pytest.mark.parametrize("name", ["stockaded.service", "stockade-launcher.service"])
def test_no_unit_that_handles_workspaces_has_a_mount_namespace_of_its_own(name: str) -> None:
    # open_tree(2) refuses to clone a mount of another namespace: workspaces could not be bound.
    makes_one = {"PrivateTmp", "PrivateDevices", "PrivateMounts", "TemporaryFileSystem", "BindPaths", "RootDirectory"}
    makes_one |= {"ReadOnlyPaths", "ReadWritePaths", "InaccessiblePaths", "NoExecPaths", "MountFlags", "DynamicUser"}
    keys = set(unit(name)["Service"])
    assert not {key for key in keys if key in makes_one or (key.startswith("Protect") and key != "ProtectHostname")}


def test_a_restart_of_one_unit_does_not_reach_the_next() -> None:
    assert "Requires" not in unit("stockade-agents.service")["Unit"]
    assert unit("stockade-launcher.service")["Unit"]["Requires"] == "stockade-agents.service"
    assert "stockade-launcher" not in unit("stockaded.service")["Unit"].get("Requires", "")
    assert unit("stockade-agents.service")["Service"]["Delegate"] == "cpu io memory pids"
