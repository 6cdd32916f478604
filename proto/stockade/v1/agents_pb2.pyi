# mypy: ignore-errors
import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import struct_pb2 as _struct_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AgentState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    AGENT_STATE_UNSPECIFIED: _ClassVar[AgentState]
    AGENT_STATE_STARTING: _ClassVar[AgentState]
    AGENT_STATE_RUNNING: _ClassVar[AgentState]
    AGENT_STATE_FROZEN: _ClassVar[AgentState]
    AGENT_STATE_KILLING: _ClassVar[AgentState]
    AGENT_STATE_KILLED: _ClassVar[AgentState]
    AGENT_STATE_EXITED: _ClassVar[AgentState]
    AGENT_STATE_FAILED: _ClassVar[AgentState]

class WorkspaceMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKSPACE_MODE_UNSPECIFIED: _ClassVar[WorkspaceMode]
    WORKSPACE_MODE_READ_ONLY: _ClassVar[WorkspaceMode]
    WORKSPACE_MODE_READ_WRITE: _ClassVar[WorkspaceMode]
    WORKSPACE_MODE_OVERLAY: _ClassVar[WorkspaceMode]

class OutputStream(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTPUT_STREAM_UNSPECIFIED: _ClassVar[OutputStream]
    OUTPUT_STREAM_STDOUT: _ClassVar[OutputStream]
    OUTPUT_STREAM_STDERR: _ClassVar[OutputStream]
AGENT_STATE_UNSPECIFIED: AgentState
AGENT_STATE_STARTING: AgentState
AGENT_STATE_RUNNING: AgentState
AGENT_STATE_FROZEN: AgentState
AGENT_STATE_KILLING: AgentState
AGENT_STATE_KILLED: AgentState
AGENT_STATE_EXITED: AgentState
AGENT_STATE_FAILED: AgentState
WORKSPACE_MODE_UNSPECIFIED: WorkspaceMode
WORKSPACE_MODE_READ_ONLY: WorkspaceMode
WORKSPACE_MODE_READ_WRITE: WorkspaceMode
WORKSPACE_MODE_OVERLAY: WorkspaceMode
OUTPUT_STREAM_UNSPECIFIED: OutputStream
OUTPUT_STREAM_STDOUT: OutputStream
OUTPUT_STREAM_STDERR: OutputStream

class ExitStatus(_message.Message):
    __slots__ = ("code", "signal", "out_of_memory")
    CODE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_MEMORY_FIELD_NUMBER: _ClassVar[int]
    code: int
    signal: int
    out_of_memory: bool
    def __init__(self, code: _Optional[int] = ..., signal: _Optional[int] = ..., out_of_memory: _Optional[bool] = ...) -> None: ...

class Spend(_message.Message):
    __slots__ = ("input_tokens", "output_tokens", "cost_usd", "estimated")
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COST_USD_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_FIELD_NUMBER: _ClassVar[int]
    input_tokens: int
    output_tokens: int
    cost_usd: float
    estimated: bool
    def __init__(self, input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., cost_usd: _Optional[float] = ..., estimated: _Optional[bool] = ...) -> None: ...

class Agent(_message.Message):
    __slots__ = ("agent_id", "name", "state", "policy", "policy_digest", "labels", "exit_code", "exit_signal", "started_at", "ended_at", "memory_bytes", "pids", "launched_by", "posture", "spend", "failure", "owner", "purpose", "command", "workspace", "out_of_memory", "limits", "effective", "counters", "changes_kept", "definition", "definition_digest", "budget", "cpu_seconds", "lease_left")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    POLICY_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    EXIT_CODE_FIELD_NUMBER: _ClassVar[int]
    EXIT_SIGNAL_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    ENDED_AT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PIDS_FIELD_NUMBER: _ClassVar[int]
    LAUNCHED_BY_FIELD_NUMBER: _ClassVar[int]
    POSTURE_FIELD_NUMBER: _ClassVar[int]
    SPEND_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_FIELD_NUMBER: _ClassVar[int]
    OUT_OF_MEMORY_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    CHANGES_KEPT_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    LEASE_LEFT_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    name: str
    state: AgentState
    policy: str
    policy_digest: str
    labels: _containers.ScalarMap[str, str]
    exit_code: int
    exit_signal: int
    started_at: _timestamp_pb2.Timestamp
    ended_at: _timestamp_pb2.Timestamp
    memory_bytes: int
    pids: int
    launched_by: str
    posture: _struct_pb2.Struct
    spend: Spend
    failure: str
    owner: str
    purpose: str
    command: _containers.RepeatedScalarFieldContainer[bytes]
    workspace: Workspace
    out_of_memory: bool
    limits: Limits
    effective: _struct_pb2.Struct
    counters: _containers.ScalarMap[str, int]
    changes_kept: bool
    definition: str
    definition_digest: str
    budget: _containers.RepeatedCompositeFieldContainer[BudgetUse]
    cpu_seconds: float
    lease_left: _duration_pb2.Duration
    def __init__(self, agent_id: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[_Union[AgentState, str]] = ..., policy: _Optional[str] = ..., policy_digest: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., exit_code: _Optional[int] = ..., exit_signal: _Optional[int] = ..., started_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ended_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., memory_bytes: _Optional[int] = ..., pids: _Optional[int] = ..., launched_by: _Optional[str] = ..., posture: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., spend: _Optional[_Union[Spend, _Mapping]] = ..., failure: _Optional[str] = ..., owner: _Optional[str] = ..., purpose: _Optional[str] = ..., command: _Optional[_Iterable[bytes]] = ..., workspace: _Optional[_Union[Workspace, _Mapping]] = ..., out_of_memory: _Optional[bool] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., effective: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., counters: _Optional[_Mapping[str, int]] = ..., changes_kept: _Optional[bool] = ..., definition: _Optional[str] = ..., definition_digest: _Optional[str] = ..., budget: _Optional[_Iterable[_Union[BudgetUse, _Mapping]]] = ..., cpu_seconds: _Optional[float] = ..., lease_left: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class BudgetUse(_message.Message):
    __slots__ = ("bound", "spent", "limit", "reserved", "label", "since")
    BOUND_FIELD_NUMBER: _ClassVar[int]
    SPENT_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    bound: str
    spent: float
    limit: float
    reserved: float
    label: str
    since: str
    def __init__(self, bound: _Optional[str] = ..., spent: _Optional[float] = ..., limit: _Optional[float] = ..., reserved: _Optional[float] = ..., label: _Optional[str] = ..., since: _Optional[str] = ...) -> None: ...

class Workspace(_message.Message):
    __slots__ = ("path", "mode")
    PATH_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    path: str
    mode: WorkspaceMode
    def __init__(self, path: _Optional[str] = ..., mode: _Optional[_Union[WorkspaceMode, str]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("memory_bytes", "cpus", "pids")
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    PIDS_FIELD_NUMBER: _ClassVar[int]
    memory_bytes: int
    cpus: float
    pids: int
    def __init__(self, memory_bytes: _Optional[int] = ..., cpus: _Optional[float] = ..., pids: _Optional[int] = ...) -> None: ...

class TerminalSize(_message.Message):
    __slots__ = ("rows", "cols")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    cols: int
    def __init__(self, rows: _Optional[int] = ..., cols: _Optional[int] = ...) -> None: ...

class LaunchSpec(_message.Message):
    __slots__ = ("command", "name", "policy", "workspace", "scopes", "labels", "limits", "budget", "env", "tty", "stdin", "owner", "purpose", "lease")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class BudgetEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    WORKSPACE_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    TTY_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    PURPOSE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FIELD_NUMBER: _ClassVar[int]
    command: _containers.RepeatedScalarFieldContainer[bytes]
    name: str
    policy: str
    workspace: Workspace
    scopes: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.ScalarMap[str, str]
    limits: Limits
    budget: _containers.ScalarMap[str, float]
    env: _containers.ScalarMap[str, str]
    tty: TerminalSize
    stdin: bool
    owner: str
    purpose: str
    lease: _duration_pb2.Duration
    def __init__(self, command: _Optional[_Iterable[bytes]] = ..., name: _Optional[str] = ..., policy: _Optional[str] = ..., workspace: _Optional[_Union[Workspace, _Mapping]] = ..., scopes: _Optional[_Iterable[str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., budget: _Optional[_Mapping[str, float]] = ..., env: _Optional[_Mapping[str, str]] = ..., tty: _Optional[_Union[TerminalSize, _Mapping]] = ..., stdin: _Optional[bool] = ..., owner: _Optional[str] = ..., purpose: _Optional[str] = ..., lease: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class LaunchRequest(_message.Message):
    __slots__ = ("spec", "definition_yaml", "definition_filename", "definition_directory", "agent_id", "idempotency_key", "dry_run", "registered")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_YAML_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_FILENAME_FIELD_NUMBER: _ClassVar[int]
    DEFINITION_DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    REGISTERED_FIELD_NUMBER: _ClassVar[int]
    spec: LaunchSpec
    definition_yaml: bytes
    definition_filename: str
    definition_directory: str
    agent_id: str
    idempotency_key: str
    dry_run: bool
    registered: str
    def __init__(self, spec: _Optional[_Union[LaunchSpec, _Mapping]] = ..., definition_yaml: _Optional[bytes] = ..., definition_filename: _Optional[str] = ..., definition_directory: _Optional[str] = ..., agent_id: _Optional[str] = ..., idempotency_key: _Optional[str] = ..., dry_run: _Optional[bool] = ..., registered: _Optional[str] = ...) -> None: ...

class LaunchResponse(_message.Message):
    __slots__ = ("agent", "plan_text", "existed")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    PLAN_TEXT_FIELD_NUMBER: _ClassVar[int]
    EXISTED_FIELD_NUMBER: _ClassVar[int]
    agent: Agent
    plan_text: str
    existed: bool
    def __init__(self, agent: _Optional[_Union[Agent, _Mapping]] = ..., plan_text: _Optional[str] = ..., existed: _Optional[bool] = ...) -> None: ...

class GetAgentRequest(_message.Message):
    __slots__ = ("agent", "examine")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    EXAMINE_FIELD_NUMBER: _ClassVar[int]
    agent: str
    examine: bool
    def __init__(self, agent: _Optional[str] = ..., examine: _Optional[bool] = ...) -> None: ...

class GetAgentResponse(_message.Message):
    __slots__ = ("agent",)
    AGENT_FIELD_NUMBER: _ClassVar[int]
    agent: Agent
    def __init__(self, agent: _Optional[_Union[Agent, _Mapping]] = ...) -> None: ...

class Selector(_message.Message):
    __slots__ = ("agents", "labels", "policy", "owner", "all")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    agents: _containers.RepeatedScalarFieldContainer[str]
    labels: _containers.ScalarMap[str, str]
    policy: str
    owner: str
    all: bool
    def __init__(self, agents: _Optional[_Iterable[str]] = ..., labels: _Optional[_Mapping[str, str]] = ..., policy: _Optional[str] = ..., owner: _Optional[str] = ..., all: _Optional[bool] = ...) -> None: ...

class ListAgentsRequest(_message.Message):
    __slots__ = ("selector", "include_ended", "page_size", "page_token")
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_ENDED_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    selector: Selector
    include_ended: bool
    page_size: int
    page_token: str
    def __init__(self, selector: _Optional[_Union[Selector, _Mapping]] = ..., include_ended: _Optional[bool] = ..., page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListAgentsResponse(_message.Message):
    __slots__ = ("agents", "next_page_token")
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    agents: _containers.RepeatedCompositeFieldContainer[Agent]
    next_page_token: str
    def __init__(self, agents: _Optional[_Iterable[_Union[Agent, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class WatchAgentsRequest(_message.Message):
    __slots__ = ("selector", "resume_token")
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    selector: Selector
    resume_token: str
    def __init__(self, selector: _Optional[_Union[Selector, _Mapping]] = ..., resume_token: _Optional[str] = ...) -> None: ...

class WatchAgentsResponse(_message.Message):
    __slots__ = ("agent", "resume_token")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    RESUME_TOKEN_FIELD_NUMBER: _ClassVar[int]
    agent: Agent
    resume_token: str
    def __init__(self, agent: _Optional[_Union[Agent, _Mapping]] = ..., resume_token: _Optional[str] = ...) -> None: ...

class WaitRequest(_message.Message):
    __slots__ = ("agent", "timeout")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    agent: str
    timeout: _duration_pb2.Duration
    def __init__(self, agent: _Optional[str] = ..., timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class WaitResponse(_message.Message):
    __slots__ = ("agent",)
    AGENT_FIELD_NUMBER: _ClassVar[int]
    agent: Agent
    def __init__(self, agent: _Optional[_Union[Agent, _Mapping]] = ...) -> None: ...

class LogsRequest(_message.Message):
    __slots__ = ("agent", "follow", "streams", "stdout_offset", "stderr_offset")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    STREAMS_FIELD_NUMBER: _ClassVar[int]
    STDOUT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    STDERR_OFFSET_FIELD_NUMBER: _ClassVar[int]
    agent: str
    follow: bool
    streams: _containers.RepeatedScalarFieldContainer[OutputStream]
    stdout_offset: int
    stderr_offset: int
    def __init__(self, agent: _Optional[str] = ..., follow: _Optional[bool] = ..., streams: _Optional[_Iterable[_Union[OutputStream, str]]] = ..., stdout_offset: _Optional[int] = ..., stderr_offset: _Optional[int] = ...) -> None: ...

class LogsResponse(_message.Message):
    __slots__ = ("stream", "data", "offset")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    stream: OutputStream
    data: bytes
    offset: int
    def __init__(self, stream: _Optional[_Union[OutputStream, str]] = ..., data: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("start", "stdin", "stdin_eof", "resize", "signal")
    START_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    STDIN_EOF_FIELD_NUMBER: _ClassVar[int]
    RESIZE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    start: AttachStart
    stdin: bytes
    stdin_eof: bool
    resize: TerminalSize
    signal: int
    def __init__(self, start: _Optional[_Union[AttachStart, _Mapping]] = ..., stdin: _Optional[bytes] = ..., stdin_eof: _Optional[bool] = ..., resize: _Optional[_Union[TerminalSize, _Mapping]] = ..., signal: _Optional[int] = ...) -> None: ...

class AttachStart(_message.Message):
    __slots__ = ("agent", "stdout_offset", "stderr_offset")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    STDOUT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    STDERR_OFFSET_FIELD_NUMBER: _ClassVar[int]
    agent: str
    stdout_offset: int
    stderr_offset: int
    def __init__(self, agent: _Optional[str] = ..., stdout_offset: _Optional[int] = ..., stderr_offset: _Optional[int] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("started", "chunk", "exit")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    started: AttachStarted
    chunk: OutputChunk
    exit: ExitStatus
    def __init__(self, started: _Optional[_Union[AttachStarted, _Mapping]] = ..., chunk: _Optional[_Union[OutputChunk, _Mapping]] = ..., exit: _Optional[_Union[ExitStatus, _Mapping]] = ...) -> None: ...

class AttachStarted(_message.Message):
    __slots__ = ("agent_id",)
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    def __init__(self, agent_id: _Optional[str] = ...) -> None: ...

class OutputChunk(_message.Message):
    __slots__ = ("stream", "data", "offset")
    STREAM_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    stream: OutputStream
    data: bytes
    offset: int
    def __init__(self, stream: _Optional[_Union[OutputStream, str]] = ..., data: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class ExecRequest(_message.Message):
    __slots__ = ("start", "stdin", "stdin_eof", "resize", "signal")
    START_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    STDIN_EOF_FIELD_NUMBER: _ClassVar[int]
    RESIZE_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    start: ExecStart
    stdin: bytes
    stdin_eof: bool
    resize: TerminalSize
    signal: int
    def __init__(self, start: _Optional[_Union[ExecStart, _Mapping]] = ..., stdin: _Optional[bytes] = ..., stdin_eof: _Optional[bool] = ..., resize: _Optional[_Union[TerminalSize, _Mapping]] = ..., signal: _Optional[int] = ...) -> None: ...

class ExecStart(_message.Message):
    __slots__ = ("agent", "command", "env", "cwd", "tty", "stdin")
    class EnvEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    AGENT_FIELD_NUMBER: _ClassVar[int]
    COMMAND_FIELD_NUMBER: _ClassVar[int]
    ENV_FIELD_NUMBER: _ClassVar[int]
    CWD_FIELD_NUMBER: _ClassVar[int]
    TTY_FIELD_NUMBER: _ClassVar[int]
    STDIN_FIELD_NUMBER: _ClassVar[int]
    agent: str
    command: _containers.RepeatedScalarFieldContainer[bytes]
    env: _containers.ScalarMap[str, str]
    cwd: str
    tty: TerminalSize
    stdin: bool
    def __init__(self, agent: _Optional[str] = ..., command: _Optional[_Iterable[bytes]] = ..., env: _Optional[_Mapping[str, str]] = ..., cwd: _Optional[str] = ..., tty: _Optional[_Union[TerminalSize, _Mapping]] = ..., stdin: _Optional[bool] = ...) -> None: ...

class ExecResponse(_message.Message):
    __slots__ = ("started", "chunk", "exit")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    started: ExecStarted
    chunk: OutputChunk
    exit: ExitStatus
    def __init__(self, started: _Optional[_Union[ExecStarted, _Mapping]] = ..., chunk: _Optional[_Union[OutputChunk, _Mapping]] = ..., exit: _Optional[_Union[ExitStatus, _Mapping]] = ...) -> None: ...

class ExecStarted(_message.Message):
    __slots__ = ("agent_id", "stream_id")
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    agent_id: str
    stream_id: str
    def __init__(self, agent_id: _Optional[str] = ..., stream_id: _Optional[str] = ...) -> None: ...

class KillRequest(_message.Message):
    __slots__ = ("selector", "reason")
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    selector: Selector
    reason: str
    def __init__(self, selector: _Optional[_Union[Selector, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class KillResponse(_message.Message):
    __slots__ = ("receipts",)
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    receipts: _containers.RepeatedCompositeFieldContainer[Receipt]
    def __init__(self, receipts: _Optional[_Iterable[_Union[Receipt, _Mapping]]] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("receipt_id", "agent_id", "name", "verified_empty", "processes_killed", "egress_cut_ms", "dead_ms", "reason", "killed_by", "time", "already_dead", "left_pids", "statement", "signature", "relays_cut", "grants_revoked", "bytes_cut")
    RECEIPT_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_EMPTY_FIELD_NUMBER: _ClassVar[int]
    PROCESSES_KILLED_FIELD_NUMBER: _ClassVar[int]
    EGRESS_CUT_MS_FIELD_NUMBER: _ClassVar[int]
    DEAD_MS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    KILLED_BY_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    ALREADY_DEAD_FIELD_NUMBER: _ClassVar[int]
    LEFT_PIDS_FIELD_NUMBER: _ClassVar[int]
    STATEMENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    RELAYS_CUT_FIELD_NUMBER: _ClassVar[int]
    GRANTS_REVOKED_FIELD_NUMBER: _ClassVar[int]
    BYTES_CUT_FIELD_NUMBER: _ClassVar[int]
    receipt_id: str
    agent_id: str
    name: str
    verified_empty: bool
    processes_killed: int
    egress_cut_ms: float
    dead_ms: float
    reason: str
    killed_by: str
    time: _timestamp_pb2.Timestamp
    already_dead: bool
    left_pids: _containers.RepeatedScalarFieldContainer[int]
    statement: bytes
    signature: bytes
    relays_cut: int
    grants_revoked: int
    bytes_cut: int
    def __init__(self, receipt_id: _Optional[str] = ..., agent_id: _Optional[str] = ..., name: _Optional[str] = ..., verified_empty: _Optional[bool] = ..., processes_killed: _Optional[int] = ..., egress_cut_ms: _Optional[float] = ..., dead_ms: _Optional[float] = ..., reason: _Optional[str] = ..., killed_by: _Optional[str] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., already_dead: _Optional[bool] = ..., left_pids: _Optional[_Iterable[int]] = ..., statement: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., relays_cut: _Optional[int] = ..., grants_revoked: _Optional[int] = ..., bytes_cut: _Optional[int] = ...) -> None: ...

class FreezeRequest(_message.Message):
    __slots__ = ("selector", "reason")
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    selector: Selector
    reason: str
    def __init__(self, selector: _Optional[_Union[Selector, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class FreezeResponse(_message.Message):
    __slots__ = ("agents",)
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    agents: _containers.RepeatedCompositeFieldContainer[Agent]
    def __init__(self, agents: _Optional[_Iterable[_Union[Agent, _Mapping]]] = ...) -> None: ...

class ThawRequest(_message.Message):
    __slots__ = ("selector", "reason")
    SELECTOR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    selector: Selector
    reason: str
    def __init__(self, selector: _Optional[_Union[Selector, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class ThawResponse(_message.Message):
    __slots__ = ("agents",)
    AGENTS_FIELD_NUMBER: _ClassVar[int]
    agents: _containers.RepeatedCompositeFieldContainer[Agent]
    def __init__(self, agents: _Optional[_Iterable[_Union[Agent, _Mapping]]] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ("agent",)
    AGENT_FIELD_NUMBER: _ClassVar[int]
    agent: str
    def __init__(self, agent: _Optional[str] = ...) -> None: ...

class RenewResponse(_message.Message):
    __slots__ = ("agent",)
    AGENT_FIELD_NUMBER: _ClassVar[int]
    agent: Agent
    def __init__(self, agent: _Optional[_Union[Agent, _Mapping]] = ...) -> None: ...

class KillExecRequest(_message.Message):
    __slots__ = ("agent", "stream_id", "reason")
    AGENT_FIELD_NUMBER: _ClassVar[int]
    STREAM_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    agent: str
    stream_id: str
    reason: str
    def __init__(self, agent: _Optional[str] = ..., stream_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class KillExecResponse(_message.Message):
    __slots__ = ("processes_killed", "verified_empty", "left_pids")
    PROCESSES_KILLED_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_EMPTY_FIELD_NUMBER: _ClassVar[int]
    LEFT_PIDS_FIELD_NUMBER: _ClassVar[int]
    processes_killed: int
    verified_empty: bool
    left_pids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, processes_killed: _Optional[int] = ..., verified_empty: _Optional[bool] = ..., left_pids: _Optional[_Iterable[int]] = ...) -> None: ...

class HoldTarget(_message.Message):
    __slots__ = ("name", "label", "policy", "rootfs_digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    ROOTFS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    label: str
    policy: str
    rootfs_digest: str
    def __init__(self, name: _Optional[str] = ..., label: _Optional[str] = ..., policy: _Optional[str] = ..., rootfs_digest: _Optional[str] = ...) -> None: ...

class HoldOrder(_message.Message):
    __slots__ = ("hold_id", "target", "reason", "held_by", "held_at", "ticket")
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HELD_BY_FIELD_NUMBER: _ClassVar[int]
    HELD_AT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    hold_id: str
    target: HoldTarget
    reason: str
    held_by: str
    held_at: _timestamp_pb2.Timestamp
    ticket: str
    def __init__(self, hold_id: _Optional[str] = ..., target: _Optional[_Union[HoldTarget, _Mapping]] = ..., reason: _Optional[str] = ..., held_by: _Optional[str] = ..., held_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., ticket: _Optional[str] = ...) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("target", "reason", "hold_id", "ticket")
    TARGET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    target: HoldTarget
    reason: str
    hold_id: str
    ticket: str
    def __init__(self, target: _Optional[_Union[HoldTarget, _Mapping]] = ..., reason: _Optional[str] = ..., hold_id: _Optional[str] = ..., ticket: _Optional[str] = ...) -> None: ...

class HoldResponse(_message.Message):
    __slots__ = ("hold",)
    HOLD_FIELD_NUMBER: _ClassVar[int]
    hold: HoldOrder
    def __init__(self, hold: _Optional[_Union[HoldOrder, _Mapping]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("hold_id", "reason")
    HOLD_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    hold_id: str
    reason: str
    def __init__(self, hold_id: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ("hold",)
    HOLD_FIELD_NUMBER: _ClassVar[int]
    hold: HoldOrder
    def __init__(self, hold: _Optional[_Union[HoldOrder, _Mapping]] = ...) -> None: ...

class ListHoldsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListHoldsResponse(_message.Message):
    __slots__ = ("holds", "next_page_token")
    HOLDS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    holds: _containers.RepeatedCompositeFieldContainer[HoldOrder]
    next_page_token: str
    def __init__(self, holds: _Optional[_Iterable[_Union[HoldOrder, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ListBudgetsRequest(_message.Message):
    __slots__ = ("page_size", "page_token")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListBudgetsResponse(_message.Message):
    __slots__ = ("budgets", "next_page_token")
    BUDGETS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    budgets: _containers.RepeatedCompositeFieldContainer[BudgetUse]
    next_page_token: str
    def __init__(self, budgets: _Optional[_Iterable[_Union[BudgetUse, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...
