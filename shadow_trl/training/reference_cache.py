"""Where reference log probabilities are kept between runs, and what their values depend on.

TRL caches them beside the data under a key of the data and the model. The key here has everything the values depend
on and nothing else, and rows in memory get a file that all processes find.
"""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model

from ..runtime.processes import run_on_main

if TYPE_CHECKING:
    from accelerate import Accelerator
    from trl import DPOConfig


def policy_hash(model: Any) -> str:
    """Return a digest of the weights that the reference `init` of `model` has: those of the policy as it starts.

    Under an adapter these are the frozen ones: the model below it, and TRL's copy of an adapter that goes on. The
    trainable ones would make every seed of a new LoRA another reference, though all of them start as BASE.
    """
    from trl.trainer.utils import hash_module

    if not is_peft_model(model):
        return hash_module(model)
    state = model.state_dict()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return hash_module(_Frozen({name: tensor for name, tensor in state.items() if name not in trained}))


class _Frozen(torch.nn.Module):
    """Some weights as a module, for TRL's `hash_module`."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for place, (_, tensor) in enumerate(sorted(state.items())):
            self.register_buffer(f"{place:06d}", tensor)


def reference_key(model_hash: str, args: DPOConfig) -> str:
    """Return the part of the cache's key that does not come from the data: the model, and how its values are summed.

    Args:
        model_hash: of the reference's weights and dtypes.
        args: of the run; `ld_alpha` weighs tokens, the lengths cut them, mixed precision rounds.
    """
    from datasets.fingerprint import Hasher

    how = (args.ld_alpha, args.max_length, args.truncation_mode, args.bf16, args.fp16)
    return Hasher.hash((model_hash, *how))


def with_content_fingerprint(dataset: Any) -> Any:
    """Return `dataset` with the digest of its tokens as its fingerprint.

    The fingerprint that `datasets` keeps covers the functions that made the data, and through TRL's closures the whole
    config: another `output_dir` would compute the same values again.
    """
    import pyarrow

    names = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids") if name in dataset.column_names]
    digest = hashlib.blake2b(digest_size=16)
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema.remove_metadata()) as stream:
            stream.write_table(table.replace_schema_metadata(None).combine_chunks())
        digest.update(sink.getvalue())
    same = copy.copy(dataset)
    same._fingerprint = digest.hexdigest()
    return same


def shared_on_disk(dataset: Any, accelerator: Accelerator) -> Any:
    """Return `dataset` from a file all processes can read; as it is on one process, or where it lies in a file already.

    TRL's cache of reference log probabilities lies beside the data's file. Data in memory has one temporary folder a
    process, where the other processes find nothing.
    """
    import datasets

    if accelerator.num_processes == 1 or not isinstance(dataset, datasets.Dataset) or dataset.cache_files:
        return dataset
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "shadow_trl" / dataset._fingerprint

    def save() -> str:
        if not folder.exists():
            # Renamed when it is whole: a run that is killed here must not leave half of the rows to the next.
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".shadow-", dir=folder.parent) as unfinished:
                dataset.save_to_disk(f"{unfinished}/rows")
                os.rename(f"{unfinished}/rows", folder)
        return str(folder)

    return datasets.load_from_disk(run_on_main(accelerator, save, what="saving the data"))
