"""stockade.toml: the documented file loads, and everything else says where it is wrong."""

import contextlib
import dataclasses
import ipaddress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.images.limits import ImageLimits
from supervisord.budgets import Budget, LabelBudget, Period
from supervisord.config import (
    UID_FIRST,
    UID_LAST,
    AgentsConfig,
    Config,
    ControlConfig,
    Durability,
    GatewayConfig,
    GatewayKind,
    Guardrail,
    GuardrailAction,
    GuardrailDirection,
    LogConfig,
    McpServer,
    ModelKind,
    ModelRoute,
    OnStop,
    Role,
    ScratchConfig,
    UsersConfig,
)
from supervisord.config_reader import (
    CONFIG_BYTES_MAX,
    RUN_DIR_BYTES_MAX,
    load_config,
    missing_files,
    parse_config,
)
from supervisord.documents import InvalidDocument
from supervisord.endpoints import is_endpoint
from supervisord.errors import InvalidInput
from supervisord.tables import key_positions

# As the interface contract prints it.
DOCUMENTED = """
instance  = "default"             # prefix of cgroups, namespaces, veths: two instances can share a host
state_dir = "/var/lib/stockade"
run_dir   = "/run/stockade"       # control socket: <run_dir>/control.sock
policy_dirs = ["/etc/stockade/policies"]
[gateway]
kind = "embedded"                 # embedded | litellm | openai
url  = "http://127.0.0.1:4000"    # not for embedded
credential_file = "/etc/stockade/gateway.key"
forward_proxy = ""                # where absolute-form and CONNECT go; empty: the gateway serves LLM and tool APIs only
[log]
durability = "batched"            # batched | strict (see §7)
"""

EVERYTHING = r"""
instance = "t1"
state_dir = "/srv/s"
run_dir = "/srv/r"
policy_dirs = []

[gateway]
kind = "embedded"
probe_seconds = 2
allow_networks = ["10.1.0.0/16", "fd00::/8"]
[gateway.hosts]
"api.example.com" = "10.1.0.5:8080"
plain = "10.1.0.6"
[[gateway.models]]
name = "gpt-*"
kind = "openai"
url = "https://api.example.com/v1"
model = "gpt-x"
key_file = "/etc/stockade/key"
listed = ["gpt-a", "gpt-b"]
responses = false
input_usd_per_mtok = 2
output_usd_per_mtok = 8.5
[[gateway.models]]
name = "small"
kind = "local"
path = "/srv/small.gguf"
context_tokens = 2048
[[gateway.models]]
name = "scripted"
script = "/etc/stockade/script.yaml"

[[gateway.guardrails]]
name = "no-pii"
patterns = ["pii", "jwt"]
action = "mask"
direction = "response"
models = ["gpt-*"]
own = {badge = 'B-\d{6}'}
[[gateway.guardrails]]
name = "no-secrets"
patterns = ["secrets"]
[[gateway.mcp]]
name = "git"
url = "https://mcp.example.com/mcp"
credential_file = "/etc/stockade/mcp.key"

[log]
durability = "strict"
checkpoint_entries = 10
checkpoint_seconds = 5
witness_dir = "/srv/w"
[control]
group = "agents"
read_only_others = true
tcp_listen = "127.0.0.1:7443"
tls_cert = "/c"
tls_key = "/k"
tls_client_ca = "/a"
[control.roles]
"cn:ci" = "operator"
"spiffe://example.com/ns/ops" = "admin"
[users]
egress = "sk-e"
dialer = "sk-d"
gateway = "sk-g"
[agents]
on_stop = "kill"
output_keep = "64MiB"
output_days = 3
uid_range = [1879048192, 1879113727]
[pool]
netns = 0
images = 1
[scratch]
reserve = "1GiB"
preallocate = true
keep_layers = "1d"
[egress]
workers = 2
"""


def parse(text: str) -> Config:
    return parse_config(text, source="s.toml")


def refusal(text: str) -> str:
    with pytest.raises(InvalidDocument) as raised:
        parse(text)
    return str(raised.value)


