"""Calls a gateway with the official `openai` and `anthropic` SDKs and prints what they understood, a JSON line a case.

Run with the interpreter of .venv-agents, which has the SDKs: `python conformance_client.py URL MODEL [KEY] [CASE…]`.
Needs nothing else of the project, so it also runs inside a sandbox.
"""

from __future__ import annotations

import json
import sys
import traceback
from typing import TYPE_CHECKING, Any

import anthropic
import openai

if TYPE_CHECKING:
    from collections.abc import Callable

TEXT_PROMPT = "@say Grüße, 世界! A line of some length, so that it comes in several pieces."
TOOL_PROMPT = '@call look_up {"word": "naïve", "depth": 2}\n@call look_up {"word": "second"}'
SCHEMA = {
    "type": "object",
    "properties": {"word": {"type": "string"}, "depth": {"type": "integer"}},
    "required": ["word"],
}
RESULT = "first line\nERROR the disk is full\nERROR the disk is full"


class Case:
    """The two clients and the model; each method is a case and returns what the SDK understood."""

    def __init__(self, url: str, model: str, key: str) -> None:
        self.model = model
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=30)
        self.anthropic = anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=30)

    # --- chat completions

    def _chat(self, prompt: str, *, stream: bool, tools: bool) -> dict[str, Any]:
        messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]
        turns = []
        extra: dict[str, Any] = {}
        if tools:
            function = {"name": "look_up", "description": "Looks up", "parameters": SCHEMA}
            extra["tools"] = [{"type": "function", "function": function}]
        while True:
            if stream:
                with self.openai.chat.completions.stream(
                    model=self.model, messages=messages, stream_options={"include_usage": True}, **extra
                ) as events:
                    pieces = sum(event.type == "chunk" for event in events)
                    completion: Any = events.get_final_completion()
            else:
                pieces = 0
                completion = self.openai.chat.completions.create(model=self.model, messages=messages, **extra)
            message = completion.choices[0].message
            calls = [
                {"name": call.function.name, "arguments": json.loads(call.function.arguments)}
                for call in message.tool_calls or []
            ]
            turns.append(
                {
                    "text": message.content or "",
                    "calls": calls,
                    "stop": completion.choices[0].finish_reason,
                    "input_tokens": completion.usage.prompt_tokens,
                    "output_tokens": completion.usage.completion_tokens,
                    "pieces": pieces,
                }
            )
            if not calls:
                return {"turns": turns}
            messages.append(
                message.model_dump(
                    exclude_none=True,
                    exclude={"tool_calls": {"__all__": {"function": {"parsed_arguments"}}}, "parsed": True},
                )
            )
            messages += [{"role": "tool", "tool_call_id": call.id, "content": RESULT} for call in message.tool_calls]

    def chat_whole_text(self) -> dict[str, Any]:
        return self._chat(TEXT_PROMPT, stream=False, tools=False)

    def chat_stream_text(self) -> dict[str, Any]:
        return self._chat(TEXT_PROMPT, stream=True, tools=False)

    def chat_whole_tool(self) -> dict[str, Any]:
        return self._chat(TOOL_PROMPT, stream=False, tools=True)

    def chat_stream_tool(self) -> dict[str, Any]:
        return self._chat(TOOL_PROMPT, stream=True, tools=True)

    # --- responses

    def _responses(self, prompt: str, *, stream: bool, tools: bool) -> dict[str, Any]:
        items: list[Any] = [{"role": "user", "content": prompt}]
        turns = []
        extra: dict[str, Any] = {}
        if tools:
            extra["tools"] = [
                {
                    "type": "function",
                    "name": "look_up",
                    "description": "Looks up",
                    "parameters": SCHEMA,
                    "strict": False,
                }
            ]
        while True:
            if stream:
                with self.openai.responses.stream(
                    model=self.model, input=items, instructions="Be brief.", store=False, **extra
                ) as events:
                    pieces = sum(event.type.endswith(".delta") for event in events)
                    response: Any = events.get_final_response()
            else:
                pieces = 0
                response = self.openai.responses.create(
                    model=self.model, input=items, instructions="Be brief.", store=False, **extra
                )
            calls = [item for item in response.output if item.type == "function_call"]
            turns.append(
                {
                    "text": response.output_text,
                    "calls": [{"name": call.name, "arguments": json.loads(call.arguments)} for call in calls],
                    "stop": "tool_calls" if calls else "stop" if response.status == "completed" else response.status,
                    "input_tokens": response.usage.input_tokens,
                    "output_tokens": response.usage.output_tokens,
                    "pieces": pieces,
                }
            )
            if not calls:
                return {"turns": turns}
            for item in response.output:
                shown = item.model_dump(exclude_none=True)
                shown.pop("parsed_arguments", None)
                items.append(shown)
            items += [{"type": "function_call_output", "call_id": call.call_id, "output": RESULT} for call in calls]

    def responses_whole_text(self) -> dict[str, Any]:
        return self._responses(TEXT_PROMPT, stream=False, tools=False)

    def responses_stream_text(self) -> dict[str, Any]:
        return self._responses(TEXT_PROMPT, stream=True, tools=False)

    def responses_whole_tool(self) -> dict[str, Any]:
        return self._responses(TOOL_PROMPT, stream=False, tools=True)

    def responses_stream_tool(self) -> dict[str, Any]:
        return self._responses(TOOL_PROMPT, stream=True, tools=True)

    # --- messages

    def _messages(self, prompt: str, *, stream: bool, tools: bool) -> dict[str, Any]:
        messages: list[Any] = [{"role": "user", "content": prompt}]
        turns = []
        extra: dict[str, Any] = {"max_tokens": 1000, "system": "Be brief."}
        if tools:
            extra["tools"] = [{"name": "look_up", "description": "Looks up", "input_schema": SCHEMA}]
        while True:
            if stream:
                with self.anthropic.messages.stream(model=self.model, messages=messages, **extra) as events:
                    pieces = sum(event.type == "content_block_delta" for event in events)
                    message: Any = events.get_final_message()
            else:
                pieces = 0
                message = self.anthropic.messages.create(model=self.model, messages=messages, **extra)
            calls = [block for block in message.content if block.type == "tool_use"]
            turns.append(
                {
                    "text": "".join(block.text for block in message.content if block.type == "text"),
                    "calls": [{"name": call.name, "arguments": call.input} for call in calls],
                    "stop": {"end_turn": "stop", "tool_use": "tool_calls"}.get(
                        message.stop_reason, message.stop_reason
                    ),
                    "input_tokens": message.usage.input_tokens,
                    "output_tokens": message.usage.output_tokens,
                    "pieces": pieces,
                }
            )
            if not calls:
                return {"turns": turns}
            content = [
                {"type": "tool_use", "id": block.id, "name": block.name, "input": block.input}
                if block.type == "tool_use"
                else {"type": "text", "text": block.text}
                for block in message.content
            ]
            messages.append({"role": "assistant", "content": content})
            results = [{"type": "tool_result", "tool_use_id": call.id, "content": RESULT} for call in calls]
            messages.append({"role": "user", "content": results})

    def messages_whole_text(self) -> dict[str, Any]:
        return self._messages(TEXT_PROMPT, stream=False, tools=False)

    def messages_stream_text(self) -> dict[str, Any]:
        return self._messages(TEXT_PROMPT, stream=True, tools=False)

    def messages_whole_tool(self) -> dict[str, Any]:
        return self._messages(TOOL_PROMPT, stream=False, tools=True)

    def messages_stream_tool(self) -> dict[str, Any]:
        return self._messages(TOOL_PROMPT, stream=True, tools=True)

    # --- the rest

    def models_openai(self) -> dict[str, Any]:
        return {"models": [model.id for model in self.openai.models.list()]}

    def models_anthropic(self) -> dict[str, Any]:
        return {"models": [model.id for model in self.anthropic.models.list()]}

    def count_tokens(self) -> dict[str, Any]:
        counted = self.anthropic.messages.count_tokens(
            model=self.model, messages=[{"role": "user", "content": "four words are here"}]
        )
        return {"input_tokens": counted.input_tokens}

    def error_openai(self) -> dict[str, Any]:
        try:
            self.openai.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": "@fail 429 slow down"}]
            )
        except openai.RateLimitError as error:
            return {"status": error.status_code, "message": error.message}
        return {"status": 200}

    def error_anthropic(self) -> dict[str, Any]:
        try:
            self.anthropic.messages.create(
                model=self.model, max_tokens=9, messages=[{"role": "user", "content": "@fail 429 slow down"}]
            )
        except anthropic.RateLimitError as error:
            return {"status": error.status_code, "message": error.message}
        return {"status": 200}

    def cost_headers(self) -> dict[str, Any]:
        raw = self.openai.chat.completions.with_raw_response.create(
            model=self.model, messages=[{"role": "user", "content": "@say hello"}]
        )
        return {
            name: value for name, value in raw.headers.items() if name.startswith(("x-stockade-", "x-litellm-resp"))
        }


def main() -> int:
    url, model, key, *names = sys.argv[1:]
    case = Case(url, model, key)
    for name in names:
        run: Callable[[], dict[str, Any]] = getattr(case, name)
        try:
            result = run()
        except Exception:  # noqa: BLE001 - whatever it was, the test shows it
            result = {"error": traceback.format_exc()}
        print(json.dumps({"case": name, **result}), flush=True)  # noqa: T201 - the output is the product
    return 0


if __name__ == "__main__":
    sys.exit(main())
