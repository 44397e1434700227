"""Validation: engines against PyTorch or each other, where a difference comes from, and what is to blame."""
