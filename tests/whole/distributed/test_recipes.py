"""The recipes in two real processes, launched as users launch them, and both stages of the pipeline in one launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pipelines
import pytest
import yaml
from ranks import in_processes
from repository import ROOT
from rows import write_rows

from shadow_trl.evaluation.models import load, tokenizer_and_ends
from shadow_trl.evaluation.scoring import score

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
TWO = {"distributed_type": "MULTI_GPU", "num_processes": 2, "num_machines": 1, "mixed_precision": "no"}


def arms() -> list[str]:
    return [arm["arm"] for arm in json.loads(Path("out/report.json").read_text())["arms"]]


@pytest.fixture
def workspace(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pipelines.fill(tmp_path, pair)
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", **TWO}))
    single = {**pipelines.SHARED, "dataset_name": "sft.jsonl", "accelerate_config": "two.yaml", "num_processes": 2}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(single))
    return tmp_path


def start(*command: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=clean)


# Rates, batches and precision of the second stage are others.
WORDS = ["--sft.learning_rate", "1e-2", "--dpo.learning_rate", "1e-3", "--sft.per_device_train_batch_size", "2"]
WORDS += ["--dpo.per_device_train_batch_size", "1", "--dpo.gradient_accumulation_steps", "2", "--dpo.bf16", "true"]


@pytest.mark.parametrize(("engine", "kind"), [("ddp", "MULTI_CPU"), ("fsdp2", "FSDP")])
def test_both_stages_in_one_launch_are_those_of_two(workspace: Path, engine: str, kind: str) -> None:
    """Weights bit for bit, so nothing of the first stage's settings stays; nor does its memory."""

    def run(output: str, *words: str) -> list[dict]:
        ends = in_processes(pipelines.run, engine, str(workspace), "--output_dir", output, *WORDS, *words)
        assert [(end.error, end.value and end.value["code"]) for end in ends] == [("", 0), ("", 0)]
        return [end.value for end in ends]

    rows = [
        {
            "prompt": [{"role": "user", "content": f"{at}"}],
            "answer": [f"{at}", "1"],
            "kind": "odd" if at % 2 else "even",
        }
        for at in range(7)
    ]
    write_rows(workspace / "asked.jsonl", rows)
    first, second = run("one", "--score_rows", "asked.jsonl", "--score_max_new_tokens", "1")
    # INSTRUCT and the graft of each stage: the processes share the rows, and the report is that of one.
    answers = [row["answer"] for row in rows]
    assert (first["answered"], second["answered"]) == ([answers[::2]] * 3, [answers[1::2]] * 3)
    tokenizer, ends = tokenizer_and_ends("instruct")
    arms = {arm["arm"]: arm["scores"] for arm in json.loads(Path("one/report.json").read_text())["arms"]}
    for name, folder in (("instruct", "instruct"), ("sft", "one/sft/grafted"), ("shadow", "one/dpo/grafted")):
        alone = score(load(folder, dtype="float32"), tokenizer, rows, max_new_tokens=1, eos_token_ids=ends)
        assert {kind: arms[name][kind] for kind in alone.kinds} == pytest.approx(
            {kind: 100 * alone.share(kind) for kind in alone.kinds}
        )
    for seen in (first, second):
        assert seen["stages"] == [(kind, 2, "no", 2), (kind, 2, "bf16", 1)]
        start_of_sft, start_of_dpo = seen["before"]
        assert start_of_dpo <= start_of_sft + 1024
    for stage in ("sft", "dpo"):
        run("two", "--stages", stage)
    files = {path.relative_to("one"): path.read_bytes() for path in Path("one").rglob("*.safetensors")}
    assert {str(name.parent) for name in files} == {"sft", "sft/grafted", "dpo", "dpo/grafted"}
    assert files == {path.relative_to("two"): path.read_bytes() for path in Path("two").rglob("*.safetensors")}


def test_the_command_launches_what_its_file_asks_for(workspace: Path) -> None:
    """Keys of the launcher in the YAML file of the recipe; the comparison and the scores are made once."""
    score = ["--score_rows", "rows.jsonl", "--score_max_new_tokens", "2", "--compare_direct"]
    done = start(sys.executable, "-m", "shadow_trl.cli", "sft", "--config", "sft.yaml", "--output_dir", "out", *score)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("== Tuning BASE") == 1
    assert done.stdout.count("result out/grafted") == 1
    assert arms() == ["instruct", "direct", "tuned", "shadow"]
    state = json.loads(Path("out/shadow.json").read_text())
    assert state["kind"] == "run"


def test_a_failure_of_launched_processes_is_the_commands(workspace: Path) -> None:
    command = [sys.executable, "-m", "shadow_trl.cli", "sft", "--config", "sft.yaml", "--output_dir", "out"]
    done = start(*command, "--instruct_model", "nothing")
    assert done.returncode == 2, done.stderr[-3000:]
    assert "CheckpointError: " in done.stderr
    assert "Nothing was written." in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("out").exists()


def test_the_pipeline_under_accelerate_launch(workspace: Path) -> None:
    script = [str(ROOT / "recipes/shadow_sft_dpo.py"), "--config", "pipeline.yaml", "--output_dir", "out"]
    done = start(*ACCELERATE, "--config_file", "two.yaml", *script, "--score_rows", "rows.jsonl")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("result out/dpo/grafted") == 1
    assert arms() == ["instruct", "sft", "shadow", "tuned"]


def test_processes_that_see_themselves_alone_do_not_train(workspace: Path) -> None:
    """As accelerate starts two without accelerators and without `use_cpu`: each would train by itself."""
    words = ["--output_dir", "out", "--use_cpu", "false"]
    first, second = in_processes(pipelines.run, "alone", str(workspace), *words)
    assert (first.error, first.value["code"], first.value["stages"]) == ("", 2, [])
    # The connection of the second is lost if the first has ended before it was made.
    assert second.kind == "DistNetworkError" or (second.value["code"], second.value["stages"]) == (2, [])
    assert "2 processes were launched (WORLD_SIZE), of which this one sees 1" in first.value["told"]
    assert not Path("out").exists()
