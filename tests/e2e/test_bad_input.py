"""Bad input at every border: a clear answer that names place and remedy, and nothing half-started left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from stockade.client import Conflict, InvalidArgument, NotFound, Selector, Stockade, StockadeError
from stockade.v1 import (
    actions_pb2,
    actions_pb2_grpc,
    agents_pb2,
    agents_pb2_grpc,
    grants_pb2,
    grants_pb2_grpc,
    requests_pb2,
    requests_pb2_grpc,
)

from tests.support.census import Census, census, settled
from tests.support.instance import Instance, bin_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: runs the daemon")


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start() as instance:
        yield instance


@pytest.fixture(scope="module")
def client(stockade: Instance) -> Iterator[Stockade]:
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as connected:
        assert connected.verify_log().ok
        yield connected


@pytest.fixture(scope="module")
def reference(stockade: Instance, client: Stockade) -> tuple[object, ...]:
    client.launch(["true"]).wait(20)
    return lasting(settled(stockade))


def lasting(seen: Census) -> tuple[object, ...]:
    return seen.processes, seen.cgroups, seen.networks, seen.slots, seen.files, seen.mounts, seen.links


@pytest.fixture(autouse=True)
def nothing_left(stockade: Instance, client: Stockade, reference: tuple[object, ...]) -> Iterator[None]:
    """Whatever a test sends, there is afterwards what there was before."""
    yield
    assert client.agents() == []
    stockade.wait(lambda: lasting(census(stockade)) == reference, 20)
    assert lasting(census(stockade)) == reference


# --- configuration


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('instanse = "x"\n', 1, ("instanse", "instance")),
        ('instance = "x"\nrun_dir = 5\n', 2, ("run_dir",)),
        ('instance = "x"\n[gateway]\nkind = "nosuch"\n', 3, ("kind", "embedded", "litellm")),
        ('[gateway]\nkind = "litellm"\nurl = "ftp://x"\n', 3, ("url",)),
        ("instance = \n", 1, ()),
        ('instance = "x"\ninstance = "y"\n', 2, ()),
        ('instance = "../x"\n', 1, ("instance",)),
        ('[log]\ndurability = "sometimes"\n', 2, ("durability", "strict")),
        ('[gateway]\nkind = "embedded"\n[gateway.hosts]\n"x" = "nowhere"\n', 4, ("x",)),
    ],
)
def test_a_wrong_configuration(tmp_path: Path, text: str, line: int, words: tuple[str, ...]) -> None:
    config = tmp_path / "stockade.toml"
    config.write_text(text)
    # `--check` starts nothing, also where a test expects too much.
    done = subprocess.run(
        [bin_dir() / "stockaded", "--config", config, "--check"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"{config}:{line}" in done.stderr, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shared", ["run_dir", "instance", "both"])
def test_a_second_daemon_takes_nothing_from_the_first(stockade: Instance, tmp_path: Path, shared: str) -> None:
    """It used to end the first one's egress processes, or its agents and their ranges of uids, as leftovers."""
    agent = stockade.launch("--name", "first", "--", "sleep", "1000")
    before = [(path.name, path.read_text()) for path in sorted((stockade.run_dir / "processes").glob("*.json"))]
    config = tmp_path / "second.toml"
    run_dir = stockade.run_dir if shared != "instance" else stockade.directory / "run"
    name = stockade.name if shared != "run_dir" else f"{stockade.name}b"
    config.write_text(f'instance = "{name}"\nstate_dir = "{tmp_path}/state"\nrun_dir = "{run_dir}"\n')
    second = subprocess.run(
        [bin_dir() / "stockaded", "--config", config], capture_output=True, text=True, check=False, timeout=30
    )
    assert second.returncode == 1
    assert "another stockaded" in second.stderr
    assert (str(run_dir) in second.stderr) == (shared != "instance")
    after = [(path.name, path.read_text()) for path in sorted((stockade.run_dir / "processes").glob("*.json"))]
    assert after == before != []
    assert stockade.json("status", agent["agent_id"])[0]["state"] == "RUNNING"
    assert stockade.run("curl -sS -o /dev/null $OPENAI_BASE_URL/models").code == 0
    stockade.ctl("kill", "--all")


def test_a_name_is_free_again_when_its_daemon_has_gone(tmp_path: Path) -> None:
    with Instance.start() as instance:
        for number in (signal.SIGKILL, signal.SIGTERM):
            instance.down(number)
            instance.up()
        assert instance.ctl("run", "--", "true").code == 0
    with Instance.start(state_dir=str(tmp_path)) as other:
        assert other.ctl("run", "--", "true").code == 0


