"""The name that scripts written for moestro 0.1.0 import moestro.tuning.store.flashinfer by."""

from moestro.tuning.store.flashinfer import hints_for, import_flashinfer

__all__ = ["hints_for", "import_flashinfer"]
