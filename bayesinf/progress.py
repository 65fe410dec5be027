"""The progress bar of a run, driven from the host between chunks: no callback ever enters compiled code."""

from typing import Any

import numpy as np

__all__ = ["Progress"]


class Progress:
    """A tqdm bar over steps that shows phase, acceptance rate, divergences and the worst R-hat; silent if not shown."""

    def __init__(self, total: int, *, is_shown: bool):
        self.is_shown = is_shown
        if is_shown:
            from tqdm.auto import tqdm  # in a notebook without widgets it warns when it is imported
        else:
            from tqdm import tqdm
        self._bar = tqdm(total=total, disable=not is_shown, unit="step", dynamic_ncols=True)
        self._bar.set_description("compiling")

    def update(self, steps: int, phase: str, stats: dict[str, Any] | None, r_hat: np.ndarray | None) -> None:
        """Moves on by `steps` and shows the statistics of the last chunk."""
        shown = {} if stats is None else {"acceptance": f"{np.mean(stats['acceptance_rate']):.2f}"}
        if stats is not None and np.any(stats["is_divergent"]):
            shown["divergent"] = f"{np.mean(stats['is_divergent']):.1%}"
        if r_hat is not None and r_hat.size:
            shown["R-hat"] = f"{np.max(r_hat):.3f}"
        self._bar.set_description(phase, refresh=False)
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(steps)

    def close(self) -> None:
        self._bar.close()
