"""Launch options of the recipes: which words and keys are for the launcher, and what is refused before it starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from repository import ROOT, TRAININGS
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from shadow_trl import cli
from shadow_trl.errors import ConfigError
from shadow_trl.recipes import launch
from shadow_trl.recipes.launch_options import LAUNCHED, split_keys, split_words
from shadow_trl.recipes.options import CONFIGS, RecipeArguments, parse
from shadow_trl.recipes.pipeline_options import read_plan

CLUSTER = ROOT / "recipes/accelerate/fsdp2_4x8.yaml"


class Started(Exception):
    """What would have been launched."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with configurations; nothing is launched, nor the user's config of accelerate read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("accelerate.commands.launch.default_config_file", str(tmp_path / "none.yaml"))
    # Set here, so that what a launch sets is taken back.
    monkeypatch.setenv(LAUNCHED, "")
    monkeypatch.delenv(LAUNCHED)
    own = {"model_name_or_path": "b", "instruct_model": "i", "dataset_name": "d", "bf16": False, "use_cpu": True}
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(own))
    stages = {stage: {"dataset_name": "d"} for stage in ("sft", "dpo")}
    del own["dataset_name"]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({**own, **stages}))

    def started(*given: Any) -> None:
        raise Started(given)

    monkeypatch.setattr(launch, "launch_command", started)
    monkeypatch.setattr(os, "execvpe", started)
    return tmp_path


def accelerators(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def launched(name: str, *words: str) -> Any:
    """Return what would have been started; as in a fresh process, none was before."""
    os.environ.pop(LAUNCHED, None)
    with pytest.raises(Started) as caught:
        launch.main(name, words)
    return caught.value.args[0]


def with_keys(**keys: object) -> str:
    values = {**yaml.safe_load(Path("dpo.yaml").read_text()), **keys}
    Path("keys.yaml").write_text(yaml.safe_dump(values))
    return "keys.yaml"


def test_the_recipes_share_no_option_with_the_launcher_but_two() -> None:
    ours: set[str] = set()
    for config in CONFIGS.values():
        parser = TrlParser(
            (ScriptArguments, config, ModelConfig, DatasetMixtureConfig, RecipeArguments), allow_abbrev=False
        )
        ours |= {action.dest for action in parser._actions}
    theirs = {action.dest for action in launch_command_parser()._actions}
    assert ours & theirs == {"help", "debug", "gradient_accumulation_steps"}


def test_words_are_sorted_whatever_their_order() -> None:
    words = ["--beta", "2", "--num_processes=2", "--use_fsdp", "--lora_target_modules", "a", "b", "--fsdp-version", "2"]
    assert split_words([*words, "--gradient_accumulation_steps", "4", "--accelerate_config", "zero2"]) == (
        ["--num_processes", "2", "--use_fsdp", "--fsdp_version", "2", "--accelerate_config", "zero2"],
        ["--beta", "2", "--lora_target_modules", "a", "b", "--gradient_accumulation_steps", "4"],
    )
    with pytest.raises(ConfigError, match="--num_processes needs a value"):
        split_words(["--num_processes", "--beta", "2"])


def test_keys_of_a_file_become_words() -> None:
    keys = {"num_processes": 8, "multi_gpu": True, "use_fsdp": False, "beta": 1, "same_network": True}
    words, own = split_keys(keys, Path("x.yaml"))
    assert words == {
        "num_processes": ["--num_processes", "8"], "multi_gpu": ["--multi_gpu"], "use_fsdp": [],
        "same_network": ["--same_network"],
    }  # fmt: skip
    assert own == {"beta": 1}
    for wrong in ({"num_processes": [8]}, {"multi_gpu": "yes"}):
        with pytest.raises(ConfigError, match=r"x\.yaml has values that accelerate launch does not take"):
            split_keys(wrong, Path("x.yaml"))


@pytest.mark.parametrize("name", ["fsdp2", "zero3", "multi_gpu", str(CLUSTER)])
def test_a_config_by_name_or_file_is_accelerates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators(monkeypatch, 8)
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: True)
    words = ["--config", "dpo.yaml", "--bf16=true", "--accelerate_config", name, "--beta", "0.2"]
    words += ["--machine_rank", "3", "--main_process_ip", "host"] if name == str(CLUSTER) else []
    (args,) = launched("dpo", *words)
    own = ["dpo", "--config", "dpo.yaml", "--bf16=true", "--beta", "0.2"]
    assert (args.module, args.training_script, args.training_script_args) == (True, "shadow_trl.cli", own)
    assert load_config_from_file(args.config_file).num_processes == (32 if name == str(CLUSTER) else 8)
    assert os.environ[LAUNCHED] == "1"


