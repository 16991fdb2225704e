"""The name that scripts written for moestro 0.1.0 import moestro.tuning.store.records by."""

from moestro.tuning.store.records import Decision, Record

__all__ = ["Decision", "Record"]
