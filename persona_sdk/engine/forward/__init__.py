"""The forward pass over packed tokens of many rows: fused for known architectures, general for the rest."""
