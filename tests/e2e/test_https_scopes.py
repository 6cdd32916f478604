"""http: scopes of https URLs with the programs that agents use, none of which is told anything but its environment."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.instance import Instance
from tests.support.site import Site
from tests.support.site_authority import SiteAuthority

if TYPE_CHECKING:
    from collections.abc import Iterator

HOST = "api.example.com"
PYTHON = "/usr/bin/python3"
PROGRAMS = {
    "curl": "curl -sS -o /tmp/out -w '%{http_code}\\n' @",
    "python-urllib": PYTHON
    + """ -c "
import urllib.request, urllib.error
try: print(urllib.request.urlopen('@').status)
except urllib.error.HTTPError as error: print(error.code)
" """,
    # A CONNECT by hand: that fetch() minds HTTPS_PROXY came with Node 24.
    "node": """cat > /tmp/get.js <<'E'
const url = new URL('@'), proxy = new URL(process.env.HTTPS_PROXY), path = url.hostname + ':443';
const options = {host: proxy.hostname, port: proxy.port, method: 'CONNECT', path, headers: {host: path}};
require('http').request(options).on('connect', (answer, socket) => {
  if (answer.statusCode !== 200) { console.log(answer.statusCode); process.exit(); }
  const inner = require('tls').connect({socket, servername: url.hostname}, () => {
    inner.write('GET ' + url.pathname + ' HTTP/1.1\\r\\nHost: ' + url.hostname + '\\r\\nConnection: close\\r\\n\\r\\n');
    inner.once('data', (data) => { console.log(data.toString().split(' ')[1]); process.exit(); });
  });
}).end();
E
node /tmp/get.js""",
    "java": """cat > /tmp/Get.java <<'E'
import java.net.*;
class Get { public static void main(String[] a) throws Exception { try {
  System.out.println(((HttpURLConnection) new URL("@").openConnection()).getResponseCode());
} catch (java.io.IOException e) { System.out.println(e.getMessage()); } } }
E
java -XX:+UseSerialGC -XX:TieredStopAtLevel=1 /tmp/Get.java""",
}
# What bootstrap installs is always tried; Java is where the host has it.
INSTALLED = [name for name in PROGRAMS if name != "java" or Path("/usr/bin/javac").exists()]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Instance, Site]]:
    sites = SiteAuthority.make(tmp_path_factory.mktemp("site"))
    with Site(sites.context(HOST, "other.example.com")) as site:
        pins = "".join(f'"{name}" = "127.0.0.1:{site.port}"\n' for name in (HOST, "other.example.com"))
        with Instance.start(f'[gateway]\nca_file = "{sites.ca}"\n[gateway.hosts]\n{pins}') as stockade:
            yield stockade, site


@pytest.mark.parametrize("program", INSTALLED)
def test_a_program_reaches_the_path_that_is_granted_and_no_other(stage: tuple[Instance, Site], program: str) -> None:
    stockade, site = stage
    site.seen.clear()
    script = PROGRAMS[program]
    flags = ("--scope", f"http:GET:https://{HOST}/v1/**")
    inside = script.replace("@", f"https://{HOST}/v1/{program}")
    outside = script.replace("@", f"https://{HOST}/v2/{program}")
    other = script.replace("@", f"https://other.example.com/v1/{program}")
    done = stockade.run(f"{inside}\n{outside}\n{other}", *flags)
    answers = done.out.split()
    assert answers[:2] == ["200", "403"], done.out + done.err
    assert "200" not in answers[2:], done.out + done.err
    assert site.seen == [f"GET /v1/{program}"]


def test_git_clones_over_https(stage: tuple[Instance, Site]) -> None:
    """The site serves no repository: that git asks for it, and what it says of the answer, shows that TLS was fine."""
    stockade, site = stage
    site.seen.clear()
    done = stockade.run(f"git ls-remote https://{HOST}/repo.git", "--scope", f"http:GET:https://{HOST}/repo.git/**")
    assert site.seen[0] == "GET /repo.git/info/refs?service=git-upload-pack"
    reached = len(site.seen)
    assert "certificate" not in done.err
    refused = stockade.run(f"git ls-remote https://{HOST}/repo.git", "--scope", f"http:GET:https://{HOST}/other/**")
    assert "403" in refused.err
    assert len(site.seen) == reached


