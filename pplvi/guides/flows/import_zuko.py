"""zuko, imported when it is needed and without its side effect."""

from __future__ import annotations

from types import ModuleType

from torch.distributions import Distribution

__all__ = ["import_zuko"]


def import_zuko() -> ModuleType:
    """zuko, with torch's validation flag as it was: zuko's own import switches it off for the whole process."""
    validate = Distribution._validate_args
    try:
        import zuko
    finally:
        Distribution.set_default_validate_args(validate)
    return zuko
