"""The errors a user can cause or can act on, on one page.

GemscopeError                  anything below; exit code 2
├── InputError                 the text, option or value that was given
│   ├── SiteError              no such place in the model
│   ├── OccupiedError          the folder holds something else already
│   └── ContextLengthError     text longer than the model can read
├── ModelError                 a model cannot be had
│   ├── ModelNotFoundError     no such folder, hub id or built-in name
│   ├── GatedModelError        the hub wants a licence accepted or a token
│   ├── HubUnreachableError    no network
│   └── UnsupportedModelError  a model, but not a Gemma 2 or 3
├── ArtifactError              a released dictionary cannot be had
│   ├── ArtifactNotFoundError  not in the catalogue, or not on the hub
│   ├── ArtifactRefusedError   the hub wants a licence accepted or a token
│   └── ArtifactUnreachableError  no network, a busy hub, a connection that keeps breaking
├── FormatError                a file is truncated, damaged or of another kind
├── StorageError               the disk is full, read-only or not there
├── PairingError               a dictionary does not belong to this place of this model
└── SelfTestError              a check on the loaded model failed: results would be wrong

A message is one sentence that names the value, what was expected, and the remedy. ``assert`` is for our own mistakes.
"""


class GemscopeError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code: int = 2


class InputError(GemscopeError):
    """The text, option or value given by the user cannot be used."""


class SiteError(InputError):
    """The site or layer does not exist in this model."""


class OccupiedError(InputError):
    """The folder holds something else, which is left as it is."""


class ContextLengthError(InputError):
    """The text has more tokens than the model's context."""


class ModelError(GemscopeError):
    """A model cannot be loaded."""


class ModelNotFoundError(ModelError):
    """Neither a built-in name, nor a model folder, nor a hub id."""


class GatedModelError(ModelError):
    """The hub refuses the download until a licence is accepted or a token given."""


class HubUnreachableError(ModelError):
    """The model is not in the local cache and the hub cannot be reached."""


class UnsupportedModelError(ModelError):
    """The checkpoint is of a family other than Gemma 2 and Gemma 3."""


class ArtifactError(GemscopeError):
    """A released dictionary cannot be had."""


class ArtifactNotFoundError(ArtifactError):
    """No released dictionary has this name, or the hub does not have its files."""


class ArtifactRefusedError(ArtifactError):
    """The hub refuses the files until a licence is accepted or a token given."""


class ArtifactUnreachableError(ArtifactError):
    """The hub cannot be reached, asks for patience too long, or keeps breaking the connection."""


class FormatError(GemscopeError):
    """A file is truncated, damaged, or not of the expected format."""


class StorageError(GemscopeError):
    """A file or folder cannot be written."""


class PairingError(GemscopeError):
    """A dictionary does not reconstruct the activations it is said to belong to."""


class SelfTestError(GemscopeError):
    """A numerical identity that every reading relies on does not hold for the loaded model."""


def reason(error: BaseException) -> str:
    """What a library's error says, for the middle of a sentence: its words, at most 200 characters of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
