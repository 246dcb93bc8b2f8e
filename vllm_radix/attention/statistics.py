"""What grouped attention has done so far."""


class GroupingCounters:
    """Counts of grouped attention since the worker started.

    Attributes:
        steps: steps whose attention was planned.
        grouped_steps: those that read a shared run once.
        grouped_extends: those of them in which a request had several query rows.
        nodes: runs read once, summed over steps.
        levels: most such runs on one request's path.
        loaded_tokens: tokens of keys that grouped steps loaded, per layer.
        stock_tokens: tokens that vLLM's kernel would have loaded for them.
        plans_made: plans for a batch that was new.
        plans_kept: steps that went on with the plan before.
    """

    def __init__(self) -> None:
        self.steps = self.grouped_steps = self.grouped_extends = 0
        self.nodes = self.levels = 0
        self.loaded_tokens = self.stock_tokens = 0
        self.plans_made = self.plans_kept = 0

    def to_dict(self) -> dict[str, int]:
        """Return the counts as a plain dict."""
        return dict(vars(self))
