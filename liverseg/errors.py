"""The errors that liverseg raises, for ``except liverseg.errors.VolumeError``; ``data_cache.errors`` draws their tree."""

from data_cache.errors import (
    CacheError,
    ConfigError,
    DataSetError,
    DivergedError,
    ImplausibleScanError,
    LabelError,
    LiversegError,
    OutputError,
    RunError,
    SchemaError,
    SpecMismatchError,
    VolumeError,
)

__all__ = [
    "CacheError",
    "ConfigError",
    "DataSetError",
    "DivergedError",
    "ImplausibleScanError",
    "LabelError",
    "LiversegError",
    "OutputError",
    "RunError",
    "SchemaError",
    "SpecMismatchError",
    "VolumeError",
]
