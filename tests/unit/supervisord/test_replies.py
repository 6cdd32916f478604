"""A list of scopes that no frame holds comes in pages that each do."""

import json

from gateway_client.egress import messages
from gateway_client.egress.decide import Reply
from supervisord.replies import fitting


def reply(count: int, size: int) -> Reply:
    return Reply(200, {"scopes": [{"grant_id": f"gr_{n}", "scope": "s" * size} for n in range(count)]})


def test_a_short_list_is_given_whole() -> None:
    assert fitting(reply(3, 10), "") == reply(3, 10)
    assert fitting(Reply(200, {"name": "x"}), "after=gr_1") == Reply(200, {"name": "x"})


def test_a_long_one_is_given_a_frame_at_a_time_and_nothing_twice() -> None:
    long = reply(256, 2000)
    found: list[str] = []
    query = ""
    while True:
        page = fitting(long, query)
        assert len(messages.encode(messages.Answer(1, page))) < messages.frame_bytes_max
        found += [each["grant_id"] for each in page.body["scopes"]]
        if "next" not in page.body:
            break
        query = f"after={page.body['next']}"
    assert found == [f"gr_{n}" for n in range(256)]


def test_the_characters_that_grow_in_a_frame_are_counted_as_they_grow() -> None:
    long = Reply(200, {"scopes": [{"grant_id": f"gr_{n}", "scope": '"\u00e9\\' * 500} for n in range(256)]})
    page = fitting(long, "")
    assert len(messages.encode(messages.Answer(1, page))) < messages.frame_bytes_max
    assert json.dumps(page.body)


def test_the_exchanges_of_one_cut_fit_a_frame_and_one_that_is_too_long_is_told() -> None:
    xs = tuple(range(10**19, 10**19 + messages.xs_per_cut_max))
    for message in (messages.Cut(xs=xs), messages.CutExchanges("w100.1000000", xs, 10**19)):
        assert len(messages.encode(message)) < messages.frame_bytes_max
    try:
        messages.encode(messages.Cut(xs=xs * 2))
    except messages.BadFrame:
        return
    raise AssertionError("twice as many fit as well: the bound is no bound")
