"""The errors that a user may see; each says what was wrong, where, and what to do.

LiversegError                    base of the errors below; the command line prints it as one line
├── DataSetError                 a raw data set: dataset.json, missing or extra files
├── VolumeError                  one NIfTI file: truncated, corrupt, unsupported, lying header
│   ├── LabelError               a label: values other than 0/1/2, or another grid than its image
│   └── ImplausibleScanError     not a CT in HU, or a grid that no scanner could have made
├── CacheError                   the store: not a store, unreadable, incomplete, damaged
│   ├── SchemaError              metadata that does not parse; lists every fault
│   └── SpecMismatchError        built with a different preprocessing spec
├── OutputError                  a file in the way that no earlier run of the same command wrote
├── ConfigError                  a configuration file or a --set option; lists every fault
└── RunError                     a training run: no checkpoint, wrong architecture, stopped
    └── DivergedError            the loss is not finite
"""

from __future__ import annotations


class LiversegError(Exception):
    """Base of all errors that are the input's fault rather than the program's."""


class DataSetError(LiversegError):
    """A raw data set cannot be used as it is on disk."""


class VolumeError(LiversegError):
    """A NIfTI file cannot be read, or its content differs from what its header claims."""


class LabelError(VolumeError):
    """A label file does not fit its image or contains values other than 0, 1 and 2."""


class ImplausibleScanError(VolumeError):
    """A scan that is not a CT in HU, or whose grid no scanner could have made."""


class CacheError(LiversegError):
    """A cache store cannot be opened, or a case in it is missing, incomplete or damaged."""


class SchemaError(CacheError):
    """Metadata in a store does not parse; the message lists every fault."""


class SpecMismatchError(CacheError):
    """A store was built with a preprocessing spec other than the one requested."""


class OutputError(LiversegError):
    """A file exists where a command wants to write, and is not earlier output of the same command."""


class ConfigError(LiversegError, ValueError):
    """A configuration has unknown keys, wrong types or values out of range."""


class RunError(LiversegError):
    """A training run cannot be started, resumed or applied."""


class DivergedError(RunError):
    """The loss of a training run is not finite."""
