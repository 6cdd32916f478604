"""What every gateway must get across, whatever is behind it: the expectations of the conformance suite."""

from __future__ import annotations

from itertools import product
from typing import Any

ENDPOINTS = ("chat", "responses", "messages")
CASES = tuple(
    f"{endpoint}_{mode}_{what}" for endpoint, mode, what in product(ENDPOINTS, ("whole", "stream"), ("text", "tool"))
)
TEXT = "Grüße, 世界! A line of some length, so that it comes in several pieces."
CALLS = [
    [{"name": "look_up", "arguments": {"word": "naïve", "depth": 2}}],
    [{"name": "look_up", "arguments": {"word": "second"}}],
    [],
]


def check(case: str, understood: dict[str, Any]) -> None:
    """Fail where an SDK did not understand what the scripted model said."""
    assert "error" not in understood, understood["error"]
    turns = understood["turns"]
    _, mode, what = case.split("_")
    if what == "text":
        assert [turn["text"] for turn in turns] == [TEXT]
    else:
        assert [turn["calls"] for turn in turns] == CALLS
        assert "2 tool results" in turns[-1]["text"]
        assert "4x ERROR the disk is full" in turns[-1]["text"]
    assert [turn["stop"] for turn in turns] == ["tool_calls"] * (len(turns) - 1) + ["stop"]
    assert all(turn["input_tokens"] > 0 and turn["output_tokens"] > 0 for turn in turns)
    if mode == "stream":
        assert turns[-1]["pieces"] > 1, "the answer came in one piece: something buffers"
