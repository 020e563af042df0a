"""The pipeline recipe: what is done stays, what is not done goes on, and bad input ends before anything is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from pipelines import LORA, SHARED, fill, write_config
from repository import ROOT
from rows import short, write_rows
from stages import tuned_weights, weights
from trl import ScriptArguments

from shadow_trl.checkpoints.manifest import write_manifest
from shadow_trl.cli import main as shadow_trl
from shadow_trl.errors import CheckpointError, ConfigError
from shadow_trl.recipes import pipeline
from shadow_trl.recipes.data import load_split
from shadow_trl.recipes.pipeline import main_sft_dpo
from shadow_trl.recipes.pipeline_options import is_done, read_plan
from shadow_trl.recipes.record import check_record, write_record
from shadow_trl.training.resuming import last_complete

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture
def workspace(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, pair)
    return tmp_path


SAVING = ["--save_strategy", "steps", "--save_steps", "1", "--output_dir", "out"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, pair: tuple[Path, Path]) -> Path:
    """A pipeline that ran through without a stop, with a checkpoint at each step."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        fill(folder, pair)
        assert run(*SAVING) == 0
    return folder / "out"


@pytest.fixture
def ended(workspace: Path, whole_run: Path) -> dict[str, bytes]:
    """The folder `out` of a pipeline that has ended; its files."""
    shutil.copytree(whole_run, workspace / "out")
    return files(whole_run)


def run(*words: str) -> int:
    return main_sft_dpo(["--config", "pipeline.yaml", *words])


def files(folder: Path) -> dict[str, bytes]:
    """Bytes of everything that a run keeps; manifests and arguments name folders and times."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_without_output_dir_both_stages_and_the_table(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--score_rows", "rows.jsonl", "--score_max_new_tokens", "2") == 0
    (root,) = (workspace / "outputs").iterdir()
    assert root.name.startswith("shadow_sft_dpo-")
    assert is_done(root / "sft")
    assert is_done(root / "dpo")
    manifest = json.loads((root / "dpo/shadow.json").read_text())
    # Nothing was said twice: BASE and INSTRUCT come from the manifest of the first stage.
    assert (manifest["base"]["source"], manifest["instruct"]["source"]) == ("base", "instruct")
    assert manifest["policy"]["source"] == str(root.relative_to(workspace) / "sft")
    report = json.loads((root / "report.json").read_text())
    assert [arm["arm"] for arm in report["arms"]] == ["instruct", "sft", "shadow", "tuned"]
    assert set(report["seconds"]) == {"SFT", "DPO", "score"}
    assert report["graft"]["delta_to_gap"] > 0
    shown = capsys.readouterr().out
    table = [line.split("  ")[0] for line in shown.splitlines()]
    for title in ("INSTRUCT untouched", "graft after SFT", "graft after DPO"):
        assert title in table
    assert f"result {root.relative_to(workspace)}/dpo/grafted  (graft after DPO)" in shown


def test_one_by_one_is_the_same(ended: dict[str, bytes]) -> None:
    for stages in ("sft", "dpo"):
        assert run("--output_dir", "parts", "--stages", stages) == 0
    parts = files(Path("parts"))
    assert "dpo/grafted/model.safetensors" in parts
    assert parts == {name: data for name, data in ended.items() if "checkpoint-" not in name}


def test_what_is_done_stays(ended: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is trained: no file of weights is written again, though the bytes would be the same."""

    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.safetensors")}

    before = written()
    assert run("--output_dir", "out", "--stages", "dpo,sft") == 0
    shown = capsys.readouterr().out
    assert "SFT is done: out/sft/grafted" in shown
    assert "DPO is done: out/dpo/grafted" in shown
    assert "result out/dpo/grafted  (graft after DPO)" in shown
    assert run("--output_dir", "out", "--json") == 0
    shown = capsys.readouterr().out
    assert json.loads(shown) == json.loads(Path("out/report.json").read_text())
    assert files(Path("out")) == ended
    assert written() == before


