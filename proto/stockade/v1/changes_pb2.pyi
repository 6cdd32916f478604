# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ChangeKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHANGE_KIND_UNSPECIFIED: _ClassVar[ChangeKind]
    CHANGE_KIND_ADDED: _ClassVar[ChangeKind]
    CHANGE_KIND_MODIFIED: _ClassVar[ChangeKind]
    CHANGE_KIND_DELETED: _ClassVar[ChangeKind]

class ApplyOutcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    APPLY_OUTCOME_UNSPECIFIED: _ClassVar[ApplyOutcome]
    APPLY_OUTCOME_APPLIED: _ClassVar[ApplyOutcome]
    APPLY_OUTCOME_CONFLICT: _ClassVar[ApplyOutcome]
    APPLY_OUTCOME_REFUSED: _ClassVar[ApplyOutcome]
    APPLY_OUTCOME_FAILED: _ClassVar[ApplyOutcome]
CHANGE_KIND_UNSPECIFIED: ChangeKind
CHANGE_KIND_ADDED: ChangeKind
CHANGE_KIND_MODIFIED: ChangeKind
CHANGE_KIND_DELETED: ChangeKind
APPLY_OUTCOME_UNSPECIFIED: ApplyOutcome
APPLY_OUTCOME_APPLIED: ApplyOutcome
APPLY_OUTCOME_CONFLICT: ApplyOutcome
APPLY_OUTCOME_REFUSED: ApplyOutcome
APPLY_OUTCOME_FAILED: ApplyOutcome

class Change(_message.Message):
    __slots__ = ("path", "kind", "type", "size_bytes", "mode", "sha256", "link", "notes", "conflict", "refused", "patch")
    PATH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    CONFLICT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    path: bytes
    kind: ChangeKind
    type: str
    size_bytes: int
    mode: int
    sha256: str
    link: bytes
    notes: _containers.RepeatedScalarFieldContainer[str]
    conflict: str
    refused: str
    patch: bytes
    def __init__(self, path: _Optional[bytes] = ..., kind: _Optional[_Union[ChangeKind, str]] = ..., type: _Optional[str] = ..., size_bytes: _Optional[int] = ..., mode: _Optional[int] = ..., sha256: _Optional[str] = ..., link: _Optional[bytes] = ..., notes: _Optional[_Iterable[str]] = ..., conflict: _Optional[str] = ..., refused: _Optional[str] = ..., patch: _Optional[bytes] = ...) -> None: ...

class ChangesSummary(_message.Message):
    __slots__ = ("agent_id", "agent_name", "workspace", "digest", "kept")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_NAME_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    agent_name: str
    workspace: str
    digest: str
    kept: bool
    def __init__(self, agent_id: _Optional[str] = ..., agent_name: _Optional[str] = ..., workspace: _Optional[str] = ..., digest: _Optional[str] = ..., kept: _Optional[bool] = ...) -> None: ...

class DiffRequest(_message.Message):
    __slots__ = ("agent", "paths", "patch")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    agent: str
    paths: _containers.RepeatedScalarFieldContainer[bytes]
    patch: bool
    def __init__(self, agent: _Optional[str] = ..., paths: _Optional[_Iterable[bytes]] = ..., patch: _Optional[bool] = ...) -> None: ...

class DiffResponse(_message.Message):
    __slots__ = ("changes", "summary")
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[Change]
    summary: ChangesSummary
    def __init__(self, changes: _Optional[_Iterable[_Union[Change, _Mapping]]] = ..., summary: _Optional[_Union[ChangesSummary, _Mapping]] = ...) -> None: ...

class ApplyRequest(_message.Message):
    __slots__ = ("agent", "paths", "force", "digest", "reason")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    PATHS_FIELD_NUMBER: _ClassVar[int]
    FORCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    agent: str
    paths: _containers.RepeatedScalarFieldContainer[bytes]
    force: bool
    digest: str
    reason: str
    def __init__(self, agent: _Optional[str] = ..., paths: _Optional[_Iterable[bytes]] = ..., force: _Optional[bool] = ..., digest: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ApplyResponse(_message.Message):
    __slots__ = ("changes", "summary")
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    changes: _containers.RepeatedCompositeFieldContainer[AppliedChange]
    summary: ChangesSummary
    def __init__(self, changes: _Optional[_Iterable[_Union[AppliedChange, _Mapping]]] = ..., summary: _Optional[_Union[ChangesSummary, _Mapping]] = ...) -> None: ...

class AppliedChange(_message.Message):
    __slots__ = ("change", "outcome", "why")
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    change: Change
    outcome: ApplyOutcome
    why: str
    def __init__(self, change: _Optional[_Union[Change, _Mapping]] = ..., outcome: _Optional[_Union[ApplyOutcome, str]] = ..., why: _Optional[str] = ...) -> None: ...

class DiscardRequest(_message.Message):
    __slots__ = ("agent", "reason")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    agent: str
    reason: str
    def __init__(self, agent: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class DiscardResponse(_message.Message):
    __slots__ = ("agent_id",)
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    def __init__(self, agent_id: _Optional[str] = ...) -> None: ...
