import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_UNSPECIFIED: _ClassVar[Source]
    SOURCE_PLAYGROUND: _ClassVar[Source]
    SOURCE_API: _ClassVar[Source]
    SOURCE_LABELER: _ClassVar[Source]
    SOURCE_IMPORT: _ClassVar[Source]

class ConsentState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONSENT_STATE_UNSPECIFIED: _ClassVar[ConsentState]
    CONSENT_STATE_GRANTED: _ClassVar[ConsentState]
    CONSENT_STATE_WITHDRAWN: _ClassVar[ConsentState]

class Purpose(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PURPOSE_UNSPECIFIED: _ClassVar[Purpose]
    PURPOSE_TRAINING: _ClassVar[Purpose]
    PURPOSE_EVALUATION: _ClassVar[Purpose]
    PURPOSE_READING: _ClassVar[Purpose]

class ReleaseTransition(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RELEASE_TRANSITION_UNSPECIFIED: _ClassVar[ReleaseTransition]
    RELEASE_TRANSITION_PUBLISHED: _ClassVar[ReleaseTransition]
    RELEASE_TRANSITION_SWAPPED_IN: _ClassVar[ReleaseTransition]
    RELEASE_TRANSITION_ROLLED_BACK: _ClassVar[ReleaseTransition]
    RELEASE_TRANSITION_REFUSED: _ClassVar[ReleaseTransition]
    RELEASE_TRANSITION_LOADED: _ClassVar[ReleaseTransition]
SOURCE_UNSPECIFIED: Source
SOURCE_PLAYGROUND: Source
SOURCE_API: Source
SOURCE_LABELER: Source
SOURCE_IMPORT: Source
CONSENT_STATE_UNSPECIFIED: ConsentState
CONSENT_STATE_GRANTED: ConsentState
CONSENT_STATE_WITHDRAWN: ConsentState
PURPOSE_UNSPECIFIED: Purpose
PURPOSE_TRAINING: Purpose
PURPOSE_EVALUATION: Purpose
PURPOSE_READING: Purpose
RELEASE_TRANSITION_UNSPECIFIED: ReleaseTransition
RELEASE_TRANSITION_PUBLISHED: ReleaseTransition
RELEASE_TRANSITION_SWAPPED_IN: ReleaseTransition
RELEASE_TRANSITION_ROLLED_BACK: ReleaseTransition
RELEASE_TRANSITION_REFUSED: ReleaseTransition
RELEASE_TRANSITION_LOADED: ReleaseTransition

class Event(_message.Message):
    __slots__ = ("id", "schema_version", "time", "producer", "user_id", "sealed", "completion", "ranking", "demonstration", "consent", "release_change", "rating", "edit", "comment", "withdrawal")
    ID_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_VERSION_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    PRODUCER_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    RANKING_FIELD_NUMBER: _ClassVar[int]
    DEMONSTRATION_FIELD_NUMBER: _ClassVar[int]
    CONSENT_FIELD_NUMBER: _ClassVar[int]
    RELEASE_CHANGE_FIELD_NUMBER: _ClassVar[int]
    RATING_FIELD_NUMBER: _ClassVar[int]
    EDIT_FIELD_NUMBER: _ClassVar[int]
    COMMENT_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWAL_FIELD_NUMBER: _ClassVar[int]
    id: str
    schema_version: int
    time: _timestamp_pb2.Timestamp
    producer: str
    user_id: str
    sealed: Sealed
    completion: Completion
    ranking: Ranking
    demonstration: Demonstration
    consent: Consent
    release_change: ReleaseChange
    rating: Rating
    edit: Edit
    comment: Comment
    withdrawal: Withdrawal
    def __init__(self, id: _Optional[str] = ..., schema_version: _Optional[int] = ..., time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., producer: _Optional[str] = ..., user_id: _Optional[str] = ..., sealed: _Optional[_Union[Sealed, _Mapping]] = ..., completion: _Optional[_Union[Completion, _Mapping]] = ..., ranking: _Optional[_Union[Ranking, _Mapping]] = ..., demonstration: _Optional[_Union[Demonstration, _Mapping]] = ..., consent: _Optional[_Union[Consent, _Mapping]] = ..., release_change: _Optional[_Union[ReleaseChange, _Mapping]] = ..., rating: _Optional[_Union[Rating, _Mapping]] = ..., edit: _Optional[_Union[Edit, _Mapping]] = ..., comment: _Optional[_Union[Comment, _Mapping]] = ..., withdrawal: _Optional[_Union[Withdrawal, _Mapping]] = ...) -> None: ...

class Sealed(_message.Message):
    __slots__ = ("key_id", "text")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    text: bytes
    def __init__(self, key_id: _Optional[str] = ..., text: _Optional[bytes] = ...) -> None: ...

class Message(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("text", "messages")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    text: str
    messages: _containers.RepeatedCompositeFieldContainer[Message]
    def __init__(self, text: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[Message, _Mapping]]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("temperature", "top_p", "max_tokens", "seed")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., max_tokens: _Optional[int] = ..., seed: _Optional[int] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("index", "text", "token_ids", "finish_reason", "release_id", "release_digest")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    index: int
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: str
    release_id: str
    release_digest: str
    def __init__(self, index: _Optional[int] = ..., text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[str] = ..., release_id: _Optional[str] = ..., release_digest: _Optional[str] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("completion_id", "prompt", "outputs", "sampling", "release_id", "release_digest", "source", "notice_version", "metadata", "model")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NOTICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    prompt: Prompt
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    sampling: Sampling
    release_id: str
    release_digest: str
    source: Source
    notice_version: str
    metadata: _containers.ScalarMap[str, str]
    model: str
    def __init__(self, completion_id: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., release_id: _Optional[str] = ..., release_digest: _Optional[str] = ..., source: _Optional[_Union[Source, str]] = ..., notice_version: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., model: _Optional[str] = ...) -> None: ...

class RankGroup(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, outputs: _Optional[_Iterable[int]] = ...) -> None: ...

class Ranking(_message.Message):
    __slots__ = ("completion_id", "groups", "instruction_version", "seconds_spent", "source", "notice_version", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    INSTRUCTION_VERSION_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SPENT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NOTICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    groups: _containers.RepeatedCompositeFieldContainer[RankGroup]
    instruction_version: str
    seconds_spent: float
    source: Source
    notice_version: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, completion_id: _Optional[str] = ..., groups: _Optional[_Iterable[_Union[RankGroup, _Mapping]]] = ..., instruction_version: _Optional[str] = ..., seconds_spent: _Optional[float] = ..., source: _Optional[_Union[Source, str]] = ..., notice_version: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Rating(_message.Message):
    __slots__ = ("completion_id", "output", "score", "source", "notice_version", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NOTICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    output: int
    score: int
    source: Source
    notice_version: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, completion_id: _Optional[str] = ..., output: _Optional[int] = ..., score: _Optional[int] = ..., source: _Optional[_Union[Source, str]] = ..., notice_version: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Edit(_message.Message):
    __slots__ = ("completion_id", "output", "text", "source", "notice_version", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NOTICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    output: int
    text: str
    source: Source
    notice_version: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, completion_id: _Optional[str] = ..., output: _Optional[int] = ..., text: _Optional[str] = ..., source: _Optional[_Union[Source, str]] = ..., notice_version: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Comment(_message.Message):
    __slots__ = ("completion_id", "output", "text", "source", "notice_version", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NOTICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    output: int
    text: str
    source: Source
    notice_version: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, completion_id: _Optional[str] = ..., output: _Optional[int] = ..., text: _Optional[str] = ..., source: _Optional[_Union[Source, str]] = ..., notice_version: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Withdrawal(_message.Message):
    __slots__ = ("completion_id",)
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    def __init__(self, completion_id: _Optional[str] = ...) -> None: ...

class Demonstration(_message.Message):
    __slots__ = ("prompt", "response", "source", "notice_version", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    NOTICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    response: str
    source: Source
    notice_version: str
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., response: _Optional[str] = ..., source: _Optional[_Union[Source, str]] = ..., notice_version: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Consent(_message.Message):
    __slots__ = ("state", "notice_version", "purposes", "erased")
    STATE_FIELD_NUMBER: _ClassVar[int]
    NOTICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    PURPOSES_FIELD_NUMBER: _ClassVar[int]
    ERASED_FIELD_NUMBER: _ClassVar[int]
    state: ConsentState
    notice_version: str
    purposes: _containers.RepeatedScalarFieldContainer[Purpose]
    erased: bool
    def __init__(self, state: _Optional[_Union[ConsentState, str]] = ..., notice_version: _Optional[str] = ..., purposes: _Optional[_Iterable[_Union[Purpose, str]]] = ..., erased: _Optional[bool] = ...) -> None: ...

class ReleaseChange(_message.Message):
    __slots__ = ("release_id", "release_digest", "transition", "reason")
    RELEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RELEASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    TRANSITION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    release_id: str
    release_digest: str
    transition: ReleaseTransition
    reason: str
    def __init__(self, release_id: _Optional[str] = ..., release_digest: _Optional[str] = ..., transition: _Optional[_Union[ReleaseTransition, str]] = ..., reason: _Optional[str] = ...) -> None: ...
