"""What parts cost the host, beside what those of vLLM cost: ``make bench``."""
