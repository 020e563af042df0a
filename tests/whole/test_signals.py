"""Real signals to real processes: SIGTERM cleans up and says so; after SIGKILL the next run does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import family
from repository import ROOT

from shadow_trl import graft

pytestmark = pytest.mark.slow
PROGRAM = """
import json, os, sys
words, number = json.loads(sys.argv[1])
import shadow_trl.{module} as module
real = module.{name}
def late(*given, **options):
    os.kill(os.getpid(), number)
    return real(*given, **options)
module.{name} = late
from shadow_trl.cli import main
sys.exit(main(words))
"""
SUM = "graft --base base --instruct instruct --tuned tuned:0.5 --tuned tuned:0.25 --output out"
CASES = {
    "graft": ("graft --base base --instruct instruct --tuned tuned --output out", "grafting.stream", "stream"),
    "sum": (SUM, "grafting.stream", "stream"),
    "verify": ("verify graft", "grafting.stream", "stream_to"),
    "delta": ("delta --base base --tuned tuned --output out", "grafting.stream", "stream"),
}


def run(words: str, number: int, module: str, name: str) -> tuple[int, str]:
    program = PROGRAM.format(module=module, name=name)
    done = subprocess.run([sys.executable, "-c", program, json.dumps([words.split(), number])], check=False,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("case", CASES)
def test_what_is_half_done_goes(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    family(tmp_path, dtypes=(torch.float32,) * 3)
    graft(base="base", instruct="instruct", tuned="tuned", output="graft", progress=False)
    words, *place = CASES[case]
    before = sorted(tmp_path.rglob("*"))
    code, error = run(words, signal.SIGTERM, *place)
    ending = "" if case == "verify" else ". Nothing was written."  # what it made to compare with is gone
    assert (code, error.splitlines()[-1]) == (143, f"Terminated{ending}")
    assert sorted(tmp_path.rglob("*")) == before
    assert run(words, signal.SIGKILL, *place)[0] == -signal.SIGKILL
    assert len(list(tmp_path.rglob("*"))) > len(before)
    assert run(words, 0, *place)[0] == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("words", "code"), [(CASES["graft"][0], 0), ("graft --tuned x", 2)])
def test_a_signal_while_python_closes_changes_nothing(tmp_path, monkeypatch, words, code):
    monkeypatch.chdir(tmp_path)
    family(tmp_path, dtypes=(torch.float32,) * 3)
    said = set()
    for number in (0, signal.SIGTERM, signal.SIGINT):
        late = f"import atexit, os, sys; atexit.register(os.kill, os.getpid(), {int(number)}); "
        program = late + "from shadow_trl.cli import main; sys.exit(main())"
        done = subprocess.run([sys.executable, "-c", program, *words.split()], check=False, capture_output=True,
                              text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        shutil.rmtree("out", ignore_errors=True)
        assert done.returncode == code
        said.add(done.stderr)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "Terminated"), (signal.SIGINT, 130, "Interrupted")]
)
def test_a_training_that_is_stopped_says_what_it_left(tmp_path, number, code, word):
    data, out = ROOT / "data", tmp_path / "run"
    words = (
        f"sft --model_name_or_path {data}/nano-base --instruct_model {data}/nano-instruct --dataset_name "
        f"{data}/sft.jsonl --output_dir {out} --max_steps 4 --save_strategy steps --save_steps 2 --report_to none "
        "--use_cpu true --bf16 false --train_rows 16 --per_device_train_batch_size 2"
    )
    program = f"""
import os, sys
from transformers import TrainerCallback
from shadow_trl.training import trainers
class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **given):
        if state.global_step == 3:
            os.kill(os.getpid(), {int(number)})
real = trainers.ShadowSFTTrainer.__init__
def init(self, *given, **options):
    real(self, *given, **options)
    self.add_callback(Stops())
trainers.ShadowSFTTrainer.__init__ = init
from shadow_trl.cli import main
sys.exit(main({words.split()!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == code, done.stderr
    # TRL writes its card with each checkpoint.
    assert done.stderr.splitlines()[-1] == f"{word}. Written so far: {out / 'README.md'}, {out / 'checkpoint-2'}."
    assert [path.name for path in Path(tmp_path).iterdir()] == ["run"]
