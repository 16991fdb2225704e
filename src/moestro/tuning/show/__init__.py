"""A decision in words, tables and pages."""
