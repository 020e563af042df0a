"""The mains of the recipes on tiny models: what a run leaves, that the comparison is fair, and how bad input ends."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from repository import ROOT
from rows import SETTINGS, short, write_rows
from safetensors.torch import load_file
from tiny import preference_data, sft_data

from shadow_trl.errors import InputError
from shadow_trl.evaluation.report import TITLES
from shadow_trl.operations.in_memory import MemoryGraft
from shadow_trl.recipes import compare
from shadow_trl.recipes.data import load_data, load_split
from shadow_trl.recipes.options import parse
from shadow_trl.recipes.run import _claim_folder, main_dpo, main_sft

MAINS = {"sft": main_sft, "dpo": main_dpo}


@pytest.fixture
def workspace(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with links to the pair, data, rows to score and a config for each recipe."""
    monkeypatch.chdir(tmp_path)
    for name, folder in zip(("base", "instruct"), pair, strict=True):
        (tmp_path / name).symlink_to(folder)
    for kind, data in (("sft", sft_data()), ("dpo", preference_data())):
        write_rows(tmp_path / f"{kind}.jsonl", list(data))
        models = {"model_name_or_path": "base", "instruct_model": "instruct"}
        values = {**models, "dataset_name": f"{kind}.jsonl", **SETTINGS}
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(values))
    rows = [(str(number), kind) for kind in ("target", "rule") for number in range(3)]
    write_rows(
        tmp_path / "rows.jsonl",
        [{"prompt": [{"role": "user", "content": text}], "answer": text, "kind": kind} for text, kind in rows],
    )
    return tmp_path


COMPARE = ["--compare_direct", "--score_rows", "rows.jsonl", "--score_max_new_tokens", "3"]


