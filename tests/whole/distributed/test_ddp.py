"""Plain data parallelism in two real processes on the CPU."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import ddp
import others_in_processes as others
import publishing
import pytest
import torch
from hub_server import HubServer
from ranks import in_processes
from runs import log_probability
from safetensors.torch import load_file
from tiny import preference_data, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from shadow_trl import graft
from shadow_trl.checkpoints.manifest import write_manifest

pytestmark = pytest.mark.distributed
SCRIPT = Path(__file__).with_name("ddp_script.py")


def launch(pair: tuple[Path, Path], output: Path, mode: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *(str(SCRIPT), str(pair[0]), str(pair[1]), str(output), mode),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_graft_is_written_once_with_the_bytes_of_a_graft_of_the_folder(pair, tmp_path, mode):
    """The graft of a run is shared out over as many processes as the run has; the other one is made by a single one."""
    instruct = shutil.copytree(pair[1], tmp_path / "instruct")
    (instruct / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(pair[1]).save_pretrained(instruct, max_shard_size="10KB")
    ends = in_processes(ddp.run, str(pair[0]), str(instruct), str(tmp_path / "out"), mode)
    assert [end.error for end in ends] == ["", ""]
    assert [set(end.value["shares"]) for end in ends] == [{2}, set()]
    graft(
        base=str(pair[0]),
        instruct=str(instruct),
        tuned=str(tmp_path / "out"),
        output=str(tmp_path / "again"),
        base_dtype="tuned",
    )
    written = {path.name: path.read_bytes() for path in (tmp_path / "out" / "grafted").glob("*.safetensors*")}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.safetensors*")}
    assert len(written) > 2
    if mode == "full":
        figures = [end.value["figure"] for end in ends]
        assert figures == pytest.approx([plain_loss(tmp_path / "out" / "grafted", instruct, tmp_path / "plain")] * 2)
        assert not list((tmp_path / "out").glob(".*"))


def plain_loss(model: Path, reference: Path, output: Path) -> float:
    """The loss of plain TRL, in one process."""
    return DPOTrainer(
        model=str(model),
        ref_model=AutoModelForCausalLM.from_pretrained(reference, dtype="float32"),
        args=DPOConfig(str(output), use_cpu=True, bf16=False, report_to="none", per_device_eval_batch_size=4),
        train_dataset=preference_data(4),
        eval_dataset=preference_data(4),
        processing_class=AutoTokenizer.from_pretrained(model),
    ).evaluate()["eval_loss"]


@pytest.mark.slow
def test_error_on_the_writing_rank_ends_every_rank(pair, tmp_path):
    run = launch(pair, tmp_path / "out", "blocked")
    assert run.returncode != 0
    assert "done" not in run.stdout
    assert "OutputExistsError" in run.stderr
    assert "the graft failed on the main process" in run.stderr
    assert (tmp_path / "out" / "grafted" / "result.txt").read_text() == "somebody's"


@pytest.mark.slow
def test_one_process_uploads_and_all_know_of_a_failure(pair, tmp_path):
    with HubServer() as hub:
        hub.refuses["/commit/refused"] = 403
        ends = in_processes(publishing.run, str(pair[0]), str(pair[1]), str(tmp_path / "out"), hub.url)
        assert [end.error for end in ends] == ["", ""]
        assert [end.value["commit"] for end in ends] == [hub.commit, None]
        assert hub.messages == ["End of training"]
        assert hub.files["me/out"]["taken"].keys() > {"model.safetensors", "shadow.json"}
    command = f"shadow-trl push {tmp_path / 'out' / 'grafted'} me/out@refused"
    assert all(command in end.value["refused"] for end in ends)
    assert "the main process" in ends[1].value["refused"]


@pytest.mark.slow
def test_graft_of_the_start_is_shared_by_the_ranks_and_gone_afterwards(pair, tmp_path):
    """DPO from a full model of an earlier stage with `ref_policy="grafted"` and rows in memory."""
    tuned = save_model(tmp_path / "tuned", seed=9, dtype=torch.float32)
    write_manifest(tuned, {"kind": "run", "base": {"source": str(pair[0])}, "instruct": {"source": str(pair[1])}})
    ends = in_processes(ddp.run, str(tuned), str(pair[1]), str(tmp_path / "out"), "second stage")
    assert [end.error for end in ends] == ["", ""]
    shown = [end.value["values"] for end in ends]
    assert shown[0] == shown[1]
    # By hand: INSTRUCT + (tuned - BASE), in float64.
    states = [load_file(folder / "model.safetensors") for folder in (pair[0], pair[1], tuned)]
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float64)
    model.load_state_dict(
        {name: states[1][name].double() + states[2][name].double() - states[0][name].double() for name in states[0]},
        strict=False,
    )
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    expected = [log_probability(model, tokenizer, row, "chosen") for row in preference_data()]
    assert shown[0] == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_other_trainers_leave_what_trl_does_and_graft_the_sum(pair, tmp_path):
    others.check_as_trl("ddp", pair, tmp_path, full=("KTO", "RLOO", "ORPO"), adapted=("GRPO", "CPO"))