def test_keys_of_the_yaml_file_launch_too_and_the_command_line_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators(monkeypatch, 8)
    config = with_keys(accelerate_config="fsdp2", num_processes=2, bf16=True)
    (args,) = launched("dpo", "--config", config, "--json")
    assert (args.num_processes, Path(args.config_file).stem) == (2, "fsdp2")
    (args,) = launched("dpo", "--config", config, "--num_processes", "4", "--accelerate_config", "multi_gpu")
    assert (args.num_processes, Path(args.config_file).stem) == (4, "multi_gpu")
    # In the launched processes they are known, and do not launch again; another launcher has not done what they say.
    assert parse("dpo", ["--config", config]).training.bf16
    monkeypatch.delenv(LAUNCHED)
    with pytest.raises(ConfigError, match=r"says how to launch \(accelerate_config, num_processes\)"):
        parse("dpo", ["--config", config])


def test_the_pipeline_is_launched_with_the_options_of_both_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators(monkeypatch, 2)
    both = ["--config", "both.yaml", "--output_dir", "out", "--dpo.beta", "0.2"]
    (args,) = launched("sft-dpo", "--multi_gpu", *both, "--num_processes", "2", "--json")
    assert args.training_script_args == ["sft-dpo", *both, "--json"]
    Path("both.yaml").write_text(Path("both.yaml").read_text() + "num_processes: 2\nmulti_gpu: true\n")
    (args,) = launched("sft-dpo", *both[:2])
    assert (args.multi_gpu, args.num_processes) == (True, 2)
    assert read_plan(both).output == "out"


def test_one_process_takes_the_place_of_the_command() -> None:
    command, words, environment = launched(
        "dpo", "--config", "dpo.yaml", "--accelerate_config", "single_gpu", "--bf16=true"
    )
    assert (command, *words[1:]) == (words[0], "-m", "shadow_trl.cli", "dpo", "--config", "dpo.yaml", "--bf16=true")
    assert (environment["ACCELERATE_MIXED_PRECISION"], environment[LAUNCHED]) == ("bf16", "1")


def test_without_options_of_the_launcher_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(launch._MAINS, "dpo", len)
    assert launch.main("dpo", ["--config", "dpo.yaml"]) == 2
    assert launch.main("dpo", ["--num_processes", "2", "--help"]) == 3
    monkeypatch.setenv(LAUNCHED, "1")
    assert launch.main("dpo", ["--config", with_keys(num_processes=2)]) == 2


FSDP2 = ["--accelerate_config", "fsdp2", "--bf16=true", "--use_cpu", "false"]


