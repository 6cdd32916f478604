"""An agent whose holder stops renewing its lease is frozen, then killed; one that is renewed is not."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from stockade.client import State, Stockade

from supervisord.leases import GRACE_SECONDS_MIN
from tests.support.instance import Instance
from tests.support.people import BERT, by

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: starts sandboxes")


@pytest.fixture(scope="module")
def stockade() -> Iterator[Instance]:
    with Instance.start() as instance:
        yield instance


def state(stockade: Instance, name: str) -> str:
    return str(stockade.json("status", name)[0]["state"])


def verbs(stockade: Instance, name: str) -> list[str]:
    return [entry["verb"] for entry in stockade.ctl("-o", "json", "actions", name).lines()]


def test_without_renewal_an_agent_is_frozen_then_killed_and_with_it_neither(stockade: Instance) -> None:
    stockade.launch("--name", "left", "--lease", "1s", "--", "sleep", "1000")
    stockade.launch("--name", "free", "--", "sleep", "1000")
    target = f"unix:{stockade.run_dir}/control.sock"
    with Stockade(target) as client:
        kept = client.launch(["sleep", "1000"], name="kept", lease=1)
        with kept.renewing(0.2):
            stockade.wait(lambda: state(stockade, "left") == "FROZEN")
            stockade.wait(lambda: state(stockade, "left") == "KILLED", GRACE_SECONDS_MIN + 10)
            assert (state(stockade, "kept"), state(stockade, "free")) == ("RUNNING", "RUNNING")
            assert 0 < (kept.refresh().info.lease_left or 0) <= 1
        stockade.wait(lambda: state(stockade, "kept") == "FROZEN")
        assert kept.renew().state.value == "RUNNING", "its holder is back in time"
    seen = verbs(stockade, "left")
    assert next(verb for verb in seen if verb in ("lease.lapse", "agent.freeze", "agent.kill")) == "lease.lapse"
    assert {"agent.freeze", "agent.kill"} <= set(seen)
    assert "agent.thaw" in verbs(stockade, "kept")
    assert "lease.lapse" not in verbs(stockade, "free")
    assert stockade.ctl("renew", "free").code == 5
    assert stockade.ctl("renew", "left").code == 5


def test_a_restart_neither_prolongs_nor_loses_a_lease(stockade: Instance) -> None:
    stockade.launch("--name", "long", "--lease", "100s", "--", "sleep", "1000")
    stockade.launch("--name", "short", "--lease", "1s", "--", "sleep", "1000")
    before = left(stockade, "long")
    stockade.down(signal.SIGKILL)
    stockade.up()
    assert 50 < left(stockade, "long") < before
    stockade.wait(lambda: state(stockade, "short") in ("FROZEN", "KILLED"), 15)
    assert stockade.ctl("renew", "long").code == 0
    assert left(stockade, "long") > 95


def left(stockade: Instance, name: str) -> float:
    document: dict[str, Any] = stockade.json("inspect", name)
    return float(document["lease_left"])


def test_a_lease_has_bounds(stockade: Instance) -> None:
    assert stockade.ctl("launch", "--lease", "8d", "--", "true").code == 2
    assert stockade.ctl("launch", "--lease", "100ms", "--", "true").code == 2


def test_nobody_but_its_holder_or_an_admin_renews_a_lease(stockade: Instance) -> None:
    stockade.launch("--name", "ours", "--lease", "100s", "--", "sleep", "1000")
    assert by(stockade, BERT, "launch", "--name", "theirs", "--lease", "100s", "--", "sleep", "1000").code == 0
    assert by(stockade, BERT, "renew", "ours").code == 4
    assert by(stockade, BERT, "renew", "theirs").code == 0
    assert stockade.ctl("renew", "theirs").code == 0, "root is an admin"


def test_a_renewal_thaws_what_its_lapse_froze_and_nothing_that_an_operator_froze(stockade: Instance) -> None:
    with Stockade(f"unix:{stockade.run_dir}/control.sock") as client:  # a command's start takes too much of a lease
        first, again, also = (
            client.launch(["sleep", "1000"], name=name, lease="6s") for name in ("first", "again", "also")
        )
        first.freeze()
        stockade.wait(lambda: [*client.actions(agent=first.agent_id, verb="lease.lapse")])
        stockade.wait(lambda: again.refresh().state is also.refresh().state is State.FROZEN)
        again.thaw()
        again.freeze()
        also.freeze()
        for agent in (first, again, also):
            assert agent.renew().state is State.FROZEN
            agent.kill()
