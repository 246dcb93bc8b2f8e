"""The A/B inside one command: engines step by step, counts the same in every run."""