def test_the_documented_file_is_what_is_assumed_without_one() -> None:
    documented = parse(DOCUMENTED)
    assumed = dataclasses.replace(
        Config(), source="s.toml", gateway=GatewayConfig(credential_file=Path("/etc/stockade/gateway.key"))
    )
    assert documented == assumed
    assert parse("") == dataclasses.replace(Config(), source="s.toml")


def test_every_key_arrives() -> None:
    assert parse(EVERYTHING) == Config(
        instance="t1",
        state_dir=Path("/srv/s"),
        run_dir=Path("/srv/r"),
        policy_dirs=(),
        gateway=GatewayConfig(
            kind=GatewayKind.EMBEDDED,
            models=(
                ModelRoute(
                    name="gpt-*",
                    kind=ModelKind.OPENAI,
                    url="https://api.example.com/v1",
                    model="gpt-x",
                    key_file=Path("/etc/stockade/key"),
                    listed=("gpt-a", "gpt-b"),
                    responses=False,
                    input_usd_per_mtok=2,
                    output_usd_per_mtok=8.5,
                ),
                ModelRoute("small", ModelKind.LOCAL, path=Path("/srv/small.gguf"), context_tokens=2048),
                ModelRoute("scripted", ModelKind.SCRIPTED, script=Path("/etc/stockade/script.yaml")),
            ),
            guardrails=(
                Guardrail(
                    "no-pii",
                    GuardrailAction.MASK,
                    GuardrailDirection.RESPONSE,
                    ("pii", "jwt"),
                    {"badge": r"B-\d{6}"},
                    ("gpt-*",),
                ),
                Guardrail("no-secrets", GuardrailAction.BLOCK, GuardrailDirection.BOTH, ("secrets",)),
            ),
            mcp=(McpServer("git", "https://mcp.example.com/mcp", Path("/etc/stockade/mcp.key")),),
            probe_seconds=2,
            hosts={"api.example.com": "10.1.0.5:8080", "plain": "10.1.0.6"},
            allow_networks=(ipaddress.ip_network("10.1.0.0/16"), ipaddress.ip_network("fd00::/8")),
        ),
        log=LogConfig(Durability.STRICT, 10, 5, Path("/srv/w")),
        control=ControlConfig(
            group="agents",
            read_only_others=True,
            tcp_listen="127.0.0.1:7443",
            tls_cert=Path("/c"),
            tls_key=Path("/k"),
            tls_client_ca=Path("/a"),
            roles={"cn:ci": Role.OPERATOR, "spiffe://example.com/ns/ops": Role.ADMIN},
        ),
        users=UsersConfig("sk-e", "sk-d", "sk-g"),
        agents=AgentsConfig(OnStop.KILL, 1879048192, 1879113727, 64 << 20, 3),
        scratch=ScratchConfig(1 << 30, preallocate=True, keep_layers_seconds=86400.0),
        pool_netns=0,
        pool_images=1,
        egress_workers=2,
        source="s.toml",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('instnce = "x"', "s.toml:1:1: instnce: unknown key; did you mean instance?"),
        ("\n\n[gateway]\n  knd = 1", "s.toml:4:3: gateway.knd: unknown key; did you mean kind?"),
        ("[gatway]", "s.toml:1:1: gatway: unknown key; did you mean gateway?"),
        ("gateway.knd = 1", "s.toml:1:1: gateway.knd: unknown key"),
        ("gateway = 1", "s.toml:1:1: gateway: is not a table"),
        ("log = { durabilty = 1 }", "s.toml:1:1: log.durabilty: unknown key; did you mean durability?"),
        (
            '[gateway]\nkind = "litelm"',
            "s.toml:2:1: gateway.kind: 'litelm' is none of embedded, litellm, openai; did you",
        ),
        ('instance = "../x"', "s.toml:1:1: instance: cannot use instance name"),
        ('[[budgets]]\nlabel = "team=a"', "s.toml:1:1: budgets[0]: bounds nothing"),
        ("[[budgets]]\nrequests = 1", "s.toml:1:1: budgets[0].label: cannot use label key"),
        ('[[budgets]]\nlabel = "team"\nrequests = 1', "s.toml:2:1: budgets[0].label: 'team' is not of the form"),
        ('[[budgets]]\nlabel = "team=a"\nrequests = -1', "s.toml:1:1: budgets[0]: cannot use budget requests"),
        ('[[budgets]]\nlabel = "team=a"\nwall_clock = "1h"', "budgets[0].wall_clock: unknown key"),
        ('[[budgets]]\nlabel = "team=a"\nrequests = 1\nperiod = "week"', "s.toml:4:1: budgets[0].period: 'week'"),
        (
            '[[budgets]]\nlabel = "team=a"\nrequests = 1\n[[budgets]]\nlabel = "team=a"\nrequests = 2',
            "s.toml:5:1: budgets[1].label: 'team=a' has two budgets of one period",
        ),
        ("instance = 5", "s.toml:1:1: instance: '5' is not a text"),
        ('run_dir = "relative"', "s.toml:1:1: run_dir: 'relative' is not an absolute path"),
        ('run_dir = "/a/../b"', "run_dir: "),
        ('run_dir = ""', "run_dir: is empty or /"),
        ('state_dir = "/"', "state_dir: is empty or /"),
        ('state_dir = "/run/stockade"', "is state_dir too"),
        (f'run_dir = "/{"x" * RUN_DIR_BYTES_MAX}"', "run_dir: is longer than 60 bytes"),
        ('policy_dirs = [\n"/a",\n"b"]', "s.toml:1:1: policy_dirs[1]: 'b' is not an absolute path"),
        ('policy_dirs = "/a"', "policy_dirs: is not a list"),
        ('[gateway]\nkind="openai"\nurl="ftp://x"', "s.toml:3:1: gateway.url: 'ftp://x' is not http"),
        ('[gateway]\nurl="http://u:p@x"', "gateway.url"),
        ('[gateway]\nurl="http://x:0"', "gateway.url"),
        ('[gateway]\nurl="http://x:99999"', "gateway.url"),
        ('[gateway]\nurl="http://x/?q=1"', "gateway.url"),
        ('[gateway]\nkind="litellm"\nurl=""', "gateway.url: is empty, and kind litellm needs it"),
        ('[gateway]\nkind="litellm"\n[[gateway.models]]\nname="x"', "s.toml:3:1: gateway.models: is for the embedded"),
        ("[gateway]\nmodels=[1]", "gateway.models[0]: is not a table"),
        ('[[gateway.models]]\nname="a"\n[[gateway.models]]\nnam="b"', "s.toml:4:1: gateway.models[1].nam: unknown key"),
        ('[[gateway.models]]\nkind="openai"\nname="a"', "s.toml:1:1: gateway.models[0].url: is missing"),
        ('[[gateway.models]]\nkind="local"\nname="a"\nscript="/x"', "gateway.models[0].script: is for kind scripted"),
        ('[[gateway.models]]\nkind="anthropic"\nname="a"\nresponses=true', "responses: is for kind openai"),
        ('[[gateway.models]]\nname="a"\nlisted=["a*"]', "gateway.models[0].listed: is not a list"),
        (
            '[[gateway.models]]\nname="a"\ninput_usd_per_mtok=1',
            "input_usd_per_mtok: and output_usd_per_mtok go together",
        ),
        ('[[gateway.models]]\nname="a b"', "gateway.models[0].name: 'a b' is not"),
        ('[[gateway.models]]\nname="a"\ninput_usd_per_mtok=-1', "gateway.models[0].input_usd_per_mtok"),
        ('[[gateway.guardrails]]\npatterns=["pii"]', "s.toml:1:1: gateway.guardrails[0].name: is missing"),
        ('[[gateway.guardrails]]\nname="a"', "gateway.guardrails[0].patterns: and own are empty"),
        ('[[gateway.guardrails]]\nname="a"\npatterns=["pi"]', "gateway.guardrails[0].patterns: has pi, which is none"),
        ('[[gateway.guardrails]]\nname="a"\npatterns=["pii"]\naction="log"', "'log' is none of block, mask"),
        (
            '[[gateway.guardrails]]\nname="a"\nown={x="a*"}',
            "gateway.guardrails[0].own.x: cannot read pattern at character",
        ),
        ('[[gateway.guardrails]]\nname="a"\nown={jwt="a"}', "own.jwt: is no name for a pattern, or one that exists"),
        (
            '[[gateway.guardrails]]\nname="a"\npatterns=["pii"]\nmodels=[1]',
            "gateway.guardrails[0].models: is not a list",
        ),
        (
            '[gateway]\nkind="openai"\n[[gateway.guardrails]]\nname="a"\npatterns=["pii"]',
            "guardrails: is for the embedded",
        ),
        ('[[gateway.mcp]]\nname="a b"\nurl="http://x/mcp"', "gateway.mcp[0].name: 'a b' is not"),
        ('[[gateway.mcp]]\nname="a"', "gateway.mcp[0].url: is missing"),
        ("[gateway]\nprobe_seconds=0", "gateway.probe_seconds"),
        ('[gateway.hosts]\n"a.b" = "x"', "s.toml:2:1: gateway.hosts.a.b: 'x' is neither IP nor IP:PORT"),
        ('[gateway.hosts]\n"A.b" = "10.0.0.1"', "gateway.hosts.A.b: is not a host's name"),
        ('[gateway.hosts]\n"*" = "10.0.0.1"', "is not a host's name"),
        ('[gateway]\nallow_networks=["10.0.0.1/8"]', "gateway.allow_networks[0]: '10.0.0.1/8' is not a network"),
        ("[log]\ncheckpoint_entries = 0", "log.checkpoint_entries: '0' is not a whole number from 1"),
        ("[log]\ncheckpoint_entries = true", "log.checkpoint_entries"),
        ("[log]\ncheckpoint_seconds = nan", "log.checkpoint_seconds"),
        ('[log]\nkeep_bytes = "much"', "log.keep_bytes: cannot read size"),
        ("[log]\nkeep_days = -1", "log.keep_days"),
        ('[[log.sinks]]\nkind="jsonl"\npath="/x"', "log.sinks[0].name: is missing"),
        ('[[log.sinks]]\nname="A b"\npath="/x"', "log.sinks[0].name: 'A b' is not"),
        ('[[log.sinks]]\nname="a"\nkind="otlp"', "log.sinks[0].url: is missing, and kind otlp needs it"),
        ('[[log.sinks]]\nname="a"\npath="/x"\nurl="http://x"', "log.sinks[0].url: is not for kind jsonl"),
        ('[[log.sinks]]\nname="a"\nkind="syslog"\naddress="tcp:x"', "log.sinks[0].address: 'tcp:x' is not unix:/PATH"),
        ('[[log.sinks]]\nname="a"\npath="/x"\nheader_file="/y"', "log.sinks[0].header_file: is not for kind jsonl"),
        ('[[log.sinks]]\nname="a"\npath="/x"\nca_file="/y"', "log.sinks[0].ca_file: is for a sink over TLS"),
        (
            '[[log.sinks]]\nname="a"\nkind="otlp"\nurl="http://x"\nkey_file="/y"',
            "log.sinks[0].key_file: is for a sink over TLS",
        ),
        (
            '[[log.sinks]]\nname="a"\nkind="syslog"\naddress="udp:x:1"\ntls=true',
            "log.sinks[0].tls: is for tcp: addresses and https: URLs",
        ),
        (
            '[[log.sinks]]\nname="a"\nkind="otlp"\nurl="http://x"\ntls=true',
            "log.sinks[0].tls: is for tcp: addresses and https: URLs",
        ),
        (
            '[[log.sinks]]\nname="a"\nkind="otlp"\nurl="https://x"\ncert_file="/y"',
            "log.sinks[0].key_file: is missing: a client certificate is two files",
        ),
        ('[[log.sinks]]\nname="a"\npath="/x"\n' * 2, "log.sinks: has two of one name"),
        ('[control]\nread_only_others = "no"', "control.read_only_others: 'no' is neither true nor false"),
        ('[control]\ngroup = "a b"', "control.group"),
        ('[control]\ntcp_listen = "127.0.0.1:1"', "control.tls_client_ca: is missing, and tcp_listen needs it"),
        ('[control]\ntcp_listen = "7443"', "control.tcp_listen: '7443' is not IP:PORT"),
        ('[control.roles]\n"ci" = "admin"', "control.roles.ci: is neither cn:NAME"),
        ('[control.roles]\n"cn:ci" = "root"', "control.roles.cn:ci: 'root' is none of reader, operator, admin"),
        (
            '[users]\negress = "root"',
            "users: egress, dialer, gateway, images, webhook and sinks must be six users other than root",
        ),
        (
            '[users]\negress = "a"\ndialer = "a"',
            "users: egress, dialer, gateway, images, webhook and sinks must be six users",
        ),
        ("[agents]\nuid_range = [0, 4294967295]", "agents.uid_range"),
        (f"[agents]\nuid_range = [{UID_FIRST}, {UID_FIRST + 65534}]", "is not 65536 or more ids"),
        (f"[agents]\nuid_range = [{UID_FIRST}, {UID_LAST + 1}]", "agents.uid_range"),
        (f"[agents]\nuid_range = [{UID_FIRST + 1}, {UID_LAST}]", "from a multiple of 65536"),
        ('[agents]\nuid_range = "x"', "agents.uid_range: 'x' is not [FIRST, LAST]"),
        ('[agents]\non_stop = "kil"', "did you mean kill?"),
        ('[agents]\noutput_keep = "much"', "agents.output_keep: cannot read size"),
        ("[agents]\noutput_days = 0", "agents.output_days"),
        ("[pool]\nnetns = -1", "pool.netns"),
        ("[egress]\nworkers = 0", "egress.workers"),
        ("a = 1\na = 2\n", "2:6: not TOML: Cannot overwrite a value"),
        ("a = [", "not TOML"),
    ],
)
def test_what_is_refused_and_where(text: str, message: str) -> None:
    assert message in refusal(text)


