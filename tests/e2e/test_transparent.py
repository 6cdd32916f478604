"""Transparent mode: programs that know of no proxy reach what is granted, and by look-ups nothing gets out."""

from __future__ import annotations

import json
import os
import signal
import textwrap
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import Instance
from tests.support.site import Site
from tests.support.site_authority import SiteAuthority

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "api.example.com"
OTHER = "other.example.com"
POLICY = "kind: Policy\nname: see\nversion: 1\negress: {on_deny: deny, transparent: true, worker: shared}\n"
BARE = "unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY NODE_USE_ENV_PROXY JAVA_TOOL_OPTIONS; "
PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Instance, Site, Site]]:
    sites = SiteAuthority.make(tmp_path_factory.mktemp("site"))
    with Site(sites.context(HOST, OTHER)) as secure, Site() as plain:
        pins = f'"{HOST}" = "127.0.0.1:{secure.port}"\n"{OTHER}" = "127.0.0.1:{secure.port}"\n'
        pins += f'"plain.example.com" = "127.0.0.1:{plain.port}"\n'
        config = f'[gateway]\nca_file = "{sites.ca}"\n[gateway.hosts]\n{pins}'
        with Instance.start(config, policies={"see.yaml": POLICY}) as stockade:
            yield stockade, secure, plain


def run(stockade: Instance, script: str, *scopes: str) -> str:
    flags = [word for scope in scopes for word in ("--scope", scope)]
    done = stockade.run(BARE + script, "--policy", "see", *flags)
    return done.out + done.err


def python(stockade: Instance, code: str, *scopes: str) -> str:
    return run(stockade, f"{PYTHON} - <<'E'\n{textwrap.dedent(code)}\nE", *scopes)


LOOK_UP = r"""
    import socket, struct
    def ask(name, kind=1, raw=None):
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.settimeout(3)
        labels = b"".join(bytes([len(l)]) + l.encode() for l in name.split(".")) + b"\0"
        head, tail = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0), struct.pack(">HH", kind, 1)
        s.sendto(raw or head + labels + tail, ("198.18.0.1", 53))
        try:
            data = s.recv(999)
        except OSError as error:
            return type(error).__name__
        code, answers = data[3] & 15, struct.unpack(">H", data[6:8])[0]
        return (code, ".".join(map(str, data[-4:])) if answers else "")
"""


@pytest.mark.parametrize(
    "program",
    [
        "curl -sS -o /dev/null -w '%{http_code}\\n' @",
        f"""{PYTHON} -c "
import urllib.request, urllib.error
try: print(urllib.request.urlopen('@').status)
except urllib.error.HTTPError as error: print(error.code)
" """,
        "node -e \"require('https').get('@', r => { console.log(r.statusCode); process.exit(); })\"",
    ],
    ids=["curl", "python", "node"],
)
def test_a_program_that_knows_no_proxy_reaches_the_path_that_is_granted(
    stage: tuple[Instance, Site, Site], program: str
) -> None:
    stockade, secure, _ = stage
    secure.seen.clear()
    script = "\n".join(program.replace("@", f"https://{HOST}/{path}") for path in ("v1/a", "v2/a"))
    assert run(stockade, script, f"http:GET:https://{HOST}/v1/**").split() == ["200", "403"]
    assert secure.seen == ["GET /v1/a"]


def test_plain_http_and_opaque_tls_pass_as_their_scopes_say(stage: tuple[Instance, Site, Site]) -> None:
    stockade, secure, plain = stage
    secure.seen.clear()
    plain.seen.clear()
    urls = f"http://plain.example.com/a http://plain.example.com/b https://{HOST}/x"
    script = f"for u in {urls}; do curl -s -o /dev/null -w '%{{http_code}} ' $u; done"
    scopes = ("http:GET:http://plain.example.com/a", f"tls:{HOST}:443")
    assert run(stockade, script, *scopes).split() == ["200", "403", "200"]
    assert (plain.seen, secure.seen) == (["GET /a"], ["GET /x"])
    plain.seen.clear()
    spoofed = "curl -s -o /dev/null -w '%{http_code}' -H 'Host: other.example.com' http://plain.example.com/a"
    assert run(stockade, spoofed, *scopes) == "400"
    assert not plain.seen


