"""The pair: the checks that INSTRUCT was made from BASE, made before any work; one error names all that is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arithmetic.sums import Sums
from ..checkpoints.checkpoint import Checkpoint, Place
from ..errors import Findings, PairMismatchError, both_sides, list_names, one_of
from .architectures import compare_architectures, compare_processors, compare_trained
from .special_tokens import check_special_ids
from .templates import read_templates
from .token_rows import explain_rows, row_count, vocabulary_of
from .vocabularies import Vocabulary
from .vocabulary_checks import SHARED_ADVICE, compare_trained_vocabulary, compare_vocabularies

if TYPE_CHECKING:
    pass

GAP_WARNING = 0.1
"""sigma that no pair of the paper exceeds: grafts get worse as it grows."""
GAP_LIMIT = 0.5
"""sigma above which the two have nothing to do with each other."""
_SAMPLED_TENSORS = 16
_SAMPLED_ELEMENTS = 4096


@dataclass(frozen=True)
class ModelPair:
    """BASE, which is trained, and INSTRUCT, made from it by post-training, which receives what it learnt."""

    base: Checkpoint
    instruct: Checkpoint

    @classmethod
    def open(cls, base: str | Path, instruct: str | Path) -> ModelPair:
        """Open both sides, each a folder or hub id, with "@revision" if wished; no weights are read.

        Raises:
            CheckpointError: a side is missing or cannot be read.

        """
        return cls(Checkpoint.open(base), Checkpoint.open(instruct))

    @cached_property
    def common(self) -> list[str]:
        """Names that both sides store, in the order of INSTRUCT's files."""
        return [name for name in self.instruct.specs if name in self.base.specs]

    def check(
        self,
        *,
        level: str = "headers",
        need_template: bool = False,
        template: str | None = None,
        allow_wide_gap: bool = False,
        vocab: str = "strict",
        trains: bool = True,
    ) -> list[str]:
        """Check that INSTRUCT was made from BASE and that BASE can be trained on INSTRUCT's chats.

        Args:
            level: "configs" reads configs, tokenizers, names and shapes, for a BASE whose weights are not there.
                "headers" reads configs, tokenizers, names, shapes, the rows of the template's special tokens and a
                sample of the weights. "weights" reads every weight once, for sigma.
            need_template: refuse an INSTRUCT without a chat template (the training data are conversations).
            template: text of the chat template that training uses in the place of INSTRUCT's.
            allow_wide_gap: only warn when sigma is above 0.5.
            vocab: "shared" accepts another number of token rows; only rows with the same token on both sides count.
            trains: whether INSTRUCT's tokenizer will index BASE's rows. False with "shared": for a TUNED that exists,
                INSTRUCT may use tokens for which BASE has no row.

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
            what = f"{' and '.join(adapters)} is an adapter, not a model."
            raise self._refusal([f"{what}\n  Give the model under it, or merge it first."])
        shared = vocab == "shared"
        findings = compare_architectures(self.base.config, self.instruct.config)
        findings.add(self._check_shapes(shared=shared))
        findings.add(compare_vocabularies(vocabulary_of(self.base), vocabulary_of(self.instruct), shared=shared))
        findings.add(self._check_template(need_template=need_template and not template))
        if trains or not shared:
            findings.add(check_special_ids(self.base, self.instruct))
        findings.add(compare_processors(self.base.path, self.instruct.path))
        # The rest compares numbers, which says nothing about two different networks.
        if not findings.errors and level != "configs":
            from .untrained_rows import check_template_rows  # nothing above needs what it imports

            findings.add(check_template_rows(self.base, self.instruct, template))
            findings.add(self._check_gap(allow_wide_gap) if level == "weights" else self._check_sample())
        if findings.errors:
            raise self._refusal(findings.errors)
        return findings.warnings

    def check_trained(self, config: dict[str, Any], tokenizer: Vocabulary) -> list[str]:
        """Check that TUNED, or the model that becomes it, is BASE's network and was trained on INSTRUCT's token ids.

        Args:
            config: its config; {} where there is none, as for an adapter.
            tokenizer: its tokenizer, in a folder that may have none.

        Returns:
            Warnings, one text each: settings and tokens that the result, which takes INSTRUCT's, has not.

        Raises:
            PairMismatchError: another architecture or size than BASE's, or the same token ids mean other tokens.

        """
        role = "base" if self.instruct is self.base else "instruct"  # a delta has no INSTRUCT yet
        findings = compare_trained(self.base.config, self.instruct.config, config, role)
        findings.add(compare_trained_vocabulary(tokenizer, vocabulary_of(self.instruct), role))
        if findings.errors:
            raise self._refusal(findings.errors, "what was trained cannot be used with this pair")
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
        from ..checkpoints.distance import measure_gap

        sides = (self.base, self.instruct)
        names = [name for name in self._comparable() if all(side.specs[name].is_float for side in sides)]
        return measure_gap([(name, Place(self.base, name), Place(self.instruct, name)) for name in names])

    def _comparable(self) -> list[str]:
        return [name for name in self.common if self.base.specs[name].shape == self.instruct.specs[name].shape]

    def _check_shapes(self, *, shared: bool) -> Findings:
        rows = (row_count(self.base), row_count(self.instruct))
        wrong, only_rows = [], True
        for name in self.common:
            ours, theirs = (side.specs[name].shape for side in (self.base, self.instruct))
            of_tokens = ours[1:] == theirs[1:] and ours[:1] + theirs[:1] == rows
            if ours != theirs and not (shared and of_tokens):
                wrong.append(both_sides(name, ours, theirs))
                only_rows = only_rows and of_tokens
        if not wrong:
            return Findings()
        verb = "differs" if len(wrong) == 1 else "differ"
        headline = f"{len(wrong)} of {len(self.common)} weights {verb} in shape between base and instruct."
        way_out = "Give the base that instruct was made from."
        if only_rows:
            try:
                way_out = f"{explain_rows(self.base, self.instruct)} {SHARED_ADVICE}"
            except PairMismatchError:  # its own finding says so
                way_out = (
                    "They have other numbers of token rows, and their tokenizers do not say which rows they share."
                )
        return Findings(errors=[f"{headline}\n{list_names(wrong)}\n{way_out}"])

    def _check_template(self, *, need_template: bool) -> Findings:
        ours, theirs = read_templates(self.base.path), read_templates(self.instruct.path)
        if theirs or not (ours or need_template):
            return Findings()
        if ours:
            text = (
                "base has one.\n  The two look swapped: give the chat model as instruct, the pre-trained one as base."
            )
        else:
            text = (
                "the training data are conversations.\n  Give a chat model as instruct, or save its template as "
                "chat_template.jinja in its folder."
            )
        return Findings(errors=[f"instruct has no chat template, but {text}"])

    def _check_sample(self) -> Findings:
        """Warn when the first values of a sample of matrices are the same on both sides; norms are often alike."""
        matrices = [name for name in self._comparable() if len(self.base.specs[name].shape) > 1]
        sampled = matrices[:: -(-len(matrices) // _SAMPLED_TENSORS) or 1]
        if not sampled or not all(_same_start(self.base, self.instruct, name) for name in sampled):
            return Findings()
        return self._same_weights(f"compared: the first values of {len(sampled)} weights")

    def _same_weights(self, how: str) -> Findings:
        text = f"base ({self.base}) and instruct ({self.instruct}) look like the same weights: the graft will be the"
        return Findings(warnings=[f"{text} tuned base ({how})."])

    def _check_gap(self, allow_wide_gap: bool) -> Findings:
        sigma = self.gap()
        broken = [name for name, sums in self._gaps.items() if not sums.finite]
        if broken:
            headline = f"{len(broken)} of {len(self.common)} weights hold values that are not finite."
            return Findings(errors=[f"{headline}\n{list_names(broken)}\nDownload or save the model again."])
        if sigma is None:
            reason = "base and instruct store their weights under different names."
            return Findings(warnings=[f"sigma was not measured: {reason}"])
        if sigma == 0:
            return self._same_weights("sigma is 0")
        text = f"base and instruct are far apart: sigma is {sigma:.3g}"
        if sigma > GAP_LIMIT and not allow_wide_gap:
            reason = f"pairs of one family stay below 0.05.\n  Above {GAP_LIMIT} one was not made from the other."
            way_out = "Give the base that instruct was made from; allow_wide_gap continues all the same."
            return Findings(errors=[f"{text}, and {reason} {way_out}"])
        if sigma > GAP_WARNING:
            return Findings(warnings=[f"{text} (pairs of one family stay below 0.05); the graft may transfer badly."])
        return Findings()

    def _refusal(self, errors: list[str], head: str = "this pair cannot be used") -> PairMismatchError:
        what = errors[0]
        if len(errors) > 1:
            listed = "\n".join(f"{number}. {text}" for number, text in enumerate(errors, 1))
            what = f"{len(errors)} things are wrong with it.\n{listed}"
        sides = f"  base      {self.base}\n  instruct  {self.instruct}"
        return PairMismatchError(f"{head}: {what}\n{sides}")


def _same_start(base: Checkpoint, instruct: Checkpoint, name: str) -> bool:
    """True when the first values are equal, after rounding to the narrower dtype of the two."""
    import numpy as np

    from ..arithmetic import kernel

    size = min(base.specs[name].numel, _SAMPLED_ELEMENTS)
    sides = [Place(side, name) for side in (base, instruct)]
    if not all(side.spec.is_float for side in sides):  # whole numbers, complex ones
        ours, theirs = (side.content(0, size) for side in sides)
        return sides[0].spec.code == sides[1].spec.code and np.array_equal(ours, theirs)
    narrower = min((side.spec for side in sides), key=lambda spec: spec.itemsize)
    ours, theirs = (np.empty(size, narrower.numpy_dtype) for _ in sides)
    for rounded, side in zip((ours, theirs), sides, strict=True):
        kernel.convert(rounded, side.array(0, size))
    return kernel.distances(ours, theirs, None)[0] == 0.0