def test_every_problem_is_named_at_once_and_in_order() -> None:
    text = refusal("[log]\ndurabilty = 1\n[pool]\nnets = 1\n[egress]\nwrkers = 1\n")
    assert [part.split(":")[0] for part in text.split("s.toml:")[1:]] == ["2", "4", "6"]


def test_positions_step_over_texts_and_lists_of_many_lines() -> None:
    text = 'a = """\nfake = 1\n[fake]\n"""\nb = [\n  "[x]", # ]\n]\n\n  [c.d]\n"e.f" = 1\n'
    text += "[[g]]\nh = 1\n[[g]]\n[g.i]\nj = 1\n"
    lines = {key: position.line for key, position in key_positions(text).items()}
    assert lines["a"] == 1
    assert "fake" not in lines
    assert (lines["b"], lines["c.d"], lines["c.d.e.f"]) == (5, 9, 10)
    assert (lines["g[0]"], lines["g[0].h"], lines["g[1]"]) == (11, 12, 13)
    assert key_positions(text)["c.d"].column == 3


@pytest.mark.parametrize(
    ("text", "with_port", "bare"),
    [
        ("127.0.0.1:80", True, True), ("[::1]:80", True, True), ("127.0.0.1", False, True), ("::1", False, True),
        ("", False, False), ("[::1]", False, False), ("127.0.0.1:", False, False), ("1.2.3.4:0", False, False),
        ("1.2.3.4:65535", True, True), ("1.2.3.4:65536", False, False), ("1.2.3.4:٣", False, False),
        ("a:1", False, False),
        ("::1:80", False, True), ("1.2.3:80", False, False), ("127.1:80", False, False), ("0x7f.1:80", False, False),
    ],
)  # fmt: skip
def test_endpoints(text: str, with_port: bool, bare: bool) -> None:  # noqa: FBT001 - columns of the table above
    assert is_endpoint(text, port_required=True) is with_port
    assert is_endpoint(text, port_required=False) is bare


