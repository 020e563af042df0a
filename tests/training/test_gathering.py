"""What an engine gathers for a save lies on the disk meanwhile, and an error on saving is one of all processes."""

from __future__ import annotations

import errno
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer

from shadow_trl.errors import CheckpointError, GraftError
from shadow_trl.training import evaluation, gathering
from shadow_trl.training.gathering import copies_on_disk
from shadow_trl.training.mixin import ShadowMixin


def mapped_files() -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "gathered.shadow-part" in line]


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the memory of `tensor` is that of a file which `copies_on_disk` made."""
    places = (line.split()[0].split("-") for line in mapped_files())
    return any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in places)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_copies_to_host_memory_lie_in_files_without_a_name(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(gathering, "_SMALL", 1000)
    large, small = torch.arange(6000).to(dtype).view(60, 100), torch.arange(10).to(dtype)
    with copies_on_disk(tmp_path):
        copies = [large.cpu(), large.to(torch.device("cpu")), large.T.contiguous(), large.T.cpu()]
        others = [small.cpu(), large.contiguous(), large.float(), large + 0]
    assert [is_mapped(copy) for copy in copies] == [True] * 4
    assert not any(map(is_mapped, others))
    for copy, expected in zip(copies, [large, large, large.T, large.T], strict=True):
        assert copy.equal(expected)
        assert (copy.dtype, copy.is_contiguous()) == (dtype, True)
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 4  # as safetensors wants them
    assert not list(tmp_path.iterdir())
    del copies, copy
    assert not mapped_files()
    assert not is_mapped(large.cpu())


def test_copies_for_which_the_disk_has_no_room_stay_in_memory(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(gathering, "_SMALL", 0)
    original, calls = gathering._in_file, []

    def full(tensor, folder):
        calls.append(tensor)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(tensor, folder)

    monkeypatch.setattr(gathering, "_in_file", full)
    weights = [torch.full((100,), float(number)) for number in range(4)]
    with copies_on_disk(tmp_path), caplog.at_level(logging.WARNING):
        copies = [weight.cpu() for weight in weights]
    assert [is_mapped(copy) for copy in copies] == [True, False, False, False]
    assert all(map(torch.equal, copies, weights))
    assert [record.message for record in caplog.records] == [
        "The weights that are gathered for saving stay in host memory: [Errno 28] No space left on device."
    ]


@pytest.mark.parametrize("error", [ValueError("no such dtype"), CheckpointError("no such file")])
def test_an_error_while_saving_is_not_taken_for_deepspeeds_word_that_it_gathers_nothing(tmp_path, error):
    """transformers would save the shards for any ValueError: one process would wait for all others."""

    class Fails(Trainer):
        def _save(self, output_dir=None, state_dict=None):
            raise error

    class Saves(ShadowMixin, Fails):
        def __init__(self):
            self.args = SimpleNamespace(output_dir=str(tmp_path), graft=True, graft_every_save=False)
            self.args.should_save, self.args.save_only_model, self.args.push_to_hub = True, False, False
            self.model, self.is_fsdp_enabled, self.is_deepspeed_enabled = nn.Linear(2, 2), False, True
            self.deepspeed = SimpleNamespace(config={})
            self.model_wrapped = SimpleNamespace(save_checkpoint=lambda *_, **__: pytest.fail("it waits for others"))
            self.accelerator = SimpleNamespace(state=None, get_state_dict=lambda engine: {"weight": torch.ones(1)})

    with pytest.raises(GraftError, match="no such") as caught:
        Saves().save_model()
    assert not isinstance(caught.value, ValueError)


def test_weights_of_a_mapped_file_stay_where_they_are_while_a_graft_is_evaluated(tmp_path, monkeypatch):
    """On a CPU in the place of an accelerator; their storage has a fixed size."""
    monkeypatch.setattr(evaluation, "_HOST", ("meta",))
    save_file({"weight": torch.arange(6.0).view(2, 3)}, tmp_path / "model.safetensors")
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight.data = load_file(tmp_path / "model.safetensors")["weight"]
    assert not model[0].weight.untyped_storage().resizable()
    before = model[1].weight.clone()
    with evaluation.in_host_memory(model):
        assert [layer.weight.untyped_storage().nbytes() for layer in model] == [24, 0]
    assert model[0].weight.flatten().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert model[1].weight.equal(before)
