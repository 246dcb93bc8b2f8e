"""Looking into a radix tree: its text, its invariants, the reason of a miss."""
