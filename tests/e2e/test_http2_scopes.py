"""http: scopes of a real HTTP/2 server (nghttpd), with the programs agents use; and of one of HTTP/1.1 alone."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from tests.support.http2 import nghttpd
from tests.support.instance import Instance
from tests.support.site import Site
from tests.support.site_authority import SiteAuthority

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOST, OLD = "api.example.com", "old.example.com"
BIG = 5_000_000
SCOPES = ("--scope", f"http:*:https://{HOST}/v1/**", "--scope", f"http:*:https://{OLD}/v1/**")
OPTIONS = {
    "plain": ("--echo-upload",),
    "narrow": ("--echo-upload", "-w", "8", "-W", "10", "-b", "200", "--trailer", "x-trailer: a", "--no-content-length"),
}


@dataclass
class Stage:
    stockade: Instance
    log: Path
    digest: str

    def frames(self) -> str:
        """What the server got and sent, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))


def made(directory: Path) -> str:
    """Make what the server serves: a large file, and a repository as a plain file server offers it."""
    root = directory / "root" / "v1"
    root.mkdir(parents=True)
    body = os.urandom(BIG)
    (root / "big").write_bytes(body)
    (root.parent / "secret").write_text("not granted")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "init.defaultBranch=main"]
    work = directory / "work"
    subprocess.run([*git, "init", "-q", str(work)], check=True)
    (work / "big").write_bytes(body)
    subprocess.run([*git, "-C", str(work), "add", "big"], check=True)
    subprocess.run([*git, "-C", str(work), "commit", "-q", "-m", "one"], check=True)
    subprocess.run([*git, "clone", "-q", "--bare", str(work), str(root / "repo.git")], check=True)
    subprocess.run([*git, "-C", str(root / "repo.git"), "update-server-info"], check=True)
    return hashlib.sha256(body).hexdigest()


@pytest.fixture(scope="module", params=OPTIONS)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One that serves as it comes, and one with windows of 255 bytes, padding, trailers and no lengths."""
    directory = tmp_path_factory.mktemp("site")
    sites = SiteAuthority.make(directory)
    sites.context(HOST)
    digest, log = made(directory), directory / "frames"
    with (
        Site(sites.context(OLD)) as old,
        nghttpd(directory / f"{HOST}.pem", directory / "root", *OPTIONS[request.param], log=log) as port,
    ):
        pins = f'"{HOST}" = "127.0.0.1:{port}"\n"{OLD}" = "127.0.0.1:{old.port}"\n'
        with Instance.start(f'[gateway]\nca_file = "{sites.ca}"\n[gateway.hosts]\n{pins}') as stockade:
            yield Stage(stockade, log, digest)


def test_curl_gets_a_file_over_http2_and_speaks_http11_itself(stage: Stage) -> None:
    done = stage.stockade.run(
        f"curl -sS -w '%{{http_code}} %{{http_version}}\\n' -o /tmp/out https://{HOST}/v1/big && sha256sum /tmp/out;"
        f"curl -sS -o /dev/null -w '%{{http_code}}\\n' https://{HOST}/secret;"
        f"curl -sSI -o /dev/null -w '%{{http_code}}\\n' https://{HOST}/v1/big;"
        f"curl -sS -o /dev/null -w '%{{http_code}}\\n' https://{HOST}/v1/nothing",
        *SCOPES,
    )
    assert done.out.split() == ["200", "1.1", stage.digest, "/tmp/out", "403", "200", "404"], done.out + done.err
    frames = stage.frames()
    assert f":authority: {HOST}" in frames
    assert ":path: /v1/big" in frames
    assert "/secret" not in frames


def test_python_and_curl_upload_and_get_it_back(stage: Stage) -> None:
    python = (
        "import urllib.request as r, os\\n"
        "data = os.urandom(300000)\\n"
        f"print(r.urlopen('https://{HOST}/v1/echo', data=data).read() == data)\\n"
    )
    done = stage.stockade.run(
        f'printf "{python}" > /tmp/up.py; /usr/bin/python3 /tmp/up.py; head -c 700000 /dev/urandom > /tmp/in;'
        # As git sends a pack: chunked, after asking whether it may.
        "curl -sS -H 'Transfer-Encoding: chunked' -H 'Expect: 100-continue' --data-binary @/tmp/in "
        f"-o /tmp/out https://{HOST}/v1/echo; cmp /tmp/in /tmp/out && echo same;"
        f"curl -sS -T /tmp/in -o /tmp/out https://{HOST}/v1/echo; cmp /tmp/in /tmp/out && echo same",
        *SCOPES,
    )
    assert done.out.split() == ["True", "same", "same"], done.out + done.err


def test_git_clones_over_http2(stage: Stage) -> None:
    done = stage.stockade.run(
        f"git clone -q https://{HOST}/v1/repo.git /tmp/repo && sha256sum < /tmp/repo/big", *SCOPES
    )
    assert done.out.split()[:1] == [stage.digest], done.out + done.err


def test_the_log_says_what_was_spoken(stage: Stage) -> None:
    agent = stage.stockade.launch(
        *SCOPES, "--wait", "--", "sh", "-c", f"curl -s https://{HOST}/v1/big https://{OLD}/v1/a >/dev/null"
    )
    spoken = {
        entry["object"]: (entry["details"]["protocol"], entry["details"]["status"])
        for entry in stage.stockade.actions(agent["agent_id"])
        if entry["verb"] == "egress.outcome" and entry["object"].startswith("GET ")
    }
    assert spoken == {f"GET https://{HOST}/v1/big": ("h2", 200), f"GET https://{OLD}/v1/a": ("http/1.1", 200)}