def test_a_wrong_configuration_starts_nothing(stockade: Instance) -> None:
    wrong = stockade.directory / "wrong.toml"
    wrong.write_text(stockade.config.read_text() + "frob = 1\n")
    done = subprocess.run(
        [bin_dir() / "stockaded", "--config", wrong], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 2
    assert "frob" in done.stderr


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [bin_dir() / "stockaded", "--config", tmp_path / "none.toml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "none.toml" in done.stderr


def test_a_directory_that_cannot_be_used(stockade: Instance) -> None:
    (stockade.directory / "file").write_text("")
    config = stockade.directory / "unusable.toml"
    config.write_text(
        f'instance = "{stockade.name}b"\n'
        f'state_dir = "{stockade.directory}/file/state"\nrun_dir = "{stockade.run_dir}/b"\n'
    )
    done = subprocess.run(
        [bin_dir() / "stockaded", "--config", config], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert "file/state" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (stockade.run_dir / "b").exists()


def test_a_second_daemon_of_the_same_instance_is_refused(stockade: Instance) -> None:
    agent = stockade.launch("--", "sleep", "1000")
    done = subprocess.run(
        [bin_dir() / "stockaded", "--config", stockade.config], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert stockade.json("status", agent["agent_id"])[0]["state"] == "RUNNING"
    assert stockade.ctl("run", "--", "true").code == 0
    stockade.json("kill", agent["agent_id"])
    assert stockade.json("log", "verify")["ok"] is True


# --- policies and definitions

POLICY = "kind: Policy\nname: given\nversion: 1\nextends: default\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (POLICY + "limts: {memory: 1GiB}\n", 5, ("limts", "limits")),
        (POLICY + "limits: {memory: much}\n", 5, ("memory", "much")),
        (POLICY + "limits: {memory: 900GiB}\n", 5, ("memory", "widen")),
        (POLICY + 'scopes: ["nonsense"]\n', 5, ("nonsense",)),
        (POLICY + 'scopes: ["http:GET:ftp://x/"]\n', 5, ("ftp",)),
        (POLICY + "scopes: [\n", 6, ()),
        (POLICY + "\tlimits: 1\n", 5, ()),
        ("kind: Nothing\n", 1, ("kind",)),
        ("kind: Policy\nname: UPPER\nversion: 1\n", 2, ("name",)),
        ("kind: Policy\nname: given\nversion: 1\nextends: no-such\n", 4, ("no-such",)),
        (
            "kind: Agent\nname: a\nversion: 1\ncommand: [sh]\nworkspace: {path: /x, mode: sideways}\n",
            5,
            ("sideways",),
        ),
        ("a: &a [*a]\n", 1, ()),
        ("- 1\n- 2\n", 1, ()),
        ("", 0, ("object",)),
    ],
)
def test_a_wrong_policy(stockade: Instance, tmp_path: Path, text: str, line: int, words: tuple[str, ...]) -> None:
    path = tmp_path / "given.yaml"
    path.write_text(text)
    done = stockade.ctl("policy", "check", str(path))
    assert done.code == 1, done
    assert (f"{path}:{line}" if line else str(path)) in done.err, done.err
    for word in words:
        assert word in done.err, done.err
    found = stockade.ctl("-o", "json", "policy", "check", str(path))
    assert found.code == 1
    assert found.json()["ok"] is False
    assert {"filename", "line", "key", "message", "remedy"} <= found.json()["problems"][0].keys()


def test_a_file_that_is_no_usable_policy_is_listed_and_told_of(stockade: Instance) -> None:
    """It used to vanish: `policy list` showed the others, and a launch said that there is none."""
    wider = stockade.directory / "policies" / "wider.yaml"
    misnamed = stockade.directory / "policies" / "misnamed.yaml"
    check = [str(bin_dir() / "stockaded"), "--config", str(stockade.config), "--check"]
    assert [entry["problem"] for entry in stockade.json("policy", "list")] == [""] * 6
    wider.write_text("kind: Policy\nname: wider\nextends: default\nlimits: {memory: 4GiB}\n")
    misnamed.write_text("kind: Policy\nname: other\nextends: default\n")
    daemon = stockade.process
    assert daemon is not None
    try:
        daemon.send_signal(signal.SIGHUP)
        stockade.wait(lambda: str(misnamed) in stockade.ctl("policy", "list").err)
        done = stockade.ctl("policy", "list")
        assert done.code == 0
        assert f"{misnamed} is no usable policy" in done.err
        assert "limits.memory: wider than in default" in done.err
        assert "other" not in done.out
        listed = {entry["name"]: entry["problem"] for entry in stockade.json("policy", "list")}
        assert "wider than in default" in listed["wider"]
        assert "the file is misnamed.yaml" in listed["misnamed"]
        assert listed["default"] == ""
        for name, word in (("wider", "wider than"), ("other", str(misnamed))):
            refused = stockade.ctl("launch", "--policy", name, "--", "true")
            assert refused.code in {2, 3}
            assert word in refused.err
        assert "a policy cannot be used" in stockade.daemon_log()
        judged = subprocess.run(check, capture_output=True, text=True, check=False, timeout=60)
        assert judged.returncode == 1
        assert str(misnamed) in judged.stderr
    finally:
        wider.unlink()
        misnamed.unlink()
        daemon.send_signal(signal.SIGHUP)
        stockade.wait(lambda: stockade.ctl("policy", "list").err == "")
    assert subprocess.run(check, capture_output=True, check=False, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (
            '[gateway]\nkind = "openai"\nurl = "http://127.0.0.1:4000"\ncredential_file = "/nonexistent/key"\n',
            "credential",
        ),
        ('[gateway]\nkind = "embedded"\ncredential_file = "/nonexistent/key"\n', ""),  # not for embedded
        ('run_dir = "/etc/passwd/run"\n', "run_dir"),
    ],
)
def test_the_check_judges_what_the_file_names(tmp_path: Path, text: str, word: str) -> None:
    config = tmp_path / "stockade.toml"
    config.write_text(f'state_dir = "{tmp_path}/state"\n{text}')
    done = subprocess.run(
        [bin_dir() / "stockaded", "--config", config, "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, word in done.stderr, "Traceback" in done.stderr) == (1 if word else 0, True, False)
    assert list(tmp_path.iterdir()) == [config]


def test_a_right_policy_is_good(stockade: Instance, tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_text(POLICY + "limits: {memory: 512MiB}\n")
    assert stockade.ctl("policy", "check", str(tmp_path / "given.yaml")).code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: Agent\nname: a\nversion: 1\ncommandd: [true]\n", ("agent.yaml:4", "commandd", "command")),
        ("kind: Agent\nname: a\nversion: 1\ncommand: [sh]\npolicy: no-such\n", ("no-such",)),
        ("kind: Agent\nname: ../a\nversion: 1\ncommand: [sh]\n", ("agent.yaml:2", "name")),
        ("kind: Policy\nname: a\nversion: 1\n", ("Agent",)),
        ("kind: Agent\nname: a\nversion: 1\ncommand: [sh]\nworkspace: {path: nowhere, mode: ro}\n", ("nowhere",)),
        ("\x00\x01", ("agent.yaml",)),
        ("!!python/object/apply:os.system ['true']\n", ("agent.yaml:1",)),
    ],
)
def test_a_wrong_definition(stockade: Instance, tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    (tmp_path / "agent.yaml").write_text(text)
    done = stockade.ctl("launch", "-f", str(tmp_path / "agent.yaml"))
    assert done.code in (2, 3)
    for word in words:
        assert word in done.err, done.err
    assert stockade.ctl("launch", "-f", str(tmp_path / "none.yaml")).code == 2


# --- scopes, ids, paths


@pytest.mark.parametrize(
    "scope",
    [
        "", "nonsense", "llm:", "http:GET:https://", "http:GET:https://user@x/", "http:G T:https://x/", "http:GET:x",
        "tls:x", "tls:x:99999", "fs:ro:relative", "fs:rw:/../etc", "fs:xx:/tmp", "mcp:", "http:GET:https://x/#f",
        "http:GET:https://\u0430pple.example/", "llm:a\x1b[2J", "http:GET:http://x:70000/", "http:GET:https://x/\\@y",
    ],
)  # fmt: skip
def test_a_wrong_scope_is_no_grant(stockade: Instance, client: Stockade, scope: str) -> None:
    agent = client.launch(["sleep", "1000"])
    try:
        before = {grant.scope for grant in client.grants(agent.agent_id)}
        with pytest.raises(StockadeError) as caught:
            client.grant(agent.agent_id, scope)
        assert isinstance(caught.value, InvalidArgument)
        assert caught.value.remedy
        assert "\x1b" not in str(caught.value)
        assert {grant.scope for grant in client.grants(agent.agent_id)} == before
        with pytest.raises(InvalidArgument):
            client.launch(["true"], scopes=[scope])
    finally:
        agent.kill()
    assert stockade.json("log", "verify")["ok"] is True


@pytest.mark.parametrize("agent_id", ["ag_", "ag_" + "A" * 26, "../../etc", "ag_" + "a" * 27, "gr_" + "a" * 26, "x\n"])
def test_a_wrong_id_is_no_agent(client: Stockade, agent_id: str) -> None:
    with pytest.raises(InvalidArgument):
        client.launch(["true"], agent_id=agent_id)
    with pytest.raises((NotFound, InvalidArgument)):
        client.agent(agent_id)
    with pytest.raises((NotFound, InvalidArgument)):
        client.kill_all(Selector(agents=(agent_id,)))


def test_a_grant_of_nothing_or_for_ever_negative(client: Stockade) -> None:
    agent = client.launch(["sleep", "1000"])
    try:
        for terms in ({"ttl": -1.0}, {"ttl": 0.0}, {"max_uses": -1}, {"ttl": 1e300}):
            with pytest.raises((InvalidArgument, OverflowError, ValueError)):
                client.grant(agent.agent_id, "llm:x", **terms)
    finally:
        agent.kill()


@pytest.mark.parametrize("kind", ["link", "fifo", "device", "socket", "relative", "dots"])
def test_a_workspace_that_is_no_directory_of_files(stockade: Instance, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "given"
    match kind:
        case "link":
            target.symlink_to("/etc")
        case "fifo":
            os.mkfifo(target)
        case "device":
            target = Path("/dev/null")
        case "socket":
            target = stockade.run_dir / "control.sock"
        case "relative":
            done = stockade.ctl("launch", "--workspace", "no/such", "--", "true")
            assert done.code in (2, 3)
            return
        case _:
            target = tmp_path / ".." / "x"
    done = stockade.ctl("launch", "--workspace", f"{target}:ro", "--", "ls", "/workspace")
    assert done.code in (2, 3), done
    assert "cannot" in done.err


def test_a_link_inside_a_workspace_is_followed_by_nobody(stockade: Instance) -> None:
    workspace = stockade.workspace(file="x")
    (workspace / "link").symlink_to("/etc/shadow")
    (workspace / "dir").symlink_to("/root")
    done = stockade.run("cat link; ls dir/", "--workspace", f"{workspace}:ro")
    assert (done.code, done.out) == (2, "")
    assert stockade.run("cat file", "--workspace", f"{workspace}:ro").out == "x"


# --- the API itself


def stubs(stockade: Instance) -> tuple[grpc.Channel, agents_pb2_grpc.AgentServiceStub]:
    channel = grpc.insecure_channel(
        f"unix:{stockade.run_dir}/control.sock", options=[("grpc.default_authority", "localhost")]
    )
    return channel, agents_pb2_grpc.AgentServiceStub(channel)


def code_of(caught: pytest.ExceptionInfo[grpc.RpcError]) -> grpc.StatusCode:
    code: grpc.StatusCode = caught.value.code()
    return code


def test_a_message_of_five_megabytes(stockade: Instance, client: Stockade) -> None:
    channel, agents = stubs(stockade)
    with channel:
        with pytest.raises(grpc.RpcError) as caught:
            agents.Launch(agents_pb2.LaunchRequest(spec=agents_pb2.LaunchSpec(command=[b"x" * (5 << 20)])))
        assert code_of(caught) is grpc.StatusCode.RESOURCE_EXHAUSTED
        for spec in (
            agents_pb2.LaunchSpec(command=[b"echo", b"x" * (300 << 10)]),
            agents_pb2.LaunchSpec(command=[b"true"], env={"A": "x" * (300 << 10)}),
            agents_pb2.LaunchSpec(command=[b"true"], labels={f"k{i}": "v" for i in range(100)}),
            agents_pb2.LaunchSpec(command=[b"true"], scopes=[f"llm:m{i}" for i in range(1000)]),
            agents_pb2.LaunchSpec(command=[b"a\0b"]),
            agents_pb2.LaunchSpec(command=[]),
            agents_pb2.LaunchSpec(command=[b""]),
            agents_pb2.LaunchSpec(command=[b"true"], env={"A=B": "x"}),
            agents_pb2.LaunchSpec(command=[b"true"], purpose="\x1b[2J"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                agents.Launch(agents_pb2.LaunchRequest(spec=spec))
            assert code_of(caught) is grpc.StatusCode.INVALID_ARGUMENT
    assert client.launch(["true"]).wait(20).exit_code == 0


def test_an_unspecified_or_unknown_enum(stockade: Instance, tmp_path: Path) -> None:
    channel, agents = stubs(stockade)
    with channel:
        for mode in (agents_pb2.WORKSPACE_MODE_UNSPECIFIED, 99):
            workspace = agents_pb2.Workspace(path=str(tmp_path), mode=mode)  # type: ignore[arg-type]
            spec = agents_pb2.LaunchSpec(command=[b"true"], workspace=workspace)
            with pytest.raises(grpc.RpcError) as caught:
                agents.Launch(agents_pb2.LaunchRequest(spec=spec))
            assert code_of(caught) is grpc.StatusCode.INVALID_ARGUMENT, mode
        agent = agents.Launch(agents_pb2.LaunchRequest(spec=agents_pb2.LaunchSpec(command=[b"true"]))).agent
        with pytest.raises(grpc.RpcError) as caught:
            list(agents.Logs(agents_pb2.LogsRequest(agent=agent.agent_id, streams=[99])))  # type: ignore[list-item]
        assert code_of(caught) is grpc.StatusCode.INVALID_ARGUMENT
        agents.Wait(agents_pb2.WaitRequest(agent=agent.agent_id))


def test_empty_requests_are_refused_and_not_guessed_at(stockade: Instance) -> None:
    stockade.launch("--name", "bystander", "--", "sleep", "1000")
    channel, agents = stubs(stockade)
    grants = grants_pb2_grpc.GrantServiceStub(channel)
    with channel:
        for call in (
            lambda: agents.Launch(agents_pb2.LaunchRequest()),
            lambda: agents.Kill(agents_pb2.KillRequest()),
            lambda: agents.Kill(agents_pb2.KillRequest(selector=agents_pb2.Selector())),
            lambda: agents.Freeze(agents_pb2.FreezeRequest()),
            lambda: agents.Hold(agents_pb2.HoldRequest()),
            lambda: grants.Grant(grants_pb2.GrantRequest()),
            lambda: grants.Revoke(grants_pb2.RevokeRequest()),
            lambda: agents.GetAgent(agents_pb2.GetAgentRequest()),
            lambda: list(agents.Attach(iter([agents_pb2.AttachRequest()]))),
            lambda: list(agents.Exec(iter([agents_pb2.ExecRequest(stdin=b"x")]))),
            lambda: agents.ListAgents(agents_pb2.ListAgentsRequest(page_token="forged")),
            lambda: agents.ListAgents(agents_pb2.ListAgentsRequest(page_size=-1)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert code_of(caught) in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
            assert caught.value.details()
    assert stockade.json("status", "bystander")[0]["state"] == "RUNNING"
    stockade.json("kill", "bystander")


def test_what_is_no_grpc_hurts_nobody(stockade: Instance, client: Stockade) -> None:
    for data in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\0" * 10_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 10_000,
        b"",
    ):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.settimeout(10)
            raw.connect(str(stockade.run_dir / "control.sock"))
            try:
                raw.sendall(data)
                raw.shutdown(socket.SHUT_WR)
                while raw.recv(65536):
                    pass
            except OSError:
                continue
    assert client.verify_log().ok


def test_launches_whose_callers_go_away_end_one_way_or_the_other(stockade: Instance, client: Stockade) -> None:
    channel, agents = stubs(stockade)
    with channel:
        futures = [
            agents.Launch.future(
                agents_pb2.LaunchRequest(
                    spec=agents_pb2.LaunchSpec(command=[b"sleep", b"1000"], labels={"gone": "yes"})
                )
            )
            for _ in range(10)
        ]
        for number, future in enumerate(futures):
            if number % 2:
                future.cancel()
        for future in futures[::2]:
            future.result(timeout=30)
    stockade.wait(lambda: not any(agent.state.value == "STARTING" for agent in client.agents()))
    client.kill_all(Selector(labels={"gone": "yes"}), "tidy")
    assert client.agents(Selector(labels={"gone": "yes"})) == []


def test_many_launches_with_one_key_are_one_agent(client: Stockade) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: client.launch(["sleep", "9"], idempotency_key="k").agent_id, range(8)))
    assert len(set(ids)) == 1
    with pytest.raises(Conflict):
        client.launch(["another"], idempotency_key="k")
    client.agent(ids[0]).kill()


def test_a_launch_that_fails_late_is_in_the_log_as_failed(stockade: Instance) -> None:
    size = stockade.json("log", "verify")["size"]
    assert stockade.ctl("launch", "--name", "late", "--", "/no/such/program").code != 0
    entries = [(entry["verb"], entry["verdict"]) for entry in stockade.actions("--after", str(size))]
    assert entries == [("agent.launch", "allowed"), ("agent.fail", "failed")]
    failed = stockade.json("status", "late")[0]
    assert failed["state"] == "FAILED"
    assert "/no/such/program" in failed["failure"] or "No such file" in failed["failure"]


# --- numbers beyond what there can be


def test_numbers_that_nothing_can_have_are_refused_as_such(stockade: Instance) -> None:
    with grpc.insecure_channel(f"unix:{stockade.run_dir}/control.sock") as channel:
        log, agents = actions_pb2_grpc.ActionServiceStub(channel), agents_pb2_grpc.AgentServiceStub(channel)
        requests = requests_pb2_grpc.RequestServiceStub(channel)
        query, tail = actions_pb2.QueryActionsRequest, actions_pb2.TailActionsRequest
        refused: list[Callable[[], object]] = [
            lambda: log.QueryActions(query(page_size=-1)),
            lambda: log.QueryActions(query(after_seq=2**64 - 1)),
            lambda: log.QueryActions(query(page_token="9" * 5000)),
            lambda: log.QueryActions(query(page_token=str(2**70))),
            lambda: log.QueryActions(query(page_token="\u0663")),
            lambda: log.QueryActions(query(since=Timestamp(seconds=2**62))),
            lambda: log.QueryActions(query(since=Timestamp(seconds=-(2**62), nanos=-5))),
            lambda: next(log.TailActions(tail(after_seq=2**64 - 1), timeout=5)),
            lambda: next(agents.WatchAgents(agents_pb2.WatchAgentsRequest(resume_token="9" * 5000), timeout=5)),
            lambda: next(requests.WatchRequests(requests_pb2.WatchRequestsRequest(resume_token="x"), timeout=5)),
        ]
        done = agents.Launch(
            agents_pb2.LaunchRequest(spec=agents_pb2.LaunchSpec(command=[b"true"], name="numbers")), timeout=20
        )
        logs = [agents_pb2.LogsRequest(agent=done.agent.agent_id, stdout_offset=at) for at in (2**63, 2**64 - 1)]
        refused += [lambda: list(agents.Logs(logs[0], timeout=5)), lambda: list(agents.Logs(logs[1], timeout=5))]
        for number, call in enumerate(refused):
            with pytest.raises(grpc.RpcError) as error:
                call()
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (number, error.value.details())
        # The twin, at the limit: nothing is there, and that is no error.
        assert not log.QueryActions(query(after_seq=2**63 - 1, page_size=2**31 - 1)).actions
        assert not log.QueryActions(query(since=Timestamp(seconds=2**33))).actions
        agents.Wait(agents_pb2.WaitRequest(agent=done.agent.agent_id), timeout=20)


READER = """
import sys, threading
import grpc
from stockade.v1 import actions_pb2, actions_pb2_grpc

channels = [
    grpc.insecure_channel(f"unix:{sys.argv[1]}", options=[("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)
]
streams = [
    actions_pb2_grpc.ActionServiceStub(channel).TailActions(actions_pb2.TailActionsRequest(after_seq=0), timeout=20)
    for channel in channels
    for _ in range(10)
]
codes = []
def first(stream):
    try:
        next(stream)
        codes.append("OK")
    except grpc.RpcError as error:
        codes.append(error.code().name)
threads = [threading.Thread(target=first, args=(stream,)) for stream in streams]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(codes.count("OK"), codes.count("RESOURCE_EXHAUSTED"), len(codes), flush=True)
sys.stdin.read()
"""


def test_one_reader_has_so_many_calls_at_once_and_root_has_its_own() -> None:
    with Instance.start("[control]\nread_only_others = true\n") as stockade:
        reader = subprocess.Popen(
            [sys.executable, "-c", READER, str(stockade.run_dir / "control.sock")],
            user=65534, group=65534, extra_groups=[], cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline().split() == ["16", "24", "40"]
            # Held open, and in nobody's way.
            assert stockade.ctl("status").code == 0
        finally:
            assert reader.stdin is not None
            reader.stdin.close()
            reader.wait(20)
