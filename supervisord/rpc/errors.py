"""One table: which error of ours is which gRPC status, with the reason and the remedy as rich details."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn

import grpc
import structlog
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]  # googleapis ships no stubs

from supervisord.errors import CannotLaunch, ErrorCode, StockadeError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

log = structlog.get_logger()

STATUS: Final[dict[ErrorCode, grpc.StatusCode]] = {
    ErrorCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorCode.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    ErrorCode.CONFLICT: grpc.StatusCode.ALREADY_EXISTS,
    ErrorCode.HELD: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorCode.INVALID_INPUT: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorCode.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.CANNOT_LAUNCH: grpc.StatusCode.ABORTED,
    ErrorCode.CANNOT_RECORD: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.INTERNAL: grpc.StatusCode.INTERNAL,
}


def status_of(error: StockadeError) -> status_pb2.Status:
    """The error as google.rpc.Status: ErrorInfo has the code (and the launch step), LocalizedMessage the remedy."""
    metadata = {}
    if isinstance(error, CannotLaunch):
        metadata = {"step": error.step, "errno": str(error.errno)}
    details = []
    for message in (
        error_details_pb2.ErrorInfo(reason=error.code.value.upper(), domain="stockade", metadata=metadata),
        error_details_pb2.LocalizedMessage(locale="en", message=error.remedy),
    ):
        packed = AnyMessage()
        packed.Pack(message)
        details.append(packed)
    return status_pb2.Status(code=STATUS[error.code].value[0], message=error.message, details=details)


class ErrorInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs only
    """Turns our errors into statuses for every method, so that none needs to."""

    async def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        if handler.response_streaming:
            inner_stream = handler.stream_stream or handler.unary_stream

            async def stream(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[object]:
                try:
                    async for message in inner_stream(request, context):
                        yield message
                except Exception as error:  # noqa: BLE001 - the border: nothing passes it unnamed
                    await _abort(context, error, method)

            make = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            return make(stream, handler.request_deserializer, handler.response_serializer)
        inner = handler.stream_unary or handler.unary_unary

        async def unary(request: object, context: grpc.aio.ServicerContext[Any, Any]) -> object:
            try:
                return await inner(request, context)
            except Exception as error:  # noqa: BLE001 - as above
                await _abort(context, error, method)

        make_unary = (
            grpc.stream_unary_rpc_method_handler if handler.request_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make_unary(unary, handler.request_deserializer, handler.response_serializer)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, method: str) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, StockadeError):
        # The caller learns that it was us; the cause may name what is not theirs to know, so it goes to the journal.
        log.error("a method failed", method=method, exc_info=error)
        error = StockadeError(
            f"cannot serve {method}: an error of the daemon's own", remedy="see its journal, and report it"
        )
    status = status_of(error)
    await context.abort(STATUS[error.code], status.message, (("grpc-status-details-bin", status.SerializeToString()),))
    raise AssertionError("abort returned")
