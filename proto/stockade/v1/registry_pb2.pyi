# mypy: ignore-errors
import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from stockade.v1 import agents_pb2 as _agents_pb2
from stockade.v1 import grants_pb2 as _grants_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RiskClass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RISK_CLASS_UNSPECIFIED: _ClassVar[RiskClass]
    RISK_CLASS_MINIMAL: _ClassVar[RiskClass]
    RISK_CLASS_LIMITED: _ClassVar[RiskClass]
    RISK_CLASS_HIGH: _ClassVar[RiskClass]
RISK_CLASS_UNSPECIFIED: RiskClass
RISK_CLASS_MINIMAL: RiskClass
RISK_CLASS_LIMITED: RiskClass
RISK_CLASS_HIGH: RiskClass

class Reach(_message.Message):
    __slots__ = ("files", "hosts", "models", "tools")
    FILES_FIELD_NUMBER: _ClassVar[int]
    HOSTS_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    TOOLS_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedScalarFieldContainer[str]
    hosts: _containers.RepeatedScalarFieldContainer[str]
    models: _containers.RepeatedScalarFieldContainer[str]
    tools: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, files: _Optional[_Iterable[str]] = ..., hosts: _Optional[_Iterable[str]] = ..., models: _Optional[_Iterable[str]] = ..., tools: _Optional[_Iterable[str]] = ...) -> None: ...

class Definition(_message.Message):
    __slots__ = ("name", "version", "digest", "owner", "purpose", "risk", "contact", "policy", "models", "data", "scopes", "reach", "labels", "registered_by", "registered_at", "deprecated", "deprecated_by", "deprecated_at", "problem")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    RISK_FIELD_NUMBER: _ClassVar[int]
    CONTACT_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    REACH_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_BY_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_AT_FIELD_NUMBER: _ClassVar[int]
    DEPRECATED_FIELD_NUMBER: _ClassVar[int]
    DEPRECATED_BY_FIELD_NUMBER: _ClassVar[int]
    DEPRECATED_AT_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: int
    digest: str
    owner: str
    purpose: str
    risk: RiskClass
    contact: str
    policy: str
    models: _containers.RepeatedScalarFieldContainer[str]
    data: _containers.RepeatedScalarFieldContainer[str]
    scopes: _containers.RepeatedScalarFieldContainer[str]
    reach: Reach
    labels: _containers.ScalarMap[str, str]
    registered_by: str
    registered_at: _timestamp_pb2.Timestamp
    deprecated: str
    deprecated_by: str
    deprecated_at: _timestamp_pb2.Timestamp
    problem: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., owner: _Optional[str] = ..., purpose: _Optional[str] = ..., risk: _Optional[_Union[RiskClass, str]] = ..., contact: _Optional[str] = ..., policy: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., data: _Optional[_Iterable[str]] = ..., scopes: _Optional[_Iterable[str]] = ..., reach: _Optional[_Union[Reach, _Mapping]] = ..., labels: _Optional[_Mapping[str, str]] = ..., registered_by: _Optional[str] = ..., registered_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., deprecated: _Optional[str] = ..., deprecated_by: _Optional[str] = ..., deprecated_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., problem: _Optional[str] = ...) -> None: ...

class RegisterDefinitionRequest(_message.Message):
    __slots__ = ("content", "filename", "directory")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    FILENAME_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    filename: str
    directory: str
    def __init__(self, content: _Optional[bytes] = ..., filename: _Optional[str] = ..., directory: _Optional[str] = ...) -> None: ...

class RegisterDefinitionResponse(_message.Message):
    __slots__ = ("definition", "existed")
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    definition: Definition
    existed: bool
    def __init__(self, definition: _Optional[_Union[Definition, _Mapping]] = ..., existed: _Optional[bool] = ...) -> None: ...

class GetDefinitionRequest(_message.Message):
    __slots__ = ("reference",)
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    reference: str
    def __init__(self, reference: _Optional[str] = ...) -> None: ...