@given(st.text('abc=[]{}."#\n 1', max_size=60) | st.text(max_size=60))
def test_any_text_is_a_configuration_or_bad_input(text: str) -> None:
    for candidate in (text, "[gateway]\n" + text, DOCUMENTED + text):
        with contextlib.suppress(InvalidDocument):
            assert parse(candidate).instance


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"cannot read .*missing\.toml: No such file"):
        load_config(tmp_path / "missing.toml")
    (tmp_path / "s.toml").write_bytes(b"\xff")
    with pytest.raises(InvalidInput, match="not UTF-8"):
        load_config(tmp_path / "s.toml")
    (tmp_path / "s.toml").write_bytes(b"#" * CONFIG_BYTES_MAX)
    assert load_config(tmp_path / "s.toml").instance == "default"
    (tmp_path / "s.toml").write_bytes(b"#" * (CONFIG_BYTES_MAX + 1))
    with pytest.raises(InvalidInput, match="longer than"):
        load_config(tmp_path / "s.toml")


def test_files_that_are_named_and_not_there(tmp_path: Path) -> None:
    key = tmp_path / "key"
    text = f'[[gateway.models]]\nname="x"\nkind="openai"\nurl="https://a.example.com"\nkey_file="{key}"\n'
    assert "gateway.models[0].key_file" in "".join(missing_files(parse(text)))
    key.write_text("k")
    assert missing_files(parse(text)) == ()
    assert missing_files(parse(DOCUMENTED)) == (), "the embedded gateway needs no credential"
    assert missing_files(parse(DOCUMENTED.replace("embedded", "litellm")))


