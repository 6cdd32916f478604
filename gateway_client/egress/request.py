"""What an agent asked for, as one typed value: made by the worker's parser, judged by the daemon, logged, forwarded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from gateway_client.egress.target import Authority

model_chars_max: Final = 200
MODEL_NAME: Final = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:/@+-]{{0,{model_chars_max - 1}}}")


class Form(StrEnum):
    """Which of the five things a request to the proxy is."""

    MODEL = "model"
    """Origin-form to gateway.internal: the gateway's own model API."""
    FORWARD = "forward"
    """A URL elsewhere: of http:// in absolute form or inside a CONNECT, of https:// inside one whose TLS ends here."""
    CONNECT = "connect"
    """A tunnel to host:port."""
    MCP = "mcp"
    """`/mcp/SERVER` of gateway.internal: a message to a server of the Model Context Protocol behind the gateway."""
    SELF = "self"
    """`/.stockade/v1/*`: the agent's questions about itself, answered by the daemon."""
    NAME = "name"
    """A look-up in transparent mode: whether the name may be told at all."""


class Dialect(StrEnum):
    """The model endpoints an `llm:` scope reaches; anything else of the gateway is out of reach."""

    OPENAI_CHAT = "openai_chat"
    OPENAI_RESPONSES = "openai_responses"
    OPENAI_COMPLETIONS = "openai_completions"
    OPENAI_EMBEDDINGS = "openai_embeddings"
    ANTHROPIC_MESSAGES = "anthropic_messages"
    ANTHROPIC_COUNT_TOKENS = "anthropic_count_tokens"
    GEMINI_GENERATE = "gemini_generate"
    MODELS = "models"


@dataclass(frozen=True, slots=True)
class EgressRequest:
    """One request as parsed: the only description of it that anyone decides on, logs or forwards."""

    form: Form
    method: str
    scheme: str
    """`http`, `https` or, for a tunnel, `tls`."""
    host: str
    port: int
    path: str
    """Normalised, without the query; empty for a tunnel."""
    has_query: bool = False
    query: str = ""
    """Only with form SELF; elsewhere the query goes upstream and nowhere else."""
    content_length: int | None = 0
    """Bytes of the body; None where it is chunked and streamed."""
    dialect: Dialect | None = None
    """Only with form MODEL; None there means: no model endpoint."""
    model: str = ""
    stream: bool = False
    max_tokens: int | None = None
    """What a model call may put out at most, over all its choices; None where it does not say."""
    choices: int = 1
    input_tokens: int = 0
    """An upper estimate of what it puts in."""
    dropped: tuple[str, ...] = ()
    """Fields and tools that were taken out of its body, for the log."""
    body: str = ""
    """Only with form SELF."""
    server: str = ""
    """Only with form MCP, like the two below."""
    rpc_method: str = ""
    tool: str = ""
    """What a scope is compared with: a tool's name, or `resources/…` and `prompts/…`; empty where none is used."""

    @property
    def authority(self) -> Authority:
        return Authority(host=self.host, port=self.port)

    @property
    def object(self) -> str:
        """The request as one printable line for the log: method and URL without the query."""
        if self.form is Form.CONNECT:
            return f"CONNECT {self.authority}"
        if self.form is Form.NAME:
            return f"LOOKUP {self.host}"
        if self.form is Form.MCP:
            shown = " ".join(word for word in (self.rpc_method, self.tool) if word)
            return f"{self.method} mcp:{self.server}{' ' if shown else ''}{shown}"
        return f"{self.method} {self.scheme}://{self.authority.url_form(self.scheme)}{self.path}"
