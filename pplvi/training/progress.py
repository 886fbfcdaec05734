"""A progress bar: steps, the smoothed loss, and the time left."""

from __future__ import annotations

from typing import Any

SMOOTH = 50


def smoothed(losses: list[Any]) -> float:
    """Mean of the last 50 losses, in nats.

    >>> smoothed([4.0, 2.0])
    3.0
    """
    tail = [float(loss) for loss in losses[-SMOOTH:]]
    return sum(tail) / len(tail)


class Progress:
    """One tqdm bar for each restart; silent if ``active`` is false.

    :param num_steps: length of a bar.
    :param restarts: how many bars will come.
    """

    def __init__(self, num_steps: int, restarts: int, active: bool = True) -> None:
        self.num_steps, self.restarts, self.active = num_steps, restarts, active
        self.bar: Any = None

    def __call__(self, run: Any) -> None:
        """Move the bar to where the run is; the loss is read every 50 steps only."""
        if not self.active:
            return
        if self.bar is None:
            self._open(run)
        self.bar.update(run.step - self.bar.n)
        if run.step % SMOOTH == 0 or run.reason:
            self.bar.set_postfix_str(f"loss {smoothed(run.losses):.4g}", refresh=bool(run.reason))

    def _open(self, run: Any) -> None:
        from tqdm.auto import tqdm

        label = f"restart {run.index + 1}/{self.restarts}" if self.restarts > 1 else "fit"
        self.bar = tqdm(total=self.num_steps, initial=run.step - 1, desc=label)

    def close(self) -> None:
        """Finish the bar of this restart."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