def test_a_name_that_is_not_granted_does_not_resolve_and_is_on_record(stage: tuple[Instance, Site, Site]) -> None:
    stockade, secure, _ = stage
    secure.seen.clear()
    out = run(stockade, f"curl -sS https://{OTHER}/; curl -sS https://{HOST}/", f"tls:{HOST}:443")
    assert f"Could not resolve host: {OTHER}" in out
    assert secure.seen == ["GET /"]
    denied = [entry["object"] for entry in stockade.actions("--verdict", "denied")]
    assert f"LOOKUP {OTHER}" in denied


def test_the_server_name_must_be_the_name_that_was_looked_up(stage: tuple[Instance, Site, Site]) -> None:
    stockade, secure, _ = stage
    secure.seen.clear()
    address = f"$(getent ahostsv4 {HOST} | head -1 | cut -d' ' -f1)"
    for scope in (f"tls:{HOST}:443", f"http:*:https://{HOST}/**"):
        out = run(stockade, f"curl -sS --resolve {OTHER}:443:{address} https://{OTHER}/ || echo no", scope)
        assert out.splitlines()[0] == "no", out
    assert not secure.seen


def test_an_address_that_no_name_was_told_for_leads_nowhere(stage: tuple[Instance, Site, Site]) -> None:
    stockade, secure, _ = stage
    secure.seen.clear()
    code = f"""
        import socket, ssl
        context = ssl.create_default_context()
        def call(address):
            try:
                with socket.create_connection((address, 443), 3) as raw:
                    tls = context.wrap_socket(raw, server_hostname="{HOST}")
                    tls.sendall(b"GET /x HTTP/1.1\\r\\nHost: {HOST}\\r\\nConnection: close\\r\\n\\r\\n")
                    return tls.recv(20).decode()[:12]
            except OSError as error:
                return "no"
        print(call("198.19.0.1"), call("198.19.200.1"))
        known = socket.gethostbyname("{HOST}")
        print(known, call(known), call("198.19.200.1"))
    """
    out = python(stockade, code, f"http:GET:https://{HOST}/**")
    assert out == "no no\n198.19.0.1 HTTP/1.1 200 no\n"
    assert secure.seen == ["GET /x"]


def test_glibc_looks_up_over_connections_where_it_is_told_to(stage: tuple[Instance, Site, Site]) -> None:
    """`options use-vc`: no datagram leaves the program, which the agent's own kernel counts."""
    stockade, secure, _ = stage
    secure.seen.clear()
    count = "awk '/^Udp:/ && $2 ~ /^[0-9]/ {print \"datagrams\", $5}' /proc/net/snmp"
    look_up = f"getent ahostsv4 {HOST} | head -1 | cut -d' ' -f1; getent ahosts {OTHER} || echo none"
    fetch = f"curl -sS -o /dev/null -w '%{{http_code}}\\n' https://{HOST}/x"
    script = f"{count}; export RES_OPTIONS=use-vc; {look_up}; {fetch}; {count}; unset RES_OPTIONS; {look_up}; {count}"
    lines = run(stockade, script, f"http:GET:https://{HOST}/**").splitlines()
    assert lines[1:4] == ["198.19.0.1", "none", "200"], lines
    assert lines[0] == lines[4]
    # The twin: without it there are.
    assert lines[5:7] == ["198.19.0.1", "none"]
    assert int(lines[7].split()[1]) > int(lines[4].split()[1])
    denied = [entry["object"] for entry in stockade.actions("--verdict", "denied")]
    assert f"LOOKUP {OTHER}" in denied


def test_look_ups_over_connections_carry_nothing_out(stage: tuple[Instance, Site, Site]) -> None:
    stockade, _, _ = stage
    code = f"""
        import socket, struct
        def ask(*questions):
            line = socket.create_connection(("198.18.0.1", 53), 5)
            for name, kind in questions:
                labels = b"".join(bytes([len(l)]) + l.encode() for l in name.split(".")) + b"\\0"
                data = struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + labels + struct.pack(">HH", kind, 1)
                line.sendall(struct.pack(">H", len(data)) + data)
            found = []
            for _ in questions:
                data = line.recv(int.from_bytes(line.recv(2, socket.MSG_WAITALL), "big"), socket.MSG_WAITALL)
                found.append((data[3] & 15, struct.unpack(">H", data[6:8])[0]))
            return found
        print(ask(("{HOST}", 1), ("{HOST}", 28), ("{HOST}", 16), ("{HOST}", 252), ("secret.{HOST}", 1)))
        print(ask(("secret.tunnel.example", 16), ("secret.tunnel.example", 1)))
        try:
            socket.create_connection(("198.19.0.1", 53), 3)
        except OSError as error:
            print(type(error).__name__)
    """
    lines = python(stockade, code, f"tls:{HOST}:443").splitlines()
    assert lines == ["[(0, 1), (0, 0), (5, 0), (5, 0), (3, 0)]", "[(5, 0), (3, 0)]", "ConnectionRefusedError"]


