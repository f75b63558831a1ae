"""The exceptions that localmoe raises on purpose.

    LocalMoeError                    catch this one; exit code 1
     ├─ UsageError                   a wrong option, value or recipe name; exit code 2
     ├─ ModelNotFoundError           no such model here; the message says what to type
     ├─ UnsupportedModelError        a model_type or config field that changes the maths and is not implemented
     ├─ CheckpointError              files that are damaged, incomplete or contradict each other
     │   └─ VerificationError        a file's hash differs from the recorded one
     ├─ StorageError                 a full disk, no permission, an unwritable place
     ├─ SessionError                 a saved session that is damaged, of another model, or of a newer version
     ├─ HubError                     the download could not be done
     ├─ ContextOverflowError         prompt and answer do not fit the context
     ├─ GrammarError                 a schema or grammar that is not valid, or met by no text; exit code 2
     ├─ TemplateError                the checkpoint's chat template is missing, broken or raised
     ├─ InputError                   text that cannot be read (invalid UTF-8, no prompt)
     ├─ DeviceError                  a device or a kernel tier this machine or version does not have
     └─ GateError                    a quality gate was not met

A message is one line: it names the file, tensor or field, and says what to do. `kind` is the stable
name that `--json` prints; `exit_code` is the process's exit status.
"""

from __future__ import annotations


class LocalMoeError(Exception):
    """Base class of every error that localmoe raises on purpose."""

    kind: str = "error"
    exit_code: int = 1


class UsageError(LocalMoeError):
    """The command or call was given something it does not accept."""

    kind = "usage"
    exit_code = 2


class ModelNotFoundError(LocalMoeError):
    """The named model is not on this machine, or the directory is not a model."""

    kind = "model_not_found"


class UnsupportedModelError(LocalMoeError):
    """The model's architecture, or one field of its config, is not implemented."""

    kind = "unsupported_model"


class CheckpointError(LocalMoeError):
    """A checkpoint's files are damaged, incomplete or contradict each other."""

    kind = "checkpoint"


class VerificationError(CheckpointError):
    """A file's content differs from the hash recorded for it."""

    kind = "verification"


class StorageError(LocalMoeError):
    """The disk is full, or a place cannot be read or written."""

    kind = "storage"


class SessionError(LocalMoeError):
    """A saved session cannot be used: damaged, of another model, of a newer version, open elsewhere, or not there."""

    kind = "session"


class HubError(LocalMoeError):
    """A download failed, or the hub answered with a refusal."""

    kind = "hub"


class ContextOverflowError(LocalMoeError):
    """Prompt and answer need more tokens than the context holds."""

    kind = "context"


class GrammarError(LocalMoeError):
    """A schema or grammar is not valid, asks for what is not supported, or is met by no text."""

    kind = "grammar"
    exit_code = 2


class TemplateError(LocalMoeError):
    """The chat template is missing, is not valid, or raised."""

    kind = "template"


class InputError(LocalMoeError):
    """Text from the user cannot be read."""

    kind = "input"


class DeviceError(LocalMoeError):
    """The machine, or this version, lacks the device or kernel tier asked for."""

    kind = "device"


class GateError(LocalMoeError):
    """The measured quality is worse than the gate allows."""

    kind = "gate"
