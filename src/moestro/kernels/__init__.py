"""The backends that run the operator, and the contract between both (problem.py)."""
