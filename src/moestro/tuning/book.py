"""The name that scripts written for moestro 0.1.0 import moestro.tuning.lookup.table by."""

from moestro.tuning.lookup.table import make_table, roundings

__all__ = ["make_table", "roundings"]