class GetDefinitionResponse(_message.Message):
    __slots__ = ("definition", "content")
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    definition: Definition
    content: bytes
    def __init__(self, definition: _Optional[_Union[Definition, _Mapping]] = ..., content: _Optional[bytes] = ...) -> None: ...

class ListDefinitionsRequest(_message.Message):
    __slots__ = ("name", "page_size", "page_token")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    page_size: int
    page_token: str
    def __init__(self, name: _Optional[str] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListDefinitionsResponse(_message.Message):
    __slots__ = ("definitions", "next_page_token")
    DEFINITIONS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    definitions: _containers.RepeatedCompositeFieldContainer[Definition]
    next_page_token: str
    def __init__(self, definitions: _Optional[_Iterable[_Union[Definition, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class DeprecateDefinitionRequest(_message.Message):
    __slots__ = ("reference", "reason")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    reference: str
    reason: str
    def __init__(self, reference: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class DeprecateDefinitionResponse(_message.Message):
    __slots__ = ("definition",)
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    definition: Definition
    def __init__(self, definition: _Optional[_Union[Definition, _Mapping]] = ...) -> None: ...

class ReviewRequest(_message.Message):
    __slots__ = ("unused",)
    UNUSED_FIELD_NUMBER: _ClassVar[int]
    unused: _duration_pb2.Duration
    def __init__(self, unused: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ReviewFinding(_message.Message):
    __slots__ = ("kind", "subject", "agent_id", "owner", "detail", "remedy")
    KIND_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    REMEDY_FIELD_NUMBER: _ClassVar[int]
    kind: str
    subject: str
    agent_id: str
    owner: str
    detail: str
    remedy: str
    def __init__(self, kind: _Optional[str] = ..., subject: _Optional[str] = ..., agent_id: _Optional[str] = ..., owner: _Optional[str] = ..., detail: _Optional[str] = ..., remedy: _Optional[str] = ...) -> None: ...

class ReviewResponse(_message.Message):
    __slots__ = ("findings", "left_out")
    FINDINGS_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    findings: _containers.RepeatedCompositeFieldContainer[ReviewFinding]
    left_out: int
    def __init__(self, findings: _Optional[_Iterable[_Union[ReviewFinding, _Mapping]]] = ..., left_out: _Optional[int] = ...) -> None: ...

class ListRunningRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class RunningAgent(_message.Message):
    __slots__ = ("agent", "risk", "policy_risk", "contact", "grants", "budget", "budget_left", "deprecated")
    class BudgetEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class BudgetLeftEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    AGENT_FIELD_NUMBER: _ClassVar[int]
    RISK_FIELD_NUMBER: _ClassVar[int]
    POLICY_RISK_FIELD_NUMBER: _ClassVar[int]
    CONTACT_FIELD_NUMBER: _ClassVar[int]
    GRANTS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    BUDGET_LEFT_FIELD_NUMBER: _ClassVar[int]
    DEPRECATED_FIELD_NUMBER: _ClassVar[int]
    agent: _agents_pb2.Agent
    risk: RiskClass
    policy_risk: RiskClass
    contact: str
    grants: _containers.RepeatedCompositeFieldContainer[_grants_pb2.ScopeGrant]
    budget: _containers.ScalarMap[str, float]
    budget_left: _containers.ScalarMap[str, float]
    deprecated: str
    def __init__(self, agent: _Optional[_Union[_agents_pb2.Agent, _Mapping]] = ..., risk: _Optional[_Union[RiskClass, str]] = ..., policy_risk: _Optional[_Union[RiskClass, str]] = ..., contact: _Optional[str] = ..., grants: _Optional[_Iterable[_Union[_grants_pb2.ScopeGrant, _Mapping]]] = ..., budget: _Optional[_Mapping[str, float]] = ..., budget_left: _Optional[_Mapping[str, float]] = ..., deprecated: _Optional[str] = ...) -> None: ...

class ListRunningResponse(_message.Message):
    __slots__ = ("agents", "next_page_token")
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    agents: _containers.RepeatedCompositeFieldContainer[RunningAgent]
    next_page_token: str
    def __init__(self, agents: _Optional[_Iterable[_Union[RunningAgent, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...
