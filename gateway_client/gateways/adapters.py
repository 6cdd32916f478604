"""The adapters by kind, as `[gateway] kind` names them. A new gateway is a module and a line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway_client.gateways.embedded.adapter import Embedded
from gateway_client.gateways.litellm import LiteLLM
from gateway_client.gateways.openai_compatible import OpenAICompatible

if TYPE_CHECKING:
    from gateway_client.egress.upstream import GatewayAdapter

ADAPTERS: Final[dict[str, GatewayAdapter]] = {
    "embedded": Embedded(),
    "litellm": LiteLLM(),
    "openai": OpenAICompatible(),
}


def adapter(kind: str) -> GatewayAdapter:
    """Return the adapter of a kind; raises LookupError naming the known ones."""
    try:
        return ADAPTERS[kind]
    except KeyError:
        raise LookupError(f"cannot use gateway kind {kind!r}: known are {', '.join(ADAPTERS)}") from None
