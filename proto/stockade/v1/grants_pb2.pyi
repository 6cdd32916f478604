# mypy: ignore-errors
import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GrantState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRANT_STATE_UNSPECIFIED: _ClassVar[GrantState]
    GRANT_STATE_ACTIVE: _ClassVar[GrantState]
    GRANT_STATE_EXPIRED: _ClassVar[GrantState]
    GRANT_STATE_USED_UP: _ClassVar[GrantState]
    GRANT_STATE_REVOKED: _ClassVar[GrantState]
GRANT_STATE_UNSPECIFIED: GrantState
GRANT_STATE_ACTIVE: GrantState
GRANT_STATE_EXPIRED: GrantState
GRANT_STATE_USED_UP: GrantState
GRANT_STATE_REVOKED: GrantState

class ScopeGrant(_message.Message):
    __slots__ = ("grant_id", "agent_id", "agent_name", "scope", "state", "granted_at", "expires_at", "uses_left", "uses", "granted_by", "reason", "bytes_left", "bytes_used", "cost_usd_left", "cost_usd", "ticket")
    GRANT_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_NAME_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    GRANTED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    USES_LEFT_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    GRANTED_BY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BYTES_LEFT_FIELD_NUMBER: _ClassVar[int]
    BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    COST_USD_LEFT_FIELD_NUMBER: _ClassVar[int]
    COST_USD_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    grant_id: str
    agent_id: str
    agent_name: str
    scope: str
    state: GrantState
    granted_at: _timestamp_pb2.Timestamp
    expires_at: _timestamp_pb2.Timestamp
    uses_left: int
    uses: int
    granted_by: str
    reason: str
    bytes_left: int
    bytes_used: int
    cost_usd_left: float
    cost_usd: float
    ticket: str
    def __init__(self, grant_id: _Optional[str] = ..., agent_id: _Optional[str] = ..., agent_name: _Optional[str] = ..., scope: _Optional[str] = ..., state: _Optional[_Union[GrantState, str]] = ..., granted_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expires_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., uses_left: _Optional[int] = ..., uses: _Optional[int] = ..., granted_by: _Optional[str] = ..., reason: _Optional[str] = ..., bytes_left: _Optional[int] = ..., bytes_used: _Optional[int] = ..., cost_usd_left: _Optional[float] = ..., cost_usd: _Optional[float] = ..., ticket: _Optional[str] = ...) -> None: ...

class GrantRequest(_message.Message):
    __slots__ = ("agent", "scope", "ttl", "max_uses", "reason", "grant_id", "max_bytes", "max_cost_usd", "ticket")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    MAX_USES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    GRANT_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_COST_USD_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    agent: str
    scope: str
    ttl: _duration_pb2.Duration
    max_uses: int
    reason: str
    grant_id: str
    max_bytes: int
    max_cost_usd: float
    ticket: str
    def __init__(self, agent: _Optional[str] = ..., scope: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_uses: _Optional[int] = ..., reason: _Optional[str] = ..., grant_id: _Optional[str] = ..., max_bytes: _Optional[int] = ..., max_cost_usd: _Optional[float] = ..., ticket: _Optional[str] = ...) -> None: ...

class GrantResponse(_message.Message):
    __slots__ = ("grant",)
    GRANT_FIELD_NUMBER: _ClassVar[int]
    grant: ScopeGrant
    def __init__(self, grant: _Optional[_Union[ScopeGrant, _Mapping]] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("grant_id", "reason")
    GRANT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    grant_id: str
    reason: str
    def __init__(self, grant_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RevokeResponse(_message.Message):
    __slots__ = ("grant", "relays_cut", "warning")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    RELAYS_CUT_FIELD_NUMBER: _ClassVar[int]
    WARNING_FIELD_NUMBER: _ClassVar[int]
    grant: ScopeGrant
    relays_cut: int
    warning: str
    def __init__(self, grant: _Optional[_Union[ScopeGrant, _Mapping]] = ..., relays_cut: _Optional[int] = ..., warning: _Optional[str] = ...) -> None: ...

class ListGrantsRequest(_message.Message):
    __slots__ = ("agent", "include_ended", "page_size", "page_token")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_ENDED_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    agent: str
    include_ended: bool
    page_size: int
    page_token: str
    def __init__(self, agent: _Optional[str] = ..., include_ended: _Optional[bool] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListGrantsResponse(_message.Message):
    __slots__ = ("grants", "next_page_token")
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    grants: _containers.RepeatedCompositeFieldContainer[ScopeGrant]
    next_page_token: str
    def __init__(self, grants: _Optional[_Iterable[_Union[ScopeGrant, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...
