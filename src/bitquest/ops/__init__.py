"""Faster ways to the same numbers: one schema per operation, numerics as the default backend."""
