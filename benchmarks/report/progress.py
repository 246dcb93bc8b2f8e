"""How far a run is: a bar on a terminal, otherwise a line for each finished piece."""

import sys

from tqdm import tqdm


class Progress:
    """Tells on standard error how far a run is.

    Args:
        total: units of work in all.
        units: their name.
        done: of them, done before.
    """

    def __init__(self, total: int, units: str, done: int = 0) -> None:
        self._bar = tqdm(
            total=total,
            initial=done,
            leave=False,
            disable=None,  # where there is no terminal
            # A narrow terminal cuts the end: what is being done.
            bar_format=f"{{bar:10}} {{n_fmt}}/{{total_fmt}} {units} "
            "[{elapsed}{postfix}] {desc}",
        )

    def grow(self, total: int, done: int) -> None:
        """Set how many units there are, once that is known, and how many are done."""
        self._bar.total, self._bar.n = total, done
        self._bar.refresh()

    def begin(self, what: str) -> None:
        """Name what is being done."""
        self._bar.set_description_str(what)

    def advance(self, units: int = 1) -> None:
        """Count finished units."""
        self._bar.update(units)

    def finish(self, piece: str, to_go: str = "") -> None:
        """Tell that a piece is finished.

        Args:
            piece: what it was, and what it took.
            to_go: what the rest will take.
        """
        if not self._bar.disable:
            self._bar.set_postfix_str(to_go)
            return
        print(f"{piece}; {to_go}" if to_go else piece, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()


def seconds_in_words(seconds: float) -> str:
    """Return seconds as a reader says them: 40 s, 12 min, 3.5 h."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 99.5 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