def test_every_agent_has_an_authority_of_its_own_that_no_other_trusts(stage: tuple[Instance, Site]) -> None:
    stockade, _ = stage
    first, second = (stockade.run("cat /etc/stockade/ca.pem").out for _ in range(2))
    assert "BEGIN CERTIFICATE" in first
    assert first != second
    script = "cat > /tmp/other.pem; curl -sS -o /dev/null -w '%{http_code}' --cacert /tmp/other.pem "
    url = f"https://{HOST}/v1/x"
    flags = ("run", "-i", "--scope", f"http:GET:https://{HOST}/**", "--", "sh", "-c")
    refused = stockade.ctl(
        *flags, script + url, stdin=first.split("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----\n"
    )
    assert "200" not in refused.out
    assert "certificate" in refused.err
    # The twin: with its own one it works, so the file was read as it should be.
    fine = stockade.ctl(
        *flags, f"curl -sS -o /dev/null -w '%{{http_code}}' --cacert /etc/stockade/ca.pem {url}", stdin=""
    )
    assert fine.out == "200", fine.err


def test_the_log_has_every_request_and_not_the_tunnel_alone(stage: tuple[Instance, Site]) -> None:
    stockade, _ = stage
    agent = stockade.launch(
        "--scope", f"http:GET:https://{HOST}/v1/**", "--wait", "--", "curl", "-s", f"https://{HOST}/v1/logged"
    )
    seen = [
        (entry["verb"], entry["object"], entry["verdict"])
        for entry in stockade.actions(agent["agent_id"])
        if entry["verb"].startswith("egress.") and entry["object"].startswith("GET")
    ]
    assert seen == [
        ("egress.request", f"GET https://{HOST}/v1/logged", "allowed"),
        ("egress.outcome", f"GET https://{HOST}/v1/logged", "done"),
    ]


def test_a_grant_comes_and_goes_while_the_agent_runs_and_cuts_a_stream(stage: tuple[Instance, Site]) -> None:
    stockade, site = stage
    site.cut.clear()
    agent = stockade.launch(
        "--", "sh", "-c", f"until curl -sSfN https://{HOST}/slow; do sleep 0.1; done; echo over; sleep 60"
    )
    grant = stockade.json("grant", agent["agent_id"], f"http:GET:https://{HOST}/slow")
    stockade.wait(lambda: "piece" in stockade.ctl("logs", agent["agent_id"]).out)
    assert "piece" in stockade.ctl("logs", agent["agent_id"]).out
    stockade.json("revoke", grant["grant_id"])
    assert site.cut.wait(5)
    stockade.ctl("kill", agent["agent_id"])


def test_the_authority_is_the_same_after_the_daemon_came_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    sites = SiteAuthority.make(tmp_path_factory.mktemp("site"))
    with (
        Site(sites.context(HOST)) as site,
        Instance.start(
            f'[gateway]\nca_file = "{sites.ca}"\n[gateway.hosts]\n"{HOST}" = "127.0.0.1:{site.port}"\n'
        ) as stockade,
    ):
        loop = f"while :; do curl -s https://{HOST}/$(cat /workspace/path); sleep 0.1; done"
        place = stockade.workspace(path="before")
        stockade.launch("--workspace", str(place), "--scope", f"http:GET:https://{HOST}/**", "--", "sh", "-c", loop)
        stockade.wait(lambda: "GET /before" in site.seen)
        assert "GET /before" in site.seen
        stockade.down()
        (place / "path").write_text("after")
        stockade.up()
        stockade.wait(lambda: "GET /after" in site.seen)
        assert "GET /after" in site.seen
