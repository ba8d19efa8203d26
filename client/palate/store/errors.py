"""What a store can raise. Knows no store; a message says URI, cause and remedy, and never holds a credential.

    StoreError (OSError)                        something a store could not do
    ├── ObjectNotFoundError (FileNotFoundError) no object under that key
    ├── BucketNotFoundError (LookupError)       the bucket or root folder itself is missing
    ├── StoreDeniedError (PermissionError)      no, wrong or insufficient credentials or file permissions
    ├── StoreUnreachableError (ConnectionError) the endpoint does not answer, or answers with its own failure
    ├── DigestMismatchError                     bytes that arrived are not those that were uploaded
    ├── PreconditionFailedError                 a conditional put lost: somebody else wrote first
    └── StoreUsageError (ValueError)            a URI, key or option that cannot work

The root of the tree is `palate_recipes.errors.PalateError`.
"""

from __future__ import annotations

from palate_recipes.errors import PalateError


class StoreError(PalateError, OSError):
    """A store could not do what it was asked."""


class ObjectNotFoundError(StoreError, FileNotFoundError):
    """No object has this key, or none stands under this prefix."""


class BucketNotFoundError(StoreError, LookupError):
    """The bucket or root folder itself is missing. No FileNotFoundError: nobody should wait for an object."""


class StoreDeniedError(StoreError, PermissionError):
    """The store refuses: no credentials, wrong ones, or ones that do not allow this."""


class StoreUnreachableError(StoreError, ConnectionError):
    """The endpoint did not answer, or kept answering with a failure of its own."""


class DigestMismatchError(StoreError):
    """Bytes that arrived are not those that were uploaded, also when they were asked for again."""


class PreconditionFailedError(StoreError):
    """A conditional put lost: the object is there already, or is not the one that was read."""


class StoreUsageError(StoreError, ValueError):
    """A URI, a key or an option cannot be used as given."""
