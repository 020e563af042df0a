"""The pair: BASE and INSTRUCT together, and every check that they belong together.

INSTRUCT must have been made from BASE by post-training: the same network, the same token ids, weights close by. Checks
run before any work, and one error names everything that is wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from ..arithmetic.sums import Sums
from ..checkpoints.checkpoint import Checkpoint, Place
from ..checkpoints.distance import measure_gap
from ..errors import Findings, PairMismatchError, both_sides, list_names, one_of
from .architectures import compare_architectures, compare_processors
from .special_tokens import check_special_ids, check_template_rows
from .templates import read_templates
from .token_rows import row_count, shared_rows, vocabulary_of
from .vocabulary_checks import SHARED_ADVICE, compare_vocabularies

GAP_WARNING = 0.1
"""sigma that no pair of the paper exceeds: grafts get worse as it grows."""
GAP_LIMIT = 0.5
"""sigma above which the two have nothing to do with each other."""
_SAMPLED_TENSORS = 16
_SAMPLED_ELEMENTS = 4096


@dataclass(frozen=True)
class ModelPair:
    """BASE and INSTRUCT.

    Args:
        base: the model that is trained.
        instruct: the model, made from `base` by post-training, that receives what `base` learnt.

    """

    base: Checkpoint
    instruct: Checkpoint

    @classmethod
    def open(
        cls,
        base: str | Path,
        instruct: str | Path,
        *,
        base_revision: str | None = None,
        instruct_revision: str | None = None,
    ) -> ModelPair:
        """Open both checkpoints; headers, configs and tokenizer files are read, weights are not.

        Args:
            base: folder or hub id, with "@revision" if wished.
            instruct: the same for INSTRUCT.
            base_revision: branch, tag or commit of BASE on the hub. Default: the main branch.
            instruct_revision: the same for INSTRUCT.

        Raises:
            CheckpointError: a side is missing or cannot be read.

        """
        return cls(Checkpoint.open(base, base_revision), Checkpoint.open(instruct, instruct_revision))

    @cached_property
    def common(self) -> list[str]:
        """Names that both sides store, in the order of INSTRUCT's files."""
        return [name for name in self.instruct.specs if name in self.base.specs]

    def check(
        self,
        *,
        level: Literal["configs", "headers", "weights"] = "headers",
        need_template: bool = False,
        allow_wide_gap: bool = False,
        vocab: Literal["strict", "shared"] = "strict",
    ) -> list[str]:
        """Check that INSTRUCT was made from BASE and that BASE can be trained on INSTRUCT's chats.

        Args:
            level: "configs" reads configs, tokenizers, names and shapes, for a BASE whose weights are not there.
                "headers" reads configs, tokenizers, names, shapes, the rows of the template's special tokens and a
                sample of the weights. "weights" reads every weight once, for sigma.
            need_template: refuse an INSTRUCT without a chat template (the training data are conversations).
            allow_wide_gap: only warn when sigma is above 0.5.
            vocab: "shared" accepts another number of token rows; only rows with the same token on both sides count.

        Returns:
            Warnings, one text each; empty when nothing is strange.

        Raises:
            ConfigError: `level` or `vocab` has another value.
            PairMismatchError: the two do not belong together; its text names everything that is wrong.

        """
        one_of("level", level, ("configs", "headers", "weights"))
        one_of("vocab", vocab, ("strict", "shared"))
        adapters = [str(side) for side in (self.base, self.instruct) if side.is_adapter]
        if adapters:
            text = (
                f"{' and '.join(adapters)} is an adapter, not a model.\n  Give the model under it, or merge it first."
            )
            raise PairMismatchError(self._refusal([text]))
        shared = vocab == "shared"
        findings = compare_architectures(self.base.config, self.instruct.config)
        findings.add(self._check_shapes(shared=shared))
        findings.add(compare_vocabularies(vocabulary_of(self.base), vocabulary_of(self.instruct), shared=shared))
        findings.add(self._check_template(need_template=need_template))
        findings.add(check_special_ids(self.base, self.instruct))
        findings.add(compare_processors(self.base.path, self.instruct.path))
        # The rest compares numbers, which says nothing about two different networks.
        if not findings.errors and level != "configs":
            findings.add(check_template_rows(self.base, self.instruct))
            findings.add(self._check_gap(allow_wide_gap) if level == "weights" else self._check_sample())
        if findings.errors:
            raise PairMismatchError(self._refusal(findings.errors))
        return findings.warnings

    def gap(self) -> float | None:
        """Return sigma = sum|B - I| / (sum|B| + sum|I|) over the weights with equal name and shape; None without any.

        0 for equal weights; below 0.05 for the families that Shadow-FT measured (arXiv 2505.12716); about 0.7 for two
        models that have nothing in common; NaN where a weight is not finite.
        """
        if not self._gaps:
            return None
        size = math.fsum(sums.size for sums in self._gaps.values())
        return math.fsum(sums.gap for sums in self._gaps.values()) / size if size else 0.0

    @cached_property
    def _gaps(self) -> dict[str, Sums]:
        """Name -> its sums, for every weight that can be compared; reads all of them once."""
        sides = (self.base, self.instruct)
        names = [name for name in self._comparable() if all(side.specs[name].is_float for side in sides)]
        return measure_gap([(name, Place(self.base, name), Place(self.instruct, name)) for name in names])

    def _comparable(self) -> list[str]:
        ours, theirs = self.base.specs, self.instruct.specs
        return [name for name in self.common if tuple(ours[name].shape) == tuple(theirs[name].shape)]

    def _check_shapes(self, *, shared: bool) -> Findings:
        rows = (row_count(self.base), row_count(self.instruct))
        wrong, only_rows = [], True
        for name in self.common:
            ours, theirs = (tuple(side.specs[name].shape) for side in (self.base, self.instruct))
            if ours == theirs:
                continue
            of_tokens = ours[1:] == theirs[1:] and ours[:1] + theirs[:1] == rows
            if not (shared and of_tokens):
                wrong.append(both_sides(name, ours, theirs))
                only_rows = only_rows and of_tokens
        if not wrong:
            return Findings()
        verb = "differs" if len(wrong) == 1 else "differ"
        way_out = self._rows_advice() if only_rows else "Give the base that instruct was made from."
        headline = f"{len(wrong)} of {len(self.common)} weights {verb} in shape between base and instruct."
        return Findings(errors=[f"{headline}\n{list_names(wrong)}\n{way_out}"])

    def _rows_advice(self) -> str:
        """Say what the token rows are that only one side has, and the way out."""
        try:
            return f"{shared_rows(self.base, self.instruct).explanation()} {SHARED_ADVICE}"
        except PairMismatchError:  # its own finding says so
            return "The two have other numbers of token rows, and their tokenizers do not say which rows they share."

    def _check_template(self, *, need_template: bool) -> Findings:
        ours, theirs = read_templates(self.base.path), read_templates(self.instruct.path)
        if theirs or not (ours or need_template):
            return Findings()
        text = (
            "but base has one.\n  The two look swapped: give the chat model as instruct, the pre-trained one as base."
            if ours
            else "but the training data are conversations.\n  Give a chat model as instruct, or save its template as "
            "chat_template.jinja in its folder."
        )
        return Findings(errors=[f"instruct has no chat template, {text}"])

    def _check_sample(self) -> Findings:
        """Warn when a sample of the weights is the same on both sides; matrices first, norms are often alike."""
        names = sorted(self._comparable(), key=lambda name: -len(self.base.specs[name].shape))
        matrices = [name for name in names if len(self.base.specs[name].shape) > 1]
        step = -(-len(matrices) // _SAMPLED_TENSORS) or 1
        sampled = matrices[::step]
        if not sampled or not all(_same_start(self.base.tensor(name), self.instruct.tensor(name)) for name in sampled):
            return Findings()
        return Findings(warnings=[f"{self._same_weights()} (compared: the first values of {len(sampled)} weights)."])

    def _same_weights(self) -> str:
        return (
            f"base ({self.base}) and instruct ({self.instruct}) look like the same weights: the graft will be the "
            "tuned base"
        )

    def _check_gap(self, allow_wide_gap: bool) -> Findings:
        sigma = self.gap()
        broken = [name for name, sums in self._gaps.items() if not sums.finite]
        if broken:
            headline = f"{len(broken)} of {len(self.common)} weights hold values that are not finite."
            way_out = "Download or save the model again."
            return Findings(errors=[f"{headline}\n{list_names(broken)}\n{way_out}"])
        if sigma is None:
            reason = "base and instruct store their weights under different names."
            return Findings(warnings=[f"sigma was not measured: {reason}"])
        if sigma == 0:
            return Findings(warnings=[f"{self._same_weights()} (sigma is 0)."])
        text = f"base and instruct are far apart: sigma is {sigma:.3g}"
        if sigma > GAP_LIMIT and not allow_wide_gap:
            reason = f"pairs of one family stay below 0.05.\n  Above {GAP_LIMIT} one was not made from the other."
            way_out = "Give the base that instruct was made from; allow_wide_gap continues all the same."
            return Findings(errors=[f"{text}, and {reason} {way_out}"])
        if sigma > GAP_WARNING:
            return Findings(warnings=[f"{text} (pairs of one family stay below 0.05); the graft may transfer badly."])
        return Findings()

    def _refusal(self, errors: list[str]) -> str:
        many = len(errors) > 1
        head = f"this pair cannot be used: {f'{len(errors)} things are wrong with it.' if many else errors[0]}"
        listed = [f"\n{number}. {text}" for number, text in enumerate(errors, 1)] if many else []
        sides = f"\n  base      {self.base}\n  instruct  {self.instruct}\n"
        return head + "".join(listed) + sides + "Nothing was trained and nothing was written."


def _same_start(base: torch.Tensor, instruct: torch.Tensor) -> bool:
    """True when the first values are equal, after rounding to the narrower dtype of the two."""
    ours, theirs = (side.reshape(-1)[:_SAMPLED_ELEMENTS] for side in (base, instruct))
    dtype = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(ours.to(dtype), theirs.to(dtype))
