"""The name that scripts written for moestro 0.1.0 import moestro.tuning.spec.plain_json by."""

from moestro.tuning.spec.plain_json import digest, from_json, to_json

__all__ = ["digest", "from_json", "to_json"]