def made(workspace: Path) -> list[Path]:
    return sorted((workspace / "outputs").iterdir()) if (workspace / "outputs").exists() else []


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights of each model when it is scored, in order."""
    found: list[dict[str, torch.Tensor]] = []
    score_model = compare._score_model

    def kept(options: object, origins: object, source: str | MemoryGraft, *rest: object, **more: object) -> object:
        graft = isinstance(source, MemoryGraft)
        found.append({n: w.double() for n, w in source.weights.items()} if graft else weights_of(Path(source)))
        return score_model(options, origins, source, *rest, **more)

    monkeypatch.setattr(compare, "_score_model", kept)
    return found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.double() for name, weight in load_file(folder / "model.safetensors").items()}


def test_sft_leaves_the_run_the_graft_the_direct_model_and_the_report(
    workspace: Path, capsys: pytest.CaptureFixture[str], scored: list[dict[str, torch.Tensor]]
) -> None:
    scales = ["--score_scales", "0.5", "1", "--graft_dtype", "float32"]
    assert main_sft(["--config", "sft.yaml", *COMPARE, *scales]) == 0
    (run,) = made(workspace)
    assert run.name.startswith("shadow_sft-")
    for folder in (run, run / "grafted", run / "direct"):
        assert (folder / "model.safetensors").is_file()
    assert json.loads((run / "shadow.json").read_text())["base"]["source"] == "base"
    shown = capsys.readouterr().out
    for words in (*TITLES.values(), "sigma", "realised"):
        assert words in shown
    assert f"result {run.relative_to(workspace)}/grafted" in shown
    report = json.loads((run / "report.json").read_text())
    assert [(arm["arm"], arm["scale"], arm["rows"]) for arm in report["arms"]] == [
        ("instruct", None, 6), *((name, scale, 6) for name in ("direct", "tuned", "shadow") for scale in (0.5, 1.0))
    ]  # fmt: skip
    base, instruct, tuned, direct = map(weights_of, (Path("base"), Path("instruct"), run, run / "direct"))
    starts = (instruct, instruct, base, base, instruct, instruct)
    changes = [(direct, instruct)] * 2 + [(tuned, base)] * 4
    for model, start, (end, begin), scale in zip(scored[1:], starts, changes, (0.5, 1.0) * 3, strict=True):
        for name, weight in model.items():
            wanted = start[name] + scale * (end[name] - begin[name])
            torch.testing.assert_close(weight, wanted, rtol=0.0, atol=1e-6)
    # What was scored at another scale is not left there.
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"grafted", "direct"}
    assert report["graft"]["delta_to_gap"] > 0
    assert set(report["seconds"]) == {"train and graft", "tune INSTRUCT directly", "score"}
    assert {row["b"] for row in report["differences"]} == {"instruct", "direct", "tuned"}


@pytest.mark.slow
def test_the_direct_model_is_what_plain_trl_makes_of_instruct(workspace: Path) -> None:
    """Same data, seed and settings, byte for byte; the Shadow run before it must not leak into it."""
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    assert main_sft(["--config", "sft.yaml", "--output_dir", "out", *COMPARE[:1]]) == 0
    plain = SFTTrainer(
        model="instruct",
        args=SFTConfig(output_dir="plain", **SETTINGS),
        train_dataset=load_dataset("json", data_files={"train": "sft.jsonl"}, split="train"),
    )
    plain.train()
    plain.save_model()
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert Path("out/direct", name).read_bytes() == Path("plain", name).read_bytes()
    assert Path("out/model.safetensors").read_bytes() != Path("plain/model.safetensors").read_bytes()


@pytest.mark.slow
def test_direct_dpo_has_instruct_as_its_reference(workspace: Path) -> None:
    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    assert main_dpo(["--config", "dpo.yaml", "--output_dir", "out", "--ref_policy", "grafted", *COMPARE[:1]]) == 0
    plain = DPOTrainer(
        model="instruct",
        args=DPOConfig(output_dir="plain", precompute_ref_log_probs=True, **SETTINGS),
        train_dataset=load_dataset("json", data_files={"train": "dpo.jsonl"}, split="train"),
    )
    plain.train()
    plain.save_model()
    assert Path("out/direct/model.safetensors").read_bytes() == Path("plain/model.safetensors").read_bytes()


@pytest.mark.slow
def test_dpo_with_lora_twice_in_a_row(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second graft is an adapter, which nothing rounds: at another scale it is not rounded to bf16 either."""
    score_model, dtypes = compare._score_model, []

    def noted(options: object, origins: object, source: str | MemoryGraft, *rest: object, title: str) -> object:
        if isinstance(source, MemoryGraft) and title.startswith(TITLES["shadow"]):
            dtypes.append(source.dtype)
        return score_model(options, origins, source, *rest, title=title)

    monkeypatch.setattr(compare, "_score_model", noted)
    words = ["--config", "dpo.yaml", "--use_peft", "--lora_r", "2", "--lora_target_modules", "all-linear", *COMPARE]
    words += ["--score_scales", "0.5", "1"]
    assert main_dpo(words) == 0
    assert main_dpo([*words, "--graft_format", "adapter"]) == 0
    assert dtypes == ["bfloat16", "float32"]
    runs = made(workspace)
    assert len(runs) == 2
    for run, weights in zip(runs, ("model", "adapter_model"), strict=True):
        assert (run / "adapter_model.safetensors").is_file()
        assert (run / "direct/adapter_model.safetensors").is_file()
        assert (run / "grafted" / f"{weights}.safetensors").is_file()
        report = json.loads((run / "report.json").read_text())
        assert [bool(arm["scores"]) for arm in report["arms"]] == [True] * 7
        assert report["graft"]["sigma"] > 0


