"""Every error that kvindex raises on purpose.

KvindexError
├── ConfigError        a file or flag is wrong; the message carries the path to the field
├── UsageError         a call is wrong (not bytes, no payload frame, unknown name)
├── CaptureError       a capture file is not one, or is cut in a way that loses frames
├── TokenizerError     no tokenizer is configured for a model, or it failed
├── ServiceError       a peer (daemon, engine) cannot be reached or answered with an error
└── IntegrityError     an audit (`check()`) found a violated invariant

What comes over the wire never raises: it is counted and reported as skipped.
"""

from __future__ import annotations


class KvindexError(Exception):
    """Root of the tree."""


class ConfigError(KvindexError):
    """`path: value is not what is allowed`, for example `tiers[1].evict.high: 1.2 is not in (0, 1]`."""


class UsageError(KvindexError):
    """The caller passed something that no wire could have caused."""


class CaptureError(KvindexError):
    """A capture file cannot be read."""


class TokenizerError(KvindexError):
    """A prompt cannot be turned into token ids."""


class ServiceError(KvindexError):
    """A peer could not be reached in time or refused."""


class IntegrityError(KvindexError):
    """`check()` found a violated invariant; the message names it."""
