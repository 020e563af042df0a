"""What one of several processes does for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from ..errors import GraftError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

_Result = TypeVar("_Result")


def run_on_main(accelerator: Accelerator | PartialState, work: Callable[[], _Result], *, what: str) -> _Result:
    """Call `work` on the main process, wait there on all the others, and give its result to every one.

    Args:
        accelerator: the one of the run, or its state. All its processes must make this call.
        work: called on the main process only; its result must be picklable when there are several processes.
        what: name of the work for the error on the other processes.

    Raises:
        Exception: on the main process, what `work` raised.
        GraftError: on every other process, so that none waits for a graft that never comes.
    """
    if accelerator.num_processes == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    outcome: list = [None, None]
    error: BaseException | None = None
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        # Whatever it is, also an interrupt: the others wait in the broadcast below and must be told.
        except BaseException as caught:
            error = caught
            outcome[1] = f"{type(caught).__name__}: {caught}"
    broadcast_object_list(outcome, from_process=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise GraftError(f"{what} failed on the main process: {outcome[1]}")
    return outcome[0]


def say(text: str) -> None:
    """Print a headline of the run, once for all processes."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(f"\n== {text}", flush=True)
