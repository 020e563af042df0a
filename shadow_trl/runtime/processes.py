"""What the processes of one run do together: one works for all, and an error of one ends all of them.

They meet in the key-value store of torch's process group and not in a collective, which gives up after `ddp_timeout`:
a graft may take longer than that, and a process that has failed never joins a collective.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ConfigError, GraftError, ShadowError

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_LOOK_EVERY = 0.1
_BEAT_EVERY = 1.0
# Without a sign of life for this long, a process is taken to be dead.
_SILENCE = 300.0
# How long a process that failed stays, so that the others can read why: with the first process the store goes.
_LAST_WORDS = 3.0
# How many blocks were opened at each level of nesting: it names a block, by the same name on all processes.
_opened = [0]


@contextmanager
def together(accelerator: Accelerator | PartialState, *, what: str) -> Iterator[None]:
    """Let an error that leaves the block on any process end all of them, with the text of that error.

    All processes open the block, and none leaves it before all have come to its end. Blocks can be nested.

    Args:
        accelerator: the one of the run, or its state.
        what: name of the work for the error on the other processes.

    Raises:
        ConfigError: the environment names more processes than know of each other.
        GraftError: another process failed, or has given no sign of life for five minutes. What was raised on this
            process meanwhile, such as a lost connection, is its cause.
    """
    check_known(accelerator)
    if accelerator.num_processes == 1:
        yield
        return
    _opened[-1] += 1
    block, depth = _Block(accelerator, what, list(_opened)), len(_opened)
    _opened.append(0)
    try:
        with block.alive():
            try:
                yield
                block.end()
            except BaseException as error:
                block.fail(error)
                raise
    finally:
        del _opened[depth:]


def run_on_main(accelerator: Accelerator | PartialState, work: Callable[[], _Result], *, what: str) -> _Result:
    """Call `work` on the main process, wait there on all the others, and give its result to every one.

    Args:
        accelerator: the one of the run, or its state. All its processes must make this call.
        work: called on the main process only, for as long as it takes; its result must be picklable when there are
            several processes.
        what: name of the work for the error on the other processes.

    Raises:
        Exception: on the main process, what `work` raised.
        GraftError: on every other process, so that none waits for a graft that never comes.
    """
    with together(accelerator, what=what):
        outcome = [work() if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(outcome, from_process=0)
    return outcome[0]  # type: ignore[return-value]


def share_out(items: Sequence[_Item], work: Callable[[Sequence[_Item]], list[_Result]], *, what: str) -> list[_Result]:
    """Let each process do its share of `items`, and return the results of all of them in the order of the items.

    Args:
        items: the same on all processes, which must all make this call.
        work: called with some items; returns a picklable result for each. Never called with none.
        what: name of the work for the error on the other processes.

    Raises:
        Exception: what `work` raised here.
        GraftError: another process failed.
    """
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState()
    if state.num_processes == 1:
        return work(items)
    mine = items[state.process_index :: state.num_processes]
    with together(state, what=what):
        done = work(mine) if mine else []
    found = iter(gather_object(done))
    places = [at for first in range(state.num_processes) for at in range(first, len(items), state.num_processes)]
    return [result for _, result in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]


def check_shared(accelerator: Accelerator | PartialState, folder: Path, *, what: str) -> None:
    """Check that the processes on all machines of a run see what the main one writes to `folder`, made if need be.

    Args:
        accelerator: the one of the run, or its state. All its processes must make this call.
        folder: where files will be shared.
        what: name of those files, for the error.

    Raises:
        ConfigError: on each process that does not see them.
    """
    if accelerator.num_processes == count_here():
        return  # all on one machine

    def write() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        token = folder / f".shadow-shared-{uuid.uuid4().hex}"
        token.touch()
        return str(token)

    token = Path(run_on_main(accelerator, write, what=f"writing to {folder}"))
    try:
        with together(accelerator, what=f"looking for {what}"):
            if not token.exists():
                raise ConfigError(
                    f"process {accelerator.process_index} does not see {what}, which the main process writes to "
                    f"{token.parent}: the machines of this run do not share that folder. Put it on a file system "
                    "that all of them mount (output_dir; HF_DATASETS_CACHE for data in memory), or train on one "
                    "machine."
                )
    finally:
        if accelerator.is_main_process:
            token.unlink(missing_ok=True)


def count_here() -> int:
    """Return how many processes of the run are on this machine; 1 where the launcher does not say."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def check_known(accelerator: Accelerator | PartialState) -> None:
    """Check that the processes that were launched know of each other.

    Raises:
        ConfigError: fewer of them run together than were launched.
    """
    launched = int(os.environ.get("WORLD_SIZE") or 1)
    if launched > accelerator.num_processes:
        raise ConfigError(
            f"{launched} processes were launched (WORLD_SIZE), of which this one sees {accelerator.num_processes}: "
            "each would train by itself and write to the same folders. Without GPUs, launch with torchrun and "
            "use_cpu=True; for one process, unset WORLD_SIZE."
        )


