"""The end of a process that people launch: one message on stderr, what is on the disk, and the exit code."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import ShadowError, with_ending
from .machine import lack


class Terminated(BaseException):
    """SIGTERM came: what is half-done is removed on the way out, as at Ctrl-C."""


def exit_code(work: Callable[[], int], *, final: bool = False) -> int:
    """Do the work of a process and return its code; print what failed and return its code instead.

    2: bad input. 1: a failure at run time, among them what the machine lacks. 130: Ctrl-C. 143: SIGTERM. Faults of the
    program itself are raised.

    Args:
        work: returns the code of a good end.
        final: whether nothing but the end of the interpreter comes after it, which ignores Ctrl-C and SIGTERM then: all
            is done and said, and dying of them would tell a shell that it was not.
    """
    try:
        with _terminable(final):
            return work()
    except (Exception, KeyboardInterrupt, Terminated) as error:
        text, code = _told(error)
        if not text:
            raise
    # Every process reports its error: the launcher shows one of them, and not necessarily the first.
    rank = int(os.environ.get("RANK", "0"))
    print(f"[process {rank}] {text}" if rank else text, file=sys.stderr, flush=True)
    return code


def _told(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit code; an empty one for what is nobody's fault but the program's."""
    ending = getattr(error, "ending", "")
    if isinstance(error, KeyboardInterrupt):
        return with_ending("Interrupted", ending), 128 + signal.SIGINT
    if isinstance(error, Terminated):
        return with_ending("Terminated", ending), 128 + signal.SIGTERM
    shown = error if isinstance(error, ShadowError) else lack(error)
    if shown is not None:
        shown.ending = ending
        return f"{type(shown).__name__}: {shown}", shown.exit_code
    return (with_ending(f"{type(error).__name__}: {error}", ending), 1) if isinstance(error, OSError) else ("", 1)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait until the block has ended: its steps on the disk belong together."""
    before: dict[int, Callable[[int, FrameType | None], object]] = {}
    waiting: list[int] = []
    try:
        for number in (signal.SIGINT, signal.SIGTERM) if _in_main_thread() else ():
            handler = signal.getsignal(number)
            if callable(handler):  # else the process ends at once, or never
                before[number] = handler
                signal.signal(number, lambda number, _: waiting.append(number))
        yield
    finally:
        for known, handler in before.items():
            signal.signal(known, handler)
        for came in waiting:
            before[came](came, None)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def _terminable(final: bool) -> Iterator[None]:
    """Raise Terminated in the main thread at SIGTERM, unless somebody else has a use for the signal."""
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not stop the cleaning
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        with _heard(terminate):
            yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if final else signal.SIG_DFL)
        if final:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _heard(terminate: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Send a signal again whose exception Python dropped: it rose in a finalizer or in a weak reference's callback."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        numbers = {KeyboardInterrupt: signal.SIGINT, Terminated: signal.SIGTERM}
        number = numbers.get(dropped.exc_type)
        if number is None:
            before(dropped)
            return
        if number == signal.SIGTERM:
            signal.signal(number, terminate)
        # From another thread and later: what rises while this hook runs would be dropped as well.
        again = threading.Timer(0.01, os.kill, [os.getpid(), number])
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