@pytest.mark.parametrize(
    ("words", "differs"),
    [
        (["--dpo.learning_rate", "0.5"], "out/dpo holds a run with other options: 1 of"),
        (["--sft.max_steps", "7", "--stages", "dpo"], "max_steps: 2 there, 7 now"),
        (["--seed", "7"], "out/sft holds a run with other options"),
        (["--graft_scale", "0.5"], "graft_scale: 1.0 there, 0.5 now"),
        (["--sft.eos_token", "b"], "eos_token: None there, 'b' now"),
    ],
)
def test_other_options_of_a_stage_that_is_done_are_refused(
    ended: dict[str, bytes], words: list[str], differs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--output_dir", "out", *words) == 2
    shown = capsys.readouterr().err
    assert differs in shown
    assert "choose another output_dir, or remove out/" in shown
    assert "Nothing was written." in shown
    assert files(Path("out")) == ended


def test_no_password_is_recorded(workspace: Path) -> None:
    plan = read_plan(["--config", "pipeline.yaml", "--hub_token", "secret"])
    assert "secret" not in json.dumps(plan.records)


def test_other_rows_in_the_data_of_a_stage_that_is_done_are_refused(
    ended: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    (data,) = (Path(name) for name in ("dpo.jsonl", "preferences.jsonl") if Path(name).is_file())
    rows = data.read_text().splitlines(keepends=True)
    data.write_text("".join(reversed(rows)))
    assert run("--output_dir", "out") == 2
    assert "dataset_name: 'sha256:" in capsys.readouterr().err


@pytest.mark.parametrize("role", ["base", "instruct"])
def test_a_model_that_changed_under_its_name_since_a_stage_was_done_is_refused(
    ended: dict[str, bytes], role: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(role).resolve()
    Path(role).unlink()
    shutil.copytree(model, role)
    weights = Path(role, "model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert run("--output_dir", "out") == 2
    assert f"other weights of {role}: since then model.safetensors in {role} changed" in capsys.readouterr().err
    assert files(Path("out")) == ended


def test_data_in_a_folder_is_recorded_by_what_it_holds(workspace: Path) -> None:
    rows = Path("rows")
    rows.mkdir()
    shutil.copy("sft.jsonl", rows / "train.jsonl")

    def record() -> dict[str, Any]:
        return read_plan(["--config", "pipeline.yaml", "--sft.dataset_name", "rows"]).records["sft"]

    before = record()
    assert record() == before
    (rows / "train.jsonl").write_text((rows / "train.jsonl").read_text() + "\n")
    changed = record()
    assert {name for name in before if before[name] != changed[name]} == {"dataset_name"}


def test_a_record_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(tmp_path, {"seed": 1})

    def cut(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode(encoding))
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(OSError, match="Input/output"):
        write_record(tmp_path, {"seed": 2})
    assert json.loads((tmp_path / "options.json").read_text()) == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["options.json"]


@pytest.mark.parametrize("text", ['{"seed": ', "[1]", "\xe9"])
def test_a_record_that_is_cut_short_or_something_else_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "options.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"options\.json"):
        check_record(tmp_path, {"seed": 1})


def test_the_origins_of_a_run_are_of_the_revisions_that_the_options_name(tmp_path: Path) -> None:
    one, two = (digit * 40 for digit in "12")
    sides = {role: {"source": f"org/{role}", "revision": one, "folder": False} for role in ("base", "instruct")}
    write_manifest(tmp_path, {"kind": "run", **sides, "policy": sides["base"], "adapter": None, "weights": {}})
    named = {"base_model": None, "instruct_model": None, "base_revision": None, "instruct_revision": None}
    for changes in ({}, {"base_revision": two}, {"instruct_model": "org/instruct", "instruct_revision": two}):
        found = pipeline._origins(tmp_path, SimpleNamespace(**{**named, **changes}))
        assert str(found.base) == f"org/base@{changes.get('base_revision', one)}"
        assert str(found.instruct) == f"org/instruct@{changes.get('instruct_revision', one)}"


def test_it_goes_on_at_the_stage_that_is_not_done(ended: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    """A DPO stage that saved TUNED and could not graft it is no more done than one that only began."""
    shutil.rmtree("out/dpo/grafted")
    for checkpoint in Path("out/dpo").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert not is_done(Path("out/dpo"))
    assert run("--output_dir", "out") == 0
    assert "SFT is done" in capsys.readouterr().out
    found = files(Path("out"))
    assert found == {name: ended[name] for name in ended if not name.startswith("dpo/checkpoint-")}


@pytest.mark.parametrize("stage", [pytest.param("sft", marks=pytest.mark.slow), "dpo"])
def test_a_stage_goes_on_from_its_last_whole_checkpoint(
    ended: dict[str, bytes], stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if stage == "sft":
        shutil.rmtree("out/dpo")
    shutil.rmtree(f"out/{stage}/grafted")
    Path(f"out/{stage}/checkpoint-2/trainer_state.json").unlink()  # cut off while it was written
    assert last_complete(Path("out", stage)) == f"out/{stage}/checkpoint-1"
    assert run(*SAVING, "--stages", stage) == 0
    assert f"in out/{stage}, from out/{stage}/checkpoint-1" in capsys.readouterr().out
    found = files(Path("out"))
    assert found == {name: ended[name] for name in ended if stage == "dpo" or not name.startswith("dpo/")}


@pytest.mark.slow
def test_one_adapter_through_both_stages(workspace: Path) -> None:
    write_config(sft=LORA)
    assert run("--output_dir", "left-out") == 0
    shutil.copytree("left-out/sft", "equal/sft")
    write_config(**LORA)
    assert run("--output_dir", "equal") == 0
    found = files(workspace / "equal")
    assert files(workspace / "left-out") == found
    assert {name for name in found if name.endswith("adapter_model.safetensors")} == {
        f"{stage}/{place}adapter_model.safetensors" for stage in ("sft", "dpo") for place in ("", "grafted/adapter/")
    }
    manifest = json.loads((workspace / "equal/dpo/shadow.json").read_text())
    assert manifest["adapter"]["source"] == "equal/sft"


@pytest.mark.slow
def test_an_adapter_after_full_fine_tuning(workspace: Path) -> None:
    write_config(dpo=LORA)
    assert run("--output_dir", "out") == 0
    assert Path("out/sft/model.safetensors").is_file()
    assert Path("out/dpo/adapter_model.safetensors").is_file()
    assert Path("out/dpo/grafted/model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("then", [{"use_peft": False}, {**LORA, "lora_r": 2}], ids=["full", "new adapter"])
def test_full_or_a_new_adapter_after_a_merged_one(workspace: Path, pair: tuple[Path, Path], then: dict) -> None:
    """The graft is INSTRUCT + (TUNED after DPO - BASE), from the files in float64; a second call changes nothing."""
    write_config(sft=LORA, dpo={**then, "merge_adapter": True}, graft_dtype="float32")
    assert run("--output_dir", "out") == 0
    assert Path("out/sft/adapter_model.safetensors").is_file()
    base, instruct = weights(pair[0]), weights(pair[1])
    merged = tuned_weights(pair[0], Path("out/sft"))
    tuned = weights(Path("out/dpo")) if not then["use_peft"] else tuned_weights(Path("out/merged"), Path("out/dpo"))
    grafted = weights(Path("out/dpo/grafted"))
    assert max((tuned[name] - merged[name]).abs().max().item() for name in tuned) > 1e-3
    assert max((merged[name] - base[name]).abs().max().item() for name in tuned) > 1e-3
    for name, tensor in grafted.items():
        expected = instruct[name] + (tuned[name] - base[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-8)
    before = files(Path("out"))
    assert run("--output_dir", "out") == 0
    assert files(Path("out")) == before
    assert not list(Path("out").glob(".*"))


def test_a_stage_has_its_own_overrides(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="use_cpu differs"):
        pipeline.read_plan(["--config", "pipeline.yaml", "--dpo.use_cpu", "false"])
    pipeline.read_plan(["--config", "pipeline.yaml", "--dpo.use_cpu", "false", "--stages", "sft"])
    words = ["--output_dir", "out", "--config", "pipeline.yaml", "--learning_rate", "2e-3", "--dpo.learning-rate=1e-4"]
    plan = pipeline.read_plan([*words, "--sft.max_steps", "1", "--graft_overwrite"])
    sft, dpo = (plan.options[stage].training for stage in ("sft", "dpo"))
    assert (sft.learning_rate, sft.max_steps, dpo.learning_rate, dpo.max_steps) == (2e-3, 1, 1e-4, 2)
    assert sft.graft_overwrite
    assert dpo.graft_overwrite


@pytest.mark.parametrize(
    ("words", "changes", "message"),
    [
        (["--stages", "sft,ppo"], {}, "each of --stages must be one of sft, dpo; got 'ppo'"),
        (["--stages", ""], {}, "one of sft, dpo; got ''"),
        (["--stages"], {}, "--stages needs one value"),
        (["--stages", "dpo"], {}, "needs the output_dir"),
        (["--stages", "dpo", "--output_dir", "out"], {}, "holds no run with its graft"),
        ([], {"sft": {"learnin_rate": 1}}, "stage sft: pipeline.yaml has 1 unknown keys"),
        ([], {"dpo": {"packing": True}}, "stage dpo: pipeline.yaml has 1 unknown keys"),
        ([], {"sftt": {}}, "sftt"),
        ([], {"beta": 0.1}, "belongs in its section"),
        (["--dpo.bet", "1"], {}, "--bet"),
        (["--ppo.beta", "1"], {}, "--ppo.beta"),
        ([], {"dpo": {"model_name_or_path": "x"}}, "starts from the folder of the SFT stage"),
        (["--dpo.model_name_or_path", "x"], {}, "starts from the folder of the SFT stage"),
        ([], {"dpo": {"output_dir": "x"}}, "output_dir in dpo belongs to the whole pipeline"),
        (["--sft.score_rows", "x"], {}, "score_rows in sft belongs to the whole pipeline"),
        (["--compare_direct"], {}, "compare_direct in sft"),
        (["--dpo.graft", "false"], {}, "graft: false in dpo"),
        (["--resume_from_checkpoint", "x"], {}, "resumes by itself"),
        (["--dpo.use_cpu", "false"], {}, "use_cpu differs: True in sft, False in dpo"),
        ([], {"sft": LORA, "dpo": {**LORA, "lora_r": 8}}, "r: 4 in sft, 8 in dpo"),
        (["--dpo.dataset_name", "nothing.jsonl"], {}, "nothing.jsonl does not exist"),
        (["--sft.merge_adapter"], {"sft": LORA}, "merge_adapter in sft"),
        (["--dpo.merge_adapter"], {}, "the stage sft trains no adapter"),
        (["--score_rows", "nothing.jsonl"], {}, "nothing.jsonl"),
        (["--instruct_model", "nothing"], {}, "nothing"),
        (["--config", "other.yaml"], {}, "--config was given more than once"),
    ],
)
def test_bad_input_ends_with_one_error_and_nothing_written(
    workspace: Path, capsys: pytest.CaptureFixture[str], words: list[str], changes: dict, message: str
) -> None:
    write_config(**changes)
    before = sorted(str(path) for path in workspace.rglob("*"))
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert "Error: " in error
    assert message in error
    assert error.strip().count("Nothing was written.") == 1
    assert error.strip().endswith("Nothing was written.")
    assert "Traceback" not in error
    assert sorted(str(path) for path in workspace.rglob("*")) == before


@pytest.mark.parametrize("option", ["--model_name_or_path", "--model-name-or-path"])
def test_a_command_line_that_names_base_takes_no_default_configuration(workspace: Path, option: str) -> None:
    with pytest.raises(ConfigError, match="stage sft: dataset_name is missing"):
        pipeline.read_plan([option, "base", "--use_cpu", "--bf16=false"], default_config="pipeline.yaml")


def test_only_unknown_keys_are_answered_with_the_place_for_keys(workspace: Path) -> None:
    with pytest.raises(ConfigError, match="unknown") as caught:
        pipeline.read_plan(["--config", "pipeline.yaml", "--sft.lr_scheduler_type", "unknown"])
    assert "belongs in its section" not in str(caught.value)
    with pytest.raises(ConfigError, match="belongs in its section"):
        pipeline.read_plan(["--config", "pipeline.yaml", "--sft.lr_scheduler_typ", "unknown"])


def test_missing_sections_and_missing_configuration(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("pipeline.yaml").write_text(yaml.safe_dump({**SHARED, "sft": {"dataset_name": "sft.jsonl"}, "dpo": 3}))
    assert run() == 2
    assert "the section dpo of the configuration is a int" in capsys.readouterr().err
    Path("pipeline.yaml").write_text(yaml.safe_dump({**SHARED, "sft": {"dataset_name": "sft.jsonl"}}))
    assert run() == 2
    assert "the section dpo of the configuration is missing" in capsys.readouterr().err
    assert main_sft_dpo([]) == 2
    assert "no configuration" in capsys.readouterr().err


def test_a_folder_of_other_runs_is_left_alone(ended: dict[str, bytes], capsys: pytest.CaptureFixture[str]) -> None:
    # BASE and INSTRUCT exchanged: not the models of the stage that is done
    assert run("--output_dir", "out", "--model_name_or_path", "instruct", "--instruct_model", "base") == 2
    assert "was run with another base: base there, instruct in the configuration" in capsys.readouterr().err
    shutil.rmtree("out/sft/grafted")
    assert run("--output_dir", "out") == 2
    assert "the SFT stage before it is not done" in capsys.readouterr().err
    assert files(Path("out")) == {name: ended[name] for name in ended if not name.startswith("sft/grafted")}


@pytest.mark.slow
def test_the_stages_may_be_run_from_different_folders(
    workspace: Path, ended: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pair has another name from there, but the same weights: the DPO stage gets it under that name."""
    shutil.rmtree("out/dpo")
    (workspace / "elsewhere").mkdir()
    monkeypatch.chdir(workspace / "elsewhere")
    models = ["--model_name_or_path", "../base", "--instruct_model", "../instruct"]
    data = ["--sft.dataset_name", "../sft.jsonl", "--dpo.dataset_name", "../dpo.jsonl"]
    assert main_sft_dpo(["--config", "../pipeline.yaml", "--output_dir", "../out", *models, *data]) == 0
    assert is_done(workspace / "out/dpo")


@pytest.mark.slow
def test_a_failed_second_stage_says_how_to_go_on(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faulty = ["--dpo.loss_type", "apo_zero", "--dpo.f_divergence_type", "forward_kl"]
    assert run(*faulty) == 2
    (root,) = (workspace / "outputs").iterdir()
    shown = capsys.readouterr()
    assert "the trainer rejected this run" in shown.err
    assert f"To resume from there, add --output_dir {root.relative_to(workspace)} to the same command" in shown.out
    assert run("--output_dir", str(root.relative_to(workspace))) == 0
    assert is_done(root / "dpo")
    assert run() == 0  # a folder of its own each time
    assert len(list((workspace / "outputs").iterdir())) == 2


def test_the_command_line_has_it_too(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert shadow_trl(["sft-dpo", "--help"]) == 0
    assert "--stages sft,dpo" in capsys.readouterr().out
    assert shadow_trl(["sft-dpo", "--config", "pipeline.yaml", "--stages", "rest"]) == 2


def test_a_prompt_beside_whole_conversations_is_left_out(tmp_path: Path) -> None:
    """UltraChat and UltraFeedback repeat the first question as a string, which TRL would take for a plain prompt."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for name, row in (
        ("messages", {"prompt": "q", "messages": turns}),
        ("chosen", {"prompt": "q", "chosen": turns, "rejected": turns}),
    ):
        write_rows(tmp_path / f"{name}.jsonl", [row])
        data = load_split(ScriptArguments(dataset_name=str(tmp_path / f"{name}.jsonl")), "train")
        assert "prompt" not in data.column_names
    write_rows(tmp_path / "plain.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    assert "prompt" in load_split(ScriptArguments(dataset_name=str(tmp_path / "plain.jsonl")), "train").column_names


@pytest.mark.slow
def test_the_embedded_pipeline_starts_from_any_folder(tmp_path: Path) -> None:
    """`accelerate launch recipes/shadow_sft_dpo.py`, as a user starts it, but short."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "recipes/shadow_sft_dpo.py")]
    done = subprocess.run(
        [*launch, *short(tmp_path, "dpo")], capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (root,) = (tmp_path / "outputs").iterdir()
    scored = [arm for arm in json.loads((root / "report.json").read_text())["arms"] if arm["scores"]]
    assert len(scored) == 3


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_make_one_pipeline(workspace: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "recipes/shadow_sft_dpo.py"), "--config", "pipeline.yaml", "--score_rows", "rows.jsonl"]
    done = subprocess.run([*launch, *script], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (root,) = (workspace / "outputs").iterdir()
    assert is_done(root / "dpo")
    assert done.stdout.count("exact match, %") == 1
