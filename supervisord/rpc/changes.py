"""ChangeService: decode, call, encode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from stockade.v1 import changes_pb2, changes_pb2_grpc

from supervisord.callers import current_caller
from supervisord.errors import InvalidInput
from supervisord.layers import PATHS_MAX
from supervisord.rpc import convert

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Sequence

    import grpc

    from supervisord.layers import Change, Layers

CHANGES_PER_MESSAGE_MAX: Final = 128
PATH_BYTES_MAX: Final = 4096

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class ChangeService(changes_pb2_grpc.ChangeServiceServicer):
    def __init__(self, *, layers: Layers) -> None:
        self._layers = layers

    async def Diff(
        self, request: changes_pb2.DiffRequest, _context: Context
    ) -> AsyncIterator[changes_pb2.DiffResponse]:
        found = await self._layers.diff(
            request.agent, paths=_paths(request.paths), patch=request.patch, caller=current_caller()
        )
        for some in _chunks(found.changes):
            yield changes_pb2.DiffResponse(changes=[convert.change(each) for each in some])
        yield changes_pb2.DiffResponse(summary=convert.changes_summary(found))

    async def Apply(
        self, request: changes_pb2.ApplyRequest, _context: Context
    ) -> AsyncIterator[changes_pb2.ApplyResponse]:
        done = await self._layers.apply(
            request.agent,
            paths=_paths(request.paths),
            force=request.force,
            digest=convert.text("digest", request.digest),
            reason=convert.text("reason", request.reason),
            caller=current_caller(),
        )
        for some in _chunks(done.changes):
            yield changes_pb2.ApplyResponse(changes=[convert.applied(each) for each in some])
        yield changes_pb2.ApplyResponse(summary=convert.changes_summary(done))

    async def Discard(self, request: changes_pb2.DiscardRequest, _context: Context) -> changes_pb2.DiscardResponse:
        layer = await self._layers.discard(
            request.agent, reason=convert.text("reason", request.reason), caller=current_caller()
        )
        return changes_pb2.DiscardResponse(agent_id=layer.agent_id)


def _paths(paths: Sequence[bytes]) -> tuple[bytes, ...]:
    if len(paths) > PATHS_MAX or any(not path.strip(b"/") or len(path) > PATH_BYTES_MAX for path in paths):
        raise InvalidInput(
            f"cannot take the paths: more than {PATHS_MAX}, or one that is empty or longer than {PATH_BYTES_MAX} bytes",
            remedy="name directories, relative to the workspace",
        )
    return tuple(paths)


def _chunks(changes: Sequence[Change]) -> Iterator[Sequence[Change]]:
    """Parts that fit into a message each; a patch is long, a path is not."""
    some: list[Change] = []
    size = 0
    for change in changes:
        if some and (len(some) >= CHANGES_PER_MESSAGE_MAX or size + len(change.patch) > 1 << 20):
            yield some
            some, size = [], 0
        some.append(change)
        size += len(change.patch)
    if some:
        yield some