def test_without_comparison_it_trains_grafts_and_says_where(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_dpo(["--config", "dpo.yaml", "--output_dir", "out", "--train_rows", "8"]) == 0
    assert not Path("out/direct").exists()
    assert "result out/grafted" in capsys.readouterr().out
    arms = json.loads(Path("out/report.json").read_text())["arms"]
    assert [(arm["arm"], arm["scores"]) for arm in arms] == [("instruct", None), ("tuned", None), ("shadow", None)]


def test_too_many_rows_are_traced_to_the_file(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("many.yaml").write_text(Path("sft.yaml").read_text() + "\ntrain_rows: 9999\n")
    assert main_sft(["--config", "many.yaml", "--output_dir", "out"]) == 2
    said = capsys.readouterr().err
    assert "train_rows is 9,999 (in many.yaml), and" in said
    (word,) = re.findall(r"Pass (--train_rows \d+) for all", said)
    assert len(load_data(parse("sft", ["--config", "many.yaml", *word.split()]))["train_dataset"]) == int(
        word.split()[1]
    )


def test_a_template_without_marked_answers_is_refused_with_ways_out(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("plain.jinja").write_text("{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}")
    words = ["--config", "sft.yaml", "--output_dir", "out", "--chat_template_path", "plain.jinja"]
    assert main_sft([*words, "--assistant_only_loss", "true"]) == 2
    said = capsys.readouterr().err
    assert "or pass --assistant_only_loss false" in said
    assert said.endswith("Nothing was written.\n")


def test_without_a_graft_tuned_is_saved_all_the_same(workspace: Path) -> None:
    assert main_sft(["--config", "sft.yaml", "--output_dir", "out", "--graft", "false"]) == 0
    assert Path("out/model.safetensors").is_file()
    assert not Path("out/grafted").exists()


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("sft", ["--graft_sc", "0.5"], "unknown argument "),
        ("sft", ["--train_rows", "9999"], "train_rows is 9,999, and"),
        ("dpo", ["--graft_scale", "inf"], "finite"),
        ("sft", ["--score_rows", "nothing.jsonl"], "nothing.jsonl"),
        ("dpo", ["--score_rows", "rows.jsonl", "--score_kept", "rule", "stile"], "stile"),
        ("dpo", ["--dataset_name", "nothing.jsonl"], "nothing.jsonl does not exist"),
        ("sft", ["--eval_strategy", "steps"], "split train only"),
        ("dpo", ["--dataset_train_split", "validation"], "split train only"),
        ("sft", ["--model_name_or_path", "nothing"], "nothing"),
        ("dpo", ["--instruct_model", "nothing"], "nothing"),
        ("dpo", ["--loss_type", "apo_zero", "--f_divergence_type", "forward_kl"], "the trainer rejected this run"),
        ("sft", ["--output_dir", "base"], "base"),
    ],
)
def test_bad_input_ends_with_one_error_and_nothing_written(
    workspace: Path, capsys: pytest.CaptureFixture[str], kind: str, words: list[str], message: str
) -> None:
    before = sorted(path.name for path in workspace.rglob("*"))
    assert MAINS[kind](["--config", f"{kind}.yaml", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert any("Error: " in line and message in "\n".join(error) for line in error)
    assert "\n".join(error).endswith("Nothing was written.")
    assert "Traceback" not in "\n".join(error)
    assert sorted(path.name for path in workspace.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", "nothing/at/all"], "there is no folder nothing/at/all"),
        (["--instruct_model", "/nothing"], "there is no folder /nothing"),
        (["--base_model", "/nothing"], "there is no folder /nothing"),
        (["--eval_strategy", "steps"], "split train only"),
        (["--push_to_hub", "--hub_strategy", "checkpoint"], "would publish checkpoints"),
        (["--chat_template_path", "nothing.jinja"], "chat_template_path"),
        (["--use_peft", "--lora_r", "0"], "lora_r"),
        (["--use_peft", "--lora_task_type", "ZZZ"], "the options of the model are not valid"),
        (["--deepspeed", "nothing.json"], "the configuration is not valid"),
        (["--accelerator_config", "nothing.json"], "the configuration is not valid"),
    ],
)
def test_what_options_and_paths_show_is_found_before_data_are_loaded(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("data were loaded")

    monkeypatch.setattr("datasets.load_dataset", load)
    assert main_sft(["--config", "sft.yaml", "--output_dir", "out", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().endswith("Nothing was written.")
    assert not (workspace / "out").exists()


def test_an_error_of_the_rows_is_no_traceback(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that comes up when TRL looks at all rows, here in the chat template."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns}, {"messages": [{"role": "user", "content": None}]}]
    (workspace / "odd.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main_sft(["--config", "sft.yaml", "--output_dir", "out", "--dataset_name", "odd.jsonl"]) == 2
    assert "the trainer rejected this run" in capsys.readouterr().err


def test_an_existing_result_is_not_overwritten(workspace: Path) -> None:
    words = ["--config", "sft.yaml", "--output_dir", "out", *COMPARE]
    (workspace / "out/direct").mkdir(parents=True)
    assert main_sft(words) == 2
    assert sorted(path.name for path in (workspace / "out").rglob("*")) == ["direct"]
    assert main_sft([*words, "--graft_overwrite"]) == 0


def test_runs_of_the_same_second_get_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260102-030405")
    folders = [_claim_folder("shadow_dpo") for _ in range(3)]
    stem = f"outputs{os.sep}shadow_dpo-20260102-030405"
    assert folders == [stem, f"{stem}-2", f"{stem}-3"]
    assert all(Path(folder).is_dir() for folder in folders)


def test_sharegpt_rows_become_messages(tmp_path: Path) -> None:
    """The format of Infinity-Instruct: TRL alone would keep the speakers' names `human` and `gpt`."""
    from trl import ScriptArguments

    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    write_rows(tmp_path / "share.jsonl", [{"id": 1, "conversations": turns}])
    data = load_split(ScriptArguments(dataset_name=str(tmp_path / "share.jsonl")), "train")
    roles = [(message["role"], message["content"]) for message in data[0]["messages"]]
    assert roles == [("system", "s"), ("user", "q"), ("assistant", "a")]
    write_rows(tmp_path / "sums.jsonl", [{"question": "6 * 7?", "answer": "6 * 7 = 42\n#### 42"}])
    data = load_split(ScriptArguments(dataset_name=str(tmp_path / "sums.jsonl")), "train")  # as GSM8K's
    assert data[:] == {
        "prompt": [[{"role": "user", "content": "6 * 7?"}]],
        "completion": [[{"role": "assistant", "content": "6 * 7 = 42\n#### 42"}]],
    }
    write_rows(tmp_path / "odd.jsonl", [{"conversations": [{"from": "narrator", "value": "q"}]}])
    with pytest.raises(InputError, match="narrator"):
        load_split(ScriptArguments(dataset_name=str(tmp_path / "odd.jsonl")), "train")


def test_a_folder_of_files_has_a_split_for_each_and_stdout_is_json(
    workspace: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = workspace / "data"
    data.mkdir()
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_bytes((workspace / "sft.jsonl").read_bytes())
    evaluation = ["--eval_strategy", "steps", "--eval_steps", "3"]
    lossy = ["--learning_rate", "1e-6", "--graft_dtype", "bfloat16", "--graft_rounding", "nearest"]
    assert main_sft(["--config", "sft.yaml", "--dataset_name", "data", "--json", *evaluation, *lossy]) == 0
    shown, told = capsys.readouterr()
    (run,) = made(workspace)
    assert json.loads(shown) == json.loads((run / "report.json").read_text())
    assert "BASE as it was trained is in" in told
    assert "eval_loss" in told
    said = [*told.splitlines(), *caplog.text.splitlines()]
    assert len([line for line in said if "rounded to nearest keeps" in line]) == 1  # once, by log or by report


def launch_two(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(ROOT / "recipes/shadow_dpo.py"), "--config", "dpo.yaml", *words]
    return subprocess.run([*command, *script], capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_make_one_run(workspace: Path) -> None:
    done = launch_two("--ref_policy", "grafted", *COMPARE)
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = made(workspace)
    assert done.stdout.count("exact match, %") == 1
    for name in ("report.json", "grafted/model.safetensors", "direct/model.safetensors"):
        assert (run / name).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_embedded_run_starts_from_any_folder(kind: str, tmp_path: Path) -> None:
    """`accelerate launch recipes/shadow_dpo.py`, as a user starts it, but short: .ci/run has both in full."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / f"recipes/shadow_{kind}.py")]
    done = subprocess.run(
        [*launch, *short(tmp_path, kind)], capture_output=True, text=True, timeout=600, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (run,) = (tmp_path / "outputs").iterdir()
    arms = json.loads((run / "report.json").read_text())["arms"]
    tuned = [(name, scale) for name in ("direct", "tuned", "shadow") for scale in (0.5, 1.0)]
    assert [(arm["arm"], arm["scale"]) for arm in arms] == [("instruct", None), *tuned]
    assert {"target", "in style", "rule", "skill", "refuse", "kept"} < arms[0]["scores"].keys()
    assert "What this run shows: " in done.stdout
