"""Every error that weightcast raises on purpose, under one root.

    WeightcastError
      + SourceError           (ValueError)    what a trainer offers is not a whole model
      + ModelMismatch         (ValueError)    two sides speak of different models
      + VersionError          (ValueError)    a version that does not rise, or is not held
      + WireError             (ValueError)    a frame that is malformed, oversized or altered
      + AddressError          (ValueError)    an address that cannot be used (in use, malformed, not loopback)
      + BridgeError           (ValueError)    a model, checkpoint or layout that a bridge cannot map
        - UnsupportedModel                    no bridge for this architecture, or for this field of its config
        - UnmappedTensor                      a Megatron or HF tensor that no rule covers, or the reverse
        - CheckpointMismatch                  a file that lacks, adds or mis-shapes a tensor
      + ConfigError           (ValueError)    a setting that is unknown or contradicts another
      + DeadlineExceeded      (TimeoutError)  a wait that reached its limit
      + PeerLost              (ConnectionError) a publisher or engine that stopped answering
      + ReachError            (ConnectionError) memory of a source that this process cannot read by itself
      + EngineError           (RuntimeError)  an engine that refused, failed or holds undefined weights
      + StorageError          (OSError)       a disk that is full, or that refused a write

Messages say what went wrong, what was got, what is allowed, and what to do.
"""


class WeightcastError(Exception):
    """Root of the errors that weightcast raises on purpose."""


class SourceError(WeightcastError, ValueError):
    """What the sources of a model hold does not make a whole model."""


class ModelMismatch(WeightcastError, ValueError):
    """The two sides of a link speak of different models: names, shapes or dtypes differ."""


class VersionError(WeightcastError, ValueError):
    """A version number that does not rise, belongs to an older epoch, or is no longer held."""


class WireError(WeightcastError, ValueError):
    """A message or chunk that is malformed, oversized, truncated or altered."""


class AddressError(WeightcastError, ValueError):
    """An address that cannot be used: malformed, in use, or open to the network without keys."""


class BridgeError(WeightcastError, ValueError):
    """A model, checkpoint or layout that a bridge cannot map."""


class UnsupportedModel(BridgeError):
    """No bridge for this architecture, or a field of its configuration that Megatron would compute differently."""


class UnmappedTensor(BridgeError):
    """A Megatron tensor without a rule, an HF tensor that nothing fills, or a rule that matches nothing."""


class CheckpointMismatch(BridgeError):
    """A checkpoint with a missing, an extra or a mis-shaped tensor."""


class ConfigError(WeightcastError, ValueError):
    """A setting that is unknown, malformed, or contradicts another."""


class DeadlineExceeded(WeightcastError, TimeoutError):
    """A wait reached its deadline; the message says for whom and for what it waited."""


class PeerLost(WeightcastError, ConnectionError):
    """A publisher, source or engine stopped answering."""


class ReachError(WeightcastError, ConnectionError):
    """Memory of another process that cannot be read from here: on another host, of another user, or gone."""


class EngineError(WeightcastError, RuntimeError):
    """An engine refused an update, failed while it loaded one, or holds undefined weights."""


class StorageError(WeightcastError, OSError):
    """A disk that is full, or that refused a write."""
