"""Serves built bundles to many clients: who runs when, the loop that runs it, and HTTP. Imports no torch."""
