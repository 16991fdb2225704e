"""What serves a call: call sites, guards, the decisions that are known, tables."""
