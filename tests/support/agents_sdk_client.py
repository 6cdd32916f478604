"""An agent on the OpenAI Agents SDK with one tool, run by .venv-agents: `python agents_sdk_client.py URL MODEL API`.

Prints what its tool was called with and what it answered in the end, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

CALLS: list[dict[str, object]] = []


@function_tool
def look_up(word: str, depth: int = 1) -> str:
    """Look up a word."""
    CALLS.append({"word": word, "depth": depth})
    return f"ERROR no entry for {word}"


async def run(url: str, model: str, api: str) -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0)
    chosen = (OpenAIResponsesModel if api == "responses" else OpenAIChatCompletionsModel)(model, client)
    agent = Agent(name="tester", instructions="Be brief.", tools=[look_up], model=chosen)
    prompt = '@call look_up {"word": "a", "depth": 3}\n@call look_up {"word": "b"}'
    streamed = Runner.run_streamed(agent, prompt, run_config=RunConfig(tracing_disabled=True))
    async for _ in streamed.stream_events():
        pass
    print(json.dumps({"calls": CALLS, "answer": streamed.final_output}))  # noqa: T201 - the output is the product


if __name__ == "__main__":
    asyncio.run(run(*sys.argv[1:]))
