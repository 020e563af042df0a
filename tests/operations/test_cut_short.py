"""An input that is cut short while a command reads it: exit 1, the file named, nothing left, on every way to read."""

from __future__ import annotations

import os

import pytest
import torch
from families import family, load, lora

from shadow_trl import cli, extract_delta, graft
from shadow_trl.checkpoints.open_files import OpenFiles


def as_bin(folder):
    torch.save(load(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder / "pytorch_model.bin"


CASES = {
    "graft base": ("graft --base base --instruct instruct --tuned tuned --output out", "base/model.safetensors"),
    "graft instruct": ("graft --base base --instruct instruct --tuned tuned --output out",
                       "instruct/model.safetensors"),
    "graft a .bin": ("graft --base base --instruct instruct --tuned bin --output out", "bin/pytorch_model.bin"),
    "graft a sum": ("graft --base base --instruct instruct --tuned tuned:0.5 --tuned bin:0.5 --output out",
                    "tuned/model.safetensors"),
    "graft a LoRA": ("graft --base base --instruct instruct --tuned lora --format model --output out",
                     "lora/adapter_model.safetensors"),
    "graft a LoRA as adapter": ("graft --base base --instruct instruct --tuned lora --format adapter --scale 0.5 "
                                "--output out", "lora/adapter_model.safetensors"),
    "graft a delta": ("graft --instruct instruct --delta delta --output out", "delta/delta.safetensors"),
    "gap": ("gap --base base --instruct instruct --json out", "instruct/model.safetensors"),
    "delta": ("delta --base base --tuned tuned --output out", "tuned/model.safetensors"),
    "delta of a LoRA": ("delta --base base --tuned lora --output out", "lora/adapter_model.safetensors"),
    "verify": ("verify graft", "graft/model.safetensors"),
    "verify an input": ("verify graft", "tuned/model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_file_is_named_and_nothing_is_left(tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    sides = family(tmp_path, dtypes=(torch.float32,) * 3)
    family(tmp_path / "other")["tuned"].rename(tmp_path / "bin")
    as_bin(tmp_path / "bin")
    lora(tmp_path / "lora", base_model_name_or_path=str(sides["base"]))
    words, cut = CASES[case]
    if "--delta" in words:
        extract_delta(base="base", tuned="tuned", output="delta", progress=False)
    if "verify" in words:
        graft(base="base", instruct="instruct", tuned="tuned", output="graft", progress=False)
    real, before = OpenFiles.read, sorted(tmp_path.rglob("*"))

    def shorter(self, path, *place):
        if str(path).endswith(cut):
            os.truncate(path, 16)
        return real(self, path, *place)

    monkeypatch.setattr(OpenFiles, "read", shorter)
    assert cli.main([*words.split(), "--quiet"]) == 1
    error = capsys.readouterr().err
    assert "1 input files were replaced or written to while they were read: the result could be a mixture.\n  " in error
    assert cut in error
    assert error.endswith("Nothing was written.\n") == words.startswith(("graft", "delta"))  # what writes a folder
    assert sorted(tmp_path.rglob("*")) == before
