"""Runs a built bundle: a static program of graph calls over buffers that are allocated once. Imports no torch."""
