"""INSTRUCT as a guide in SFT: the loss of each answer token is weighed by INSTRUCT's own probability of it.

The idea is that of GIFT (arXiv 2605.01256), whose formula this is not: `w = p_instruct(token | before) ** power`, and
the loss is `sum(w * nll) / tokens`, with TRL's own count of tokens. At power 0 it is TRL's loss.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

from ..checkpoints.manifest import Entry
from ..errors import ConfigError
from .loading import Loading
from .older import needs_newest_trl
from .origins import require_instruct
from .reference import prepared
from .trainers import ShadowSFTTrainer


class _Guided:
    """Of an `SFTTrainer`: weights of all tokens are computed before training, and their model is then released.

    Args:
        guidance_power: of INSTRUCT's probabilities, at least 0.

    Raises:
        ConfigError: the loss is another one than the likelihood of rows, each of them apart in its batch.
    """

    def __init__(self, *args: Any, guidance_power: float, **kwargs: Any) -> None:
        needs_newest_trl("guidance")
        super().__init__(*args, **kwargs)
        self._power = guidance_power
        self._weights: dict[bytes, torch.Tensor] = {}
        _refuse_other_losses(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As TRL, after the weights are computed."""
        with torch.random.fork_rng():  # the order of the rows in training must not depend on this
            self._weigh()
        return super().train(*args, **kwargs)  # type: ignore[misc]

    def _guide(self) -> Entry:
        """Return where INSTRUCT is."""
        raise NotImplementedError

    def _weigh(self) -> None:
        """Keep `p ** power` of every answer token of the training rows."""
        trainer: Any = self
        model = Loading(trainer.args).load(self._guide()).eval().requires_grad_(False)
        with prepared(model, trainer.accelerator, trainer.args) as guide, torch.no_grad():
            for batch in trainer.get_eval_dataloader(trainer.train_dataset):
                found = guide(**batch, use_cache=False, fused_lm_head=True).log_probs
                for key, value in zip(_keys(batch), found, strict=True):
                    self._weights[key] = (self._power * value).exp().cpu()

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As TRL, with the log probabilities times their weights; in evaluation without."""
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]
        rows = [self._weights[key] for key in _keys(inputs)]

        def guided(**inputs: Any) -> Any:
            outputs = model(**inputs)
            weights = torch.zeros_like(outputs.log_probs)
            for place, row in zip(weights, rows, strict=True):
                shared = min(len(place), len(row))  # of other batches, filled to another length
                place[:shared] = row[:shared]
            outputs.log_probs = outputs.log_probs * weights
            return outputs

        return super().compute_loss(guided, inputs, *args, **kwargs)  # type: ignore[misc]


def _keys(batch: dict[str, torch.Tensor]) -> list[bytes]:
    """Return what tells a row of a batch from others: its tokens and labels, without what fills the batch."""
    found = []
    for tokens, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        kept = mask.bool()
        found.append(torch.stack([tokens[kept], labels[kept]]).cpu().numpy().tobytes())
    return found


def _refuse_other_losses(trainer: Any) -> None:
    args = trainer.args
    wrong = {
        "packing": args.packing,
        "padding_free": args.padding_free,
        "loss_type other than nll": args.loss_type != "nll",
        "label_smoothing_factor": args.label_smoothing_factor,
        "several processes": trainer.accelerator.num_processes > 1,
        "streamed data": not hasattr(trainer.train_dataset, "__len__"),
        "data without input_ids, such as pictures": "input_ids" not in (trainer.train_dataset.column_names or ()),
    }
    if found := [name for name, is_so in wrong.items() if is_so]:
        raise ConfigError(f"guidance_power does not go with {', '.join(found)}. Leave one of them out.")


class GuidedSFTTrainer(_Guided, SFTTrainer):
    """TRL's `SFTTrainer` of INSTRUCT, by its name, guided by what it is before."""

    def _guide(self) -> Entry:
        trainer: Any = self
        given = trainer.args.model_init_kwargs or {}
        return Entry(trainer.model.config._name_or_path, given.get("revision"))


class GuidedShadowSFTTrainer(_Guided, ShadowSFTTrainer):
    """`ShadowSFTTrainer` of BASE, guided by INSTRUCT."""

    def _guide(self) -> Entry:
        return require_instruct(self.origins)
