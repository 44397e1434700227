"""What the suite counted, over its files; the last of them to end writes it down."""

from __future__ import annotations

from collections import Counter

COUNTS: Counter[str] = Counter()