def test_what_unpacking_an_image_may_cost() -> None:
    assert parse_config("", source="x").images == ImageLimits()
    limits = parse_config("[images]\nunpacked_bytes_max = 1048576\nentries_max = 7\n", source="x").images
    assert limits == ImageLimits(unpacked_bytes_max=1 << 20, entries_max=7)
    for text in (
        "unpacked_bytes_max = 1",
        "layers_max = 0",
        "unpack_seconds_max = 0",
        'entries_max = "7"',
        "files = 1",
    ):
        with pytest.raises(InvalidDocument):
            parse_config(f"[images]\n{text}\n", source="x")


def test_sinks_of_the_log() -> None:
    text = """
[log]
keep_days = 90
keep_bytes = "1GiB"
[[log.sinks]]
name = "file"
kind = "ocsf"
path = "/var/log/stockade.ocsf"
[[log.sinks]]
name = "siem"
kind = "syslog"
address = "udp:[2001:db8::1]:514"
[[log.sinks]]
name = "otel"
kind = "otlp"
url = "https://collector.example/v1/logs"
header_file = "/nonexistent/header"
[[log.sinks]]
name = "tls"
kind = "syslog"
address = "tcp:syslog.example:6514"
tls = true
ca_file = "/nonexistent/ca.pem"
cert_file = "/nonexistent/client.pem"
key_file = "/nonexistent/client.key"
"""
    config = parse_config(text, source="s.toml")
    assert (config.log.keep_days, config.log.keep_bytes) == (90, 1 << 30)
    assert [(sink.name, sink.kind.value) for sink in config.log.sinks] == [
        ("file", "ocsf"),
        ("siem", "syslog"),
        ("otel", "otlp"),
        ("tls", "syslog"),
    ]
    assert [sink.tls for sink in config.log.sinks] == [False, False, False, True]
    for key in ("ca_file", "cert_file", "key_file"):
        assert any(f"log.sinks[3].{key}" in line for line in missing_files(config)), key
    assert any("log.sinks[2].header_file" in line for line in missing_files(config))


def test_what_labels_may_spend() -> None:
    text = (
        '[[budgets]]\nlabel = "team=a"\nllm_tokens = 5\ncost_usd = 1.5\nperiod = "day"\n'
        '[[budgets]]\nlabel = "team=a"\nrequests = 9\negress_bytes = "1GiB"\n'
    )
    assert parse_config(text, source="s.toml").budgets == (
        LabelBudget("team=a", Budget(llm_tokens=5, cost_microusd=1_500_000), Period.DAY),
        LabelBudget("team=a", Budget(requests=9, egress_bytes=1 << 30), Period.NONE),
    )
