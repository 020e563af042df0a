"""Checkpoints of FSDP and ZeRO are recognised, and what the error tells to do works."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest
import torch
from families import family, tensors

from shadow_trl.checkpoints.checkpoint import Checkpoint
from shadow_trl.errors import CheckpointError


def told(folder) -> tuple[str, list[str]]:
    """The error of a folder, and the command in it."""
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(folder)
    text = str(error.value)
    command = re.search(r"with\n  (.*)\nThen give OUT", text)
    assert command is not None, text
    return text, [word.replace("OUT", f"{folder.parent}/OUT") for word in shlex.split(command[1])]


def test_the_one_file_of_fsdp_is_copied_as_the_error_says(tmp_path):
    saved = tmp_path / "saved"
    saved.mkdir()
    torch.save(tensors(7), saved / "pytorch_model_fsdp.bin")
    text, command = told(saved)
    assert "FULL_STATE_DICT" in text
    subprocess.run(shlex.join(command).replace("'&&'", "&&"), shell=True, check=True)
    merged = Checkpoint.open(tmp_path / "OUT")
    assert all(merged.tensor(name).equal(tensor) for name, tensor in tensors(7).items())


def test_shards_of_deepspeed_are_named_with_the_dtype_to_pass(tmp_path):
    saved = tmp_path / "saved"
    (saved / "global_step2").mkdir(parents=True)
    (saved / "zero_to_fp32.py").touch()
    text, command = told(saved)
    assert command == ["python", str(saved / "zero_to_fp32.py"), str(saved), str(tmp_path / "OUT")]
    assert "--base-dtype bfloat16" in text


def test_whole_weights_beside_the_files_of_an_engine_are_read(tmp_path):
    tuned = family(tmp_path)["tuned"]
    (tuned / "pytorch_model_fsdp.bin").touch()
    assert Checkpoint.open(tuned).specs
