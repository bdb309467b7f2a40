"""Typed errors. Every one says what happened, what was expected and what to do next.

    PersonaError
    ├── InvalidInputError            a caller's value is not acceptable (ids, text, options, data)
    ├── ModelError                   base models and embedders
    │   ├── UnknownModelError        no such alias, path or hub id
    │   └── DownloadError            weights could not be fetched or failed their hash   (retryable)
    ├── AdapterError
    │   ├── IncompatibleAdapterError made for another base model, or shapes that do not fit it
    │   └── UnsupportedAdapterError  a variant this SDK cannot represent (DoRA, LoRA bias, ...)
    ├── CompositionError             parts that may not be combined, or that the engine cannot run
    ├── EngineError
    │   ├── PromptTooLongError       the prompt leaves no room in the context window
    │   ├── QueueFullError           more requests wait than the engine was told to keep      (retryable)
    │   ├── BudgetError              one request alone needs more memory than a whole budget
    │   ├── DeviceMemoryError        the device had no memory left for this row             (retryable)
    │   ├── NumericalError           a row's logits are not numbers
    │   └── EngineStoppedError       the engine closed, or its worker died, under the request (retryable)
    └── StoreError
        ├── NotFoundError            no such cube, revision, adapter or persona for this owner
        ├── CorruptBlobError         stored bytes do not match their content hash
        ├── SchemaError              the store was written by another version of the schema
        ├── MasterKeyError           the master key is missing or another one, or the store is not encrypted
        ├── StoreFullError           the disk is full; nothing was committed              (retryable)
        ├── RevisionConflictError    somebody else committed first                        (retryable)
        ├── LifecycleError           a move between states of life that is not legal
        ├── FrozenError              a frozen cube would be changed, or one on legal hold erased
        ├── RateLimitError           a principal writes faster than it may               (retryable)
        ├── StoreUnavailableError    the database server is away or dropped the connection (retryable)
        └── ArchiveError             a .memcube archive that is damaged or unsafe

``code`` is stable and meant for programs, ``hint`` is the next action for people, ``retryable`` says
whether the same call may succeed later without being changed.
"""

from typing import ClassVar


class PersonaError(Exception):
    """Base of all errors raised on purpose by this package."""

    code: ClassVar[str] = "persona_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "", **context: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.context = context

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".rstrip()


class InvalidInputError(PersonaError, ValueError):
    """A value given by the caller cannot be used."""

    code = "invalid_input"


class ModelError(PersonaError):
    """Something about a base model or an embedder."""

    code = "model_error"


class UnknownModelError(ModelError, LookupError):
    """The name is no alias, no local folder and no reachable hub id."""

    code = "unknown_model"


class DownloadError(ModelError):
    """Weights could not be fetched, or what arrived is not what was published."""

    code = "download_failed"
    retryable = True


class AdapterError(PersonaError):
    """Something about an adapter."""

    code = "adapter_error"


class IncompatibleAdapterError(AdapterError, ValueError):
    """The adapter belongs to another base model or does not fit its shapes."""

    code = "incompatible_adapter"


class UnsupportedAdapterError(AdapterError, ValueError):
    """The adapter uses a variant that plan parts cannot represent."""

    code = "unsupported_adapter"


class CompositionError(PersonaError, ValueError):
    """The parts of a plan may not be combined, or the engine cannot execute one."""

    code = "bad_composition"


class EngineError(PersonaError):
    """Something went wrong while tokens were produced."""

    code = "engine_error"


class PromptTooLongError(EngineError, ValueError):
    """The prompt and the requested tokens do not fit the context window."""

    code = "prompt_too_long"


class QueueFullError(EngineError):
    """As many requests are waiting as the engine was told to keep."""

    code = "queue_full"
    retryable = True


class BudgetError(EngineError, ValueError):
    """One request alone needs more memory than a whole budget."""

    code = "over_budget"


class DeviceMemoryError(EngineError):
    """The device had no memory left for this row; the others go on."""

    code = "device_memory"
    retryable = True


class NumericalError(EngineError):
    """The logits of a row are not numbers; the others go on."""

    code = "not_a_number"


class EngineStoppedError(EngineError):
    """The engine was closed, or its worker died, before the request was done."""

    code = "engine_stopped"
    retryable = True


class StoreError(PersonaError):
    """Something about the memory store."""

    code = "store_error"


class NotFoundError(StoreError, LookupError):
    """Nothing of that name belongs to this owner."""

    code = "not_found"


class CorruptBlobError(StoreError):
    """Stored bytes do not match the hash they are filed under."""

    code = "corrupt_blob"


class SchemaError(StoreError):
    """The store's schema is not the one this version reads and writes."""

    code = "schema_mismatch"


class MasterKeyError(StoreError):
    """The store's data keys do not open with the master key that was given."""

    code = "master_key"


class StoreFullError(StoreError):
    """There was no room to write; the last commit is intact."""

    code = "store_full"
    retryable = True


class RevisionConflictError(StoreError):
    """Another writer committed since this revision was read."""

    code = "revision_conflict"
    retryable = True


class LifecycleError(StoreError, ValueError):
    """A cube cannot go from its state to the one that was asked for."""

    code = "illegal_move"


class FrozenError(StoreError):
    """A frozen cube would be edited, merged, retired or, on legal hold, erased."""

    code = "frozen"


class RateLimitError(StoreError):
    """A principal has written as much as it may for now."""

    code = "rate_limited"
    retryable = True


class StoreUnavailableError(StoreError):
    """The store's database server cannot be reached; whether the last write was made may be unknown."""

    code = "store_unavailable"
    retryable = True


class ArchiveError(StoreError, ValueError):
    """An archive cannot be trusted or read."""

    code = "bad_archive"
