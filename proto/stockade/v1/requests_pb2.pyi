# mypy: ignore-errors
import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from stockade.v1 import grants_pb2 as _grants_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RequestState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REQUEST_STATE_UNSPECIFIED: _ClassVar[RequestState]
    REQUEST_STATE_PENDING: _ClassVar[RequestState]
    REQUEST_STATE_APPROVED: _ClassVar[RequestState]
    REQUEST_STATE_DENIED: _ClassVar[RequestState]
    REQUEST_STATE_EXPIRED: _ClassVar[RequestState]
REQUEST_STATE_UNSPECIFIED: RequestState
REQUEST_STATE_PENDING: RequestState
REQUEST_STATE_APPROVED: RequestState
REQUEST_STATE_DENIED: RequestState
REQUEST_STATE_EXPIRED: RequestState

class ScopeRequest(_message.Message):
    __slots__ = ("request_id", "agent_id", "agent_name", "scope", "reason", "state", "asked_at", "decided_at", "decided_by", "grant_id", "digest", "approved_by", "approvers", "answer")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_NAME_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ASKED_AT_FIELD_NUMBER: _ClassVar[int]
    DECIDED_AT_FIELD_NUMBER: _ClassVar[int]
    DECIDED_BY_FIELD_NUMBER: _ClassVar[int]
    GRANT_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    APPROVED_BY_FIELD_NUMBER: _ClassVar[int]
    APPROVERS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    agent_id: str
    agent_name: str
    scope: str
    reason: str
    state: RequestState
    asked_at: _timestamp_pb2.Timestamp
    decided_at: _timestamp_pb2.Timestamp
    decided_by: str
    grant_id: str
    digest: str
    approved_by: _containers.RepeatedScalarFieldContainer[str]
    approvers: int
    answer: str
    def __init__(self, request_id: _Optional[str] = ..., agent_id: _Optional[str] = ..., agent_name: _Optional[str] = ..., scope: _Optional[str] = ..., reason: _Optional[str] = ..., state: _Optional[_Union[RequestState, str]] = ..., asked_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., decided_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., decided_by: _Optional[str] = ..., grant_id: _Optional[str] = ..., digest: _Optional[str] = ..., approved_by: _Optional[_Iterable[str]] = ..., approvers: _Optional[int] = ..., answer: _Optional[str] = ...) -> None: ...

class ListRequestsRequest(_message.Message):
    __slots__ = ("agent", "include_decided", "page_size", "page_token")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_DECIDED_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    agent: str
    include_decided: bool
    page_size: int
    page_token: str
    def __init__(self, agent: _Optional[str] = ..., include_decided: _Optional[bool] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListRequestsResponse(_message.Message):
    __slots__ = ("requests", "next_page_token")
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[ScopeRequest]
    next_page_token: str
    def __init__(self, requests: _Optional[_Iterable[_Union[ScopeRequest, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ApproveRequest(_message.Message):
    __slots__ = ("request_id", "scope", "ttl", "max_uses", "reason", "digest", "max_bytes", "max_cost_usd", "ticket")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    TTL_FIELD_NUMBER: _ClassVar[int]
    MAX_USES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_COST_USD_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    scope: str
    ttl: _duration_pb2.Duration
    max_uses: int
    reason: str
    digest: str
    max_bytes: int
    max_cost_usd: float
    ticket: str
    def __init__(self, request_id: _Optional[str] = ..., scope: _Optional[str] = ..., ttl: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_uses: _Optional[int] = ..., reason: _Optional[str] = ..., digest: _Optional[str] = ..., max_bytes: _Optional[int] = ..., max_cost_usd: _Optional[float] = ..., ticket: _Optional[str] = ...) -> None: ...

class ApproveResponse(_message.Message):
    __slots__ = ("request", "grant")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    GRANT_FIELD_NUMBER: _ClassVar[int]
    request: ScopeRequest
    grant: _grants_pb2.ScopeGrant
    def __init__(self, request: _Optional[_Union[ScopeRequest, _Mapping]] = ..., grant: _Optional[_Union[_grants_pb2.ScopeGrant, _Mapping]] = ...) -> None: ...

class DenyRequest(_message.Message):
    __slots__ = ("request_id", "reason")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    reason: str
    def __init__(self, request_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class DenyResponse(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: ScopeRequest
    def __init__(self, request: _Optional[_Union[ScopeRequest, _Mapping]] = ...) -> None: ...

class WatchRequestsRequest(_message.Message):
    __slots__ = ("resume_token",)
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    resume_token: str
    def __init__(self, resume_token: _Optional[str] = ...) -> None: ...

class WatchRequestsResponse(_message.Message):
    __slots__ = ("request", "resume_token")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    request: ScopeRequest
    resume_token: str
    def __init__(self, request: _Optional[_Union[ScopeRequest, _Mapping]] = ..., resume_token: _Optional[str] = ...) -> None: ...
