"""Grafts that are tried and not kept: one opening of the models, many settings, no weights on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.hub import Source
from ..errors import ends_with
from ..grafting.files import main_dtype
from ..grafting.inputs import base_of, open_tuned_inputs
from ..grafting.jobs import check_rounding
from ..grafting.options import GraftOptions
from ..grafting.reports import GapReport
from ..grafting.tuned import SingleTuned, merged_checkpoint, one_tuned
from ..results.copied import copied_files, copy_files, write_config
from ..results.folder import Scratch
from .graft import check_finite

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MemoryGraft:
    """A dense graft that was not written.

    Args:
        weights: name on the disk -> weight, in the dtype that `graft` would write.
        folder: with the other files of the graft: config, tokenizer, template. Gone when the grafts are closed.
        dtype: torch name of the dtype of most elements.
        rounding: how the sums were rounded, `nearest` or `stochastic`.
    """

    weights: dict[str, Tensor]
    folder: Path
    dtype: str
    rounding: str


@dataclass(frozen=True)
class OpenGrafts:
    """BASE, INSTRUCT and TUNED, from which a graft with any settings is computed; see `open_grafts`."""

    single: SingleTuned
    instruct: Source
    scratch: Path

    def form(self, options: GraftOptions) -> str:
        """Return the form, `model` or `adapter`, in which `graft` would write with `options`."""
        return open_tuned_inputs(self.single, self.instruct, options).form

    def gap(self) -> GapReport:
        """Measure the pair and, in the same way, what training changed; an adapter is merged on the disk for it.

        Raises:
            InputError, GraftError: as of `operations.gap.gap`.
        """
        from .gap import measure

        base, instruct = Checkpoint.open(base_of(self.single)), Checkpoint.open(self.instruct)
        tuned = self.single.checkpoint
        scratch = Path(mkdtemp(dir=self.scratch))
        try:
            if tuned.is_adapter:  # which is merged into BASE as stored
                return measure(base, instruct, merged_checkpoint(base, tuned, scratch))
            return measure(base.loaded(self.single.loaded_in), instruct, tuned)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def check(self, options: GraftOptions) -> tuple[list[tuple[str, Path]], list[str]]:
        """Plan a graft without computing it; return role and folder of each side, and the warnings.

        Raises:
            InputError: bad input, as of `graft`.
        """
        inputs = open_tuned_inputs(self.single, self.instruct, options)
        scratch = self.scratch / ".planned"
        jobs = inputs.tuned.jobs(inputs.instruct, options, scratch)
        check_rounding(jobs, options)
        shutil.rmtree(scratch, ignore_errors=True)
        return inputs.folders, [*inputs.warnings, *jobs.warnings]

    def graft(self, options: GraftOptions) -> MemoryGraft:
        """Compute what `graft` would write with `options` in the form `model`, bit by bit, from the sources.

        Raises:
            InputError: bad input, as of `graft`.
            GraftError: values that are not finite.
        """
        from ..grafting.in_memory import in_memory
        from ..grafting.precision import choose_precision

        inputs = open_tuned_inputs(self.single, self.instruct, options)
        folder = Path(mkdtemp(dir=self.scratch))
        jobs = inputs.tuned.jobs(inputs.instruct, options, folder / ".converted")
        check_rounding(jobs, options)
        precision = choose_precision(jobs, options)
        jobs = precision.jobs
        weights, outcome = in_memory(jobs, precision.options)
        shutil.rmtree(folder / ".converted", ignore_errors=True)
        check_finite(outcome)
        copy_files(copied_files(inputs.instruct), inputs.instruct, folder)
        dtype = main_dtype(jobs.weights)
        write_config(folder, dtype, jobs.config_edits)
        return MemoryGraft(weights, folder, dtype or "", precision.options.rounding)


@contextmanager
@ends_with("Nothing was written.")
def open_grafts(*, base: Source | None, instruct: Source, tuned: Source, beside: Path) -> Iterator[OpenGrafts]:
    """Open a pair and TUNED for grafts in memory; as `graft` does.

    Args:
        base: BASE; may be left out for an adapter that names it.
        instruct: INSTRUCT, which receives the delta.
        tuned: BASE after training.
        beside: path beside which small files and merged adapters lie for as long.
    """
    with one_tuned(base, tuned, beside) as single, Scratch(beside) as scratch:
        yield OpenGrafts(single, instruct, scratch.part)
