"""What the processes of tests/runtime do: each function is called in every one of them."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from shadow_trl.errors import InputError
from shadow_trl.runtime import processes
from shadow_trl.runtime.processes import check_shared, run_on_main, together


def state_of_all(timeout: float = 600) -> Any:
    import torch
    from accelerate import PartialState

    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    state = PartialState(cpu=True)
    assert state.num_processes == int(os.environ["WORLD_SIZE"]) > 1
    return state


def longer_than_the_timeout(rank: int, seconds: float) -> str:
    """Work of `seconds` on the main process with a group whose collectives give up after half of them."""
    state = state_of_all(seconds / 2)
    return run_on_main(state, lambda: time.sleep(seconds) or f"from {rank}", what="the work")


def fails_inside(rank: int, failing: int, where: str) -> None:
    """The process `failing` raises before work for all, in a nested block, or as the others sit in a collective."""
    state = state_of_all()
    processes._LAST_WORDS, processes._BEAT_EVERY = 1.5, 0.2
    with together(state, what="the run"):
        if where == "nested":
            with together(state, what="the part"):
                if rank == failing:
                    raise OSError("no space left")
        if rank == failing:
            raise InputError("that is wrong")
        if where == "before":
            run_on_main(state, lambda: None, what="the work")
        elif where == "collective":
            state.wait_for_everyone()


def goes_on_after_an_error(rank: int) -> list[Any]:
    """An error that is caught on all processes; what they do next must not meet what is left of it."""
    state, seen = state_of_all(), []
    for failing in (1, 0, None):
        try:
            with together(state, what="the part"):
                if rank == failing:
                    raise ValueError(f"of {failing}")
                seen.append(run_on_main(state, lambda: "fine", what="the work") if failing is None else "")
        except Exception as error:
            seen.append(str(error))
    return seen


def looks_late(rank: int) -> None:
    """The main process, which holds the store, ends while the other one sleeps between two looks."""
    processes._LOOK_EVERY = 1.0 if rank else 0.01
    with together(state_of_all(), what="the work"):
        time.sleep(0.0 if rank else 0.5)


def is_killed(rank: int, silence: float) -> None:
    """The last process is killed in the work for all; the store stays."""
    processes._BEAT_EVERY, processes._SILENCE = silence / 10, silence
    state = state_of_all()
    with together(state, what="the work"):
        if rank == state.num_processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def hide(folder: str) -> None:
    """Put an empty file system of this process alone in the place of `folder`; needs root."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private_below, below = 0x20000, 0x40000, 0x4000
    assert libc.unshare(new_mounts) == 0, os.strerror(ctypes.get_errno())
    assert libc.mount(b"none", b"/", None, private_below | below, None) == 0, os.strerror(ctypes.get_errno())
    assert libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, b"size=9m") == 0, os.strerror(ctypes.get_errno())


def in_a_folder_of_its_own(rank: int, folder: str, *, private: bool, data: bool = False) -> list[Any]:
    """Look for a shared folder, or share `data` in it; if `private`, only the main process has that file system."""
    Path(folder).mkdir(exist_ok=True)
    if private and rank:
        hide(folder)
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # each on a machine of its own
    state = state_of_all()
    if data:
        import datasets

        from shadow_trl.training.reference import shared_on_disk

        datasets.config.HF_DATASETS_CACHE = Path(folder)
        return shared_on_disk(datasets.Dataset.from_list([{"row": 1}]), state)["row"][:]
    check_shared(state, Path(folder), what="the values")
    return ["seen"]


def compare(rank: int, folder: str, words: list[str]) -> dict[str, Any]:
    """Run `shadow-trl compare`; return its exit code, what it printed and how many rows were answered here."""
    from shadow_trl.cli import main
    from shadow_trl.evaluation import exam

    state_of_all()
    asked, answered_right = [0], exam.answered_right

    def counted(model: Any, tokenizer: Any, rows: Any, **more: Any) -> list[bool]:
        asked[0] += len(rows)
        return answered_right(model, tokenizer, rows, **more)

    exam.answered_right = counted
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["compare", *words])
    return {"code": code, "printed": printed.getvalue(), "asked": asked[0]}
