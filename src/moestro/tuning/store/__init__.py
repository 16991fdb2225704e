"""Decisions on disk: records, environments, bundles, and other tuners' files."""
