"""Validation: a built bundle against PyTorch or another engine, where the difference comes from, and what is to blame."""
