"""The name that scripts written for moestro 0.1.0 import moestro.tuning.spec.evidence by."""

from moestro.tuning.spec.evidence import Decision, Record

__all__ = ["Decision", "Record"]