def test_look_ups_carry_nothing_out(stage: tuple[Instance, Site, Site]) -> None:
    """A tunnel of look-ups: whatever is asked, under a granted name too, only that very name has an answer."""
    stockade, _, _ = stage
    code = (
        LOOK_UP
        + f"""
    print(ask("{HOST}"), ask("{HOST.upper()}"))
    print(ask("{HOST}", 28), ask("{HOST}", 16), ask("{HOST}", 255), ask("secret.tunnel.example", 16))
    print(ask("secret.{HOST}"), ask("x" * 63 + "." + "y" * 63 + ".tunnel.example"), ask("gateway.internal"))
    print(ask("", raw=b"\\0" * 12), ask("", raw=b"\\0" * 11), ask("", raw=b"\\0\\7\\x80" + b"\\0" * 30))
    """
    )
    lines = python(stockade, code, f"tls:{HOST}:443").splitlines()
    assert lines == [
        "(0, '198.19.0.1') (0, '198.19.0.1')",
        "(0, '') (5, '') (5, '') (5, '')",
        "(3, '') (3, '') (3, '')",
        "(1, '') TimeoutError TimeoutError",
    ]


def test_a_name_goes_with_its_grant(stage: tuple[Instance, Site, Site]) -> None:
    stockade, _, _ = stage
    agent = stockade.launch(
        "--policy",
        "see",
        "--",
        "sh",
        "-c",
        f"while :; do getent ahostsv4 {HOST} >/dev/null && echo yes || echo no; sleep 0.1; done",
    )

    def last() -> list[str]:
        return stockade.ctl("logs", agent["agent_id"]).out.split()[-1:]

    stockade.wait(lambda: last() == ["no"])
    assert last() == ["no"]
    grant = stockade.json("grant", agent["agent_id"], f"tls:{HOST}:443")
    stockade.wait(lambda: last() == ["yes"])
    assert last() == ["yes"]
    stockade.json("revoke", grant["grant_id"])
    stockade.wait(lambda: last() == ["no"])
    assert last() == ["no"]
    stockade.ctl("kill", agent["agent_id"])


def test_without_transparent_there_is_no_name_server(stage: tuple[Instance, Site, Site]) -> None:
    stockade, _, _ = stage
    done = stockade.run(
        f"{BARE} cat /etc/resolv.conf; ip route 2>/dev/null; curl -sS https://{HOST}/", "--scope", f"tls:{HOST}:443"
    )
    assert "198.18.0.0/15" not in done.out
    assert "No such file" in done.err
    assert "Could not resolve host" in done.err


def test_it_goes_on_after_the_worker_and_after_the_daemon_came_back(stage: tuple[Instance, Site, Site]) -> None:
    stockade, secure, _ = stage
    place = stockade.workspace(path="before")
    loop = f"{BARE} while :; do curl -s -m 5 https://{HOST}/$(cat /workspace/path); sleep 0.1; done"
    agent = stockade.launch(
        *(
            "--policy",
            "see",
            "--workspace",
            str(place),
            "--scope",
            f"http:GET:https://{HOST}/**",
            "--",
            "sh",
            "-c",
            loop,
        )
    )
    stockade.wait(lambda: "GET /before" in secure.seen)
    assert "GET /before" in secure.seen
    record = stockade.run_dir / "processes" / "egress-w1.json"
    os.kill(json.loads(record.read_text())["pid"], signal.SIGKILL)
    (place / "path").write_text("between")
    stockade.wait(lambda: "GET /between" in secure.seen, 20)
    assert "GET /between" in secure.seen
    stockade.down()
    (place / "path").write_text("after")
    stockade.up()
    stockade.wait(lambda: "GET /after" in secure.seen, 20)
    assert "GET /after" in secure.seen
    stockade.ctl("kill", agent["agent_id"])