def say(text: str) -> None:
    """Print a headline of the run, once for all processes."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(f"\n== {text}", flush=True)


class _Block:
    """One block of work on one of several processes: how it ended here, and how it goes on the others."""

    def __init__(self, accelerator: Accelerator | PartialState, what: str, opened: list[int]) -> None:
        from torch.distributed.distributed_c10d import _get_default_store

        self.seen: list[Any] | None = None
        self.store, self.what = _get_default_store(), what
        self.rank, self.count = accelerator.process_index, accelerator.num_processes
        names = ["shadow_trl/" + ".".join(map(str, opened[: level + 1])) for level in range(len(opened))]
        self.name, self.around = names[-1], names[:-1]

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Give signs of life while the context lasts, and look for the error of another that no collective tells."""
        from torch.distributed import DistError

        over = Event()

        def beat() -> None:
            with suppress(DistError):  # the store is gone with its process; what waits for it will say so
                while not over.wait(_BEAT_EVERY):
                    self.store.add(f"{self.name}/beat/{self.rank}", 1)
                    self.seen = self.seen or self._failed(self.name)

        thread = Thread(target=beat, name="shadow-sign-of-life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def fail(self, error: BaseException) -> None:
        """Tell the others of an error here; raise GraftError where it is the echo of one on another process."""
        from torch.distributed import DistError

        known = isinstance(error, ShadowError)
        text = str(error.args[0]) if known and error.args else str(error)
        mine = [self.rank, self.what, f"{type(error).__name__}: {text}", getattr(error, "ending", "")]
        first = self.seen
        try:
            told = json.dumps(getattr(error, "told", mine))
            first = json.loads(self.store.compare_set(f"{self.name}/error", "", told))
            self._set("end")
            self._set("left")
            stop = time.monotonic() + _LAST_WORDS
            while self._without("left") and time.monotonic() < stop:
                time.sleep(_LOOK_EVERY)
        except DistError:
            pass  # the store is gone with its process, whose error may have been seen before
        if first is not None and first[0] != self.rank and isinstance(error, Exception) and not known:
            raise self._error_of(first) from error

    def end(self) -> None:
        """Wait until the block has ended on all processes."""
        from torch.distributed import DistError

        try:
            self._set("end")
            self._wait_for_all("end")
            self._set("left")
            if self.rank == 0:
                self._wait_for_all("left")  # it may hold the store, in which the others still look
        except DistError as error:
            raise GraftError(f"{self.what}: the connection to the main process was lost.") from error

    def _set(self, sign: str) -> None:
        self.store.set(f"{self.name}/{sign}/{self.rank}", "")

    def _without(self, sign: str) -> list[int]:
        return [rank for rank in range(self.count) if not self.store.check([f"{self.name}/{sign}/{rank}"])]

    def _wait_for_all(self, sign: str) -> None:
        """Wait until all have set `sign`, while they give signs of life and none has failed."""
        beats: dict[int, tuple[int, float]] = {}
        while True:
            missing = self._without(sign)  # first: an error is told before its process has ended
            for name in (self.name, *self.around):
                if (failed := self._failed(name)) is not None:
                    raise self._error_of(failed)
            if not missing:
                return
            now = time.monotonic()
            for rank in missing:
                count = self.store.add(f"{self.name}/beat/{rank}", 0)
                if rank not in beats or count != beats[rank][0]:
                    beats[rank] = count, now
                elif now - beats[rank][1] > _SILENCE:
                    raise GraftError(f"{self.what}: process {rank} has given no sign of life for {_SILENCE:.0f} s.")
            time.sleep(_LOOK_EVERY)

    def _failed(self, name: str) -> list[Any] | None:
        return json.loads(self.store.get(f"{name}/error")) if self.store.check([f"{name}/error"]) else None

    @staticmethod
    def _error_of(failed: list[Any]) -> GraftError:
        rank, what, text, ending = failed
        where = "the main process" if rank == 0 else f"process {rank}"
        error = GraftError(f"{what} failed on {where}: {text}")
        error.ending = ending
        error.told = failed  # type: ignore[attr-defined]
        return error
