"""Speed of built bundles, measured in one interleaved run and printed with the hardware."""