@pytest.mark.parametrize(
    ("count", "words", "message"),
    [
        (8, ["--num_processes", "2"], "2 processes are asked for, and accelerate would start one"),
        (8, ["--cpu", "--num_processes", "2"], "2 processes are asked for, and accelerate would start one"),
        (8, ["--accelerate_config", "single_gpu", "--bf16=true", "--num_processes", "2"], "accelerate would start one"),
        (8, ["--multi_gpu", "--num_processes", "two"], "invalid int value: 'two'"),
        (8, ["--multi_gpu", "--num_processes", "0"], "at least 2 processes"),
        (8, ["--use_fsdp", "--fsdp_version", "2", "--num_processes", "0"], "num_processes is 0"),
        (8, ["--use_fsdp", "--multi_gpu", "--num_processes", "2"], "only use one of"),
        (8, ["--accelerate_config", "fsdp3"], "fsdp3 is neither a file nor"),
        (8, ["--accelerate_config", "fsdp2", "--config_file", "x"], "give one of them"),
        (8, ["--config_file", "none.yaml"], "accelerate launch rejects these options"),
        (8, [*FSDP2, "--bf16=false"], "Pass --bf16 true, or give the launcher --mixed_precision no"),
        (0, ["--accelerate_config", "multi_gpu"], "fp16 off. Give the launcher --mixed_precision no"),
        (0, ["--accelerate_config", "multi_gpu", "--use_cpu", "false"], "which has 0 accelerators for them"),
        (
            4,
            FSDP2,
            "8 processes are asked for on this machine, which has 4 accelerators for them. Pass --num_processes 4",
        ),
        (8, [*FSDP2, "--gpu_ids", "0,1"], "which has 2 accelerators"),
        (0, ["--multi_gpu", "--num_processes", "2", "--use_cpu", "false"], "for them. Leave the launch options out"),
        (8, [*FSDP2, "--num_machines", "3", "--main_process_ip", "x"], "3 do not divide it"),
        (8, [*FSDP2, "--num_machines", "2", "--machine_rank", "2", "--main_process_ip", "x"], "machine_rank is 2"),
        (8, [*FSDP2, "--num_machines", "2"], "2 machines need main_process_ip"),
        (8, [*FSDP2[2:], "--accelerate_config", str(CLUSTER), "--main_process_ip", "x"], "machine_rank is -1"),
        (8, [*FSDP2, "--beta", "much"], "invalid float value: 'much'"),
        (8, [*FSDP2, "--bet", "1"], "--bet"),
        (8, [*FSDP2, "--score_rows", "none.jsonl"], "none.jsonl"),
        (8, [*FSDP2, "--no_python"], "--no_python"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_launched(
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    count: int,
    words: list[str],
    message: str,
) -> None:
    """Through the command: one error, its code, and no file; `Started` would leave it."""
    accelerators(monkeypatch, count)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    before = sorted(home.iterdir())
    assert cli.main(["dpo", "--config", "dpo.yaml", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.endswith("Nothing was written.")
    assert sorted(home.iterdir()) == before


def test_deepspeed_that_is_not_installed_and_a_process_of_another_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "is_deepspeed_available", lambda: False)
    words = ["--config", "dpo.yaml", "--accelerate_config", "zero2", "--num_processes", "2"]
    with pytest.raises(ConfigError, match="pip install deepspeed"):
        launch.main("dpo", words)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="another launcher started this process"):
        launch.main("dpo", words)


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (1, 1), (-9, 137), (-15, 143)])
def test_the_code_is_that_of_the_process_that_failed_first(tmp_path: Path, code: int, expected: int) -> None:
    failures = {rank: ProcessFailure(rank, 100 + rank, status, "") for rank, status in enumerate((code, -15))}
    failures[1].timestamp = failures[0].timestamp + 10

    def fail() -> None:
        raise ChildFailedError("shadow_trl.cli", failures)

    assert launch._ended(fail) == expected


@pytest.mark.parametrize("path", TRAININGS, ids=lambda path: path.stem)
def test_the_command_at_the_head_of_a_config_launches_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerators(monkeypatch, 8)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.chdir(ROOT)
    command = next(
        line for line in path.read_text().splitlines() if line.startswith(("#   shadow-trl", "#   accelerate"))
    )
    program, name, *words = command.removeprefix("#   ").split()
    if program == "shadow-trl":
        (args,) = launched(name, *words)
        asked = int(words[words.index("--num_processes") + 1])
        assert (args.num_processes, args.training_script_args[-1]) == (asked, words[-1])
    else:
        args = launch_command_parser().parse_args(words)
        assert (ROOT / args.training_script).is_file()


def test_four_machines_of_eight_are_trls_fsdp2_but_for_their_number() -> None:
    import trl

    theirs = yaml.safe_load((Path(trl.__file__).parent / "accelerate_configs/fsdp2.yaml").read_text())
    ours = yaml.safe_load(CLUSTER.read_text())
    changed = {"num_machines": 4, "num_processes": 32, "main_process_port": 29500, "machine_rank": -1}
    sharded = {**theirs["fsdp_config"], "fsdp_state_dict_type": "SHARDED_STATE_DICT"}
    wanted = {**theirs, **changed, "fsdp_config": sharded}
    assert ours == wanted
    assert load_config_from_file(str(CLUSTER)).num_machines == 4
