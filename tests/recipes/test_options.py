"""Options of the recipes: every shipped config parses, and what is wrong is refused with one clear error."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from repository import ROOT, TRAININGS
from trl import get_peft_config

from shadow_trl.checkpoints.manifest import Entry, write_manifest
from shadow_trl.errors import ConfigError, InputError
from shadow_trl.recipes.options import parse

PIPELINES = {*(ROOT / "recipes/configs/pipelines").iterdir(), ROOT / "recipes/configs/nano/shadow_sft_dpo.yaml"}
CONFIGS = sorted({*TRAININGS} - PIPELINES)
PICTURES = {"gemma-3-4b", "qwen2-vl-7b"}
PAIRS = {"qwen3-0.6b", "qwen3-4b", "llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b", "gemma-3-1b", *PICTURES}
OTHERS = {
    ("qwen3-0.6b", "sft_gsm8k.yaml"),
    ("qwen3-4b", "sft_qlora.yaml"),
    ("qwen3-30b-a3b", "sft_lora.yaml"),
    ("qwen3-30b-a3b", "dpo_lora.yaml"),
}
NANO = ROOT / "recipes/configs/nano/shadow_dpo.yaml"


def kind_of(path: Path) -> str:
    return "dpo" if "dpo" in path.name else "sft"


def write(folder: Path, **changes: object) -> Path:
    """Write a small valid config with `changes`; a value of None leaves the key out."""
    values = {"model_name_or_path": "b", "instruct_model": "i", "dataset_name": "d", "bf16": False, **changes}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


def test_every_pair_has_its_four_configs() -> None:
    shipped = {(path.parent.name, path.name) for path in CONFIGS if path.parent.name != "nano"}
    assert shipped - OTHERS == {
        (p, f"{kind}_{how}.yaml") for p in PAIRS for kind in ("sft", "dpo") for how in ("lora", "full")
    }
    assert {path.stem for path in CONFIGS if path.parent.name == "nano"} == {
        "shadow_sft", "shadow_sft_lora", "shadow_dpo", "shadow_dpo_lora"
    }  # fmt: skip


def test_a_run_of_another_instruct_than_that_of_the_file_is_refused_by_name(tmp_path: Path) -> None:
    """The model of the file was replaced, its INSTRUCT was not."""
    run, config = tmp_path / "out", write(tmp_path, instruct_model="Qwen/Qwen3-0.6B")
    run.mkdir()
    sides = {"base": Entry("my/base").recorded(), "instruct": Entry("my/inst").recorded()}
    write_manifest(run, {"kind": "run", **sides, "policy": sides["base"]})
    words = ["--config", str(config), "--model_name_or_path", str(run)]
    with pytest.raises(ConfigError, match=r"instruct_model is Qwen/Qwen3-0.6B \(in .*\), and the run .* onto my/inst"):
        parse("sft", words)
    for given in ("my/inst", "another/inst"):
        assert parse("sft", [*words, "--instruct_model", given]).training.instruct_model == given
    assert parse("sft", [*words[:2], "--instruct_model", "my/inst"]).model.model_name_or_path == "b"


@pytest.mark.parametrize("path", CONFIGS, ids=[f"{path.parent.name}-{path.stem}" for path in CONFIGS])
def test_shipped_config_parses_and_opens_with_its_command(path: Path) -> None:
    """bf16 needs a GPU that has it or `use_cpu`; everything else is taken as it stands."""
    kind = kind_of(path)
    options = parse(kind, ["--config", str(path), "--use_cpu"])
    head = path.read_text().splitlines()[:2]
    experts = "a3b" in path.parent.name
    large = path.parent.name in ("llama-3.1-8b", "qwen2.5-7b", "qwen2-vl-7b") and "full" in path.name
    gpus = 4 if experts else 8 if large else 1
    several = f"shadow-trl {kind} --accelerate_config fsdp2 --num_processes {gpus} "
    assert (f"accelerate launch recipes/shadow_{kind}.py" if gpus == 1 else several) in head[1]
    if (path.parent.name, path.stem) not in (("nano", "shadow_sft"), ("nano", "shadow_dpo")):
        assert f"--config {path.relative_to(ROOT).as_posix()}" in head[1]
    assert options.training.instruct_model
    assert not options.output_given
    lora = "lora" in path.name
    adapter = get_peft_config(options.model)
    assert (adapter is not None) == lora
    if path.parent.name == "nano":
        return
    assert options.model.dtype == ("bfloat16" if lora else "float32")
    rows_a_step = gpus * options.training.per_device_train_batch_size * options.training.gradient_accumulation_steps
    if kind == "sft":  # the paper's settings
        assert options.training.learning_rate == (2e-4 if lora else 1e-5)
        assert rows_a_step == 32
        assert adapter is None or adapter.r == (16 if experts else 128)
        length = None if path.parent.name in PICTURES else 4096  # a cut could leave a part of a picture's tokens
        assert (options.training.max_length, options.training.warmup_steps) == (length, 0.1)
    else:
        assert options.training.learning_rate == (5e-6 if lora else 5e-7)
        assert rows_a_step == (32 if lora else 128)
        assert options.training.ref_policy == "grafted"


@pytest.mark.parametrize("path", sorted({*CONFIGS, *PIPELINES}), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_rows_of_a_step_are_those_of_the_comment(path: Path) -> None:
    """GPUs x rows of each x accumulation, as the comment beside the two values multiplies them."""
    text = path.read_text()
    comment = r"# (?:(\d+) GPUs x )?(\d+) x (\d+) = (\d+) \w+ a step"
    pattern = rf"batch_size: (\d+).*\n *gradient_accumulation_steps: (\d+) {comment}"
    found = [[int(number or 1) for number in match] for match in re.findall(pattern, text)]
    assert len(found) == text.count("gradient_accumulation_steps")
    for rows, steps, gpus, same_rows, same_steps, product in found:
        assert (rows, steps) == (same_rows, same_steps)
        assert gpus * rows * steps == product


def test_unknown_keys_of_a_config_are_listed_with_what_was_meant(tmp_path: Path) -> None:
    path = write(tmp_path, learnin_rate=1e-5, xyz=1)
    with pytest.raises(ConfigError, match="2 unknown keys") as caught:
        parse("dpo", ["--config", str(path)])
    assert "learnin_rate (did you mean learning_rate?)" in str(caught.value)
    assert "\n  xyz" in str(caught.value)


@pytest.mark.parametrize("word", ["--graft_sc", "--learning_rat", "--instruct", "--beat", "--use-cp"])
def test_abbreviated_and_misspelt_options_are_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"1 unknown argument .*:\n  {word} 0.5") as caught:
        parse("dpo", ["--config", str(write(tmp_path)), word, "0.5"])
    assert str(caught.value).count("did you mean") == 1


def test_each_option_that_there_is_none_of_is_counted_once(tmp_path: Path) -> None:
    words = ["--config", str(write(tmp_path)), "--loras", "a", "b", "--use_cpu", "--temprature=2", "--seedy"]
    with pytest.raises(ConfigError) as caught:
        parse("dpo", ["stray", *words])
    lines = [line.partition(" (")[0] for line in str(caught.value).splitlines()]
    assert lines == ["4 unknown arguments", "  stray", "  --loras a b", "  --temprature=2", "  --seedy", lines[-1]]


def test_an_option_of_the_other_recipe_is_unknown(tmp_path: Path) -> None:
    words = ["--config", str(write(tmp_path)), "--ref_policy", "instruct"]
    assert parse("dpo", words).training.ref_policy == "instruct"
    with pytest.raises(ConfigError, match="--ref_policy"):
        parse("sft", words)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("learning_rate", [1e-5], "learning_rate: .* has type list, expected float"),
        ("per_device_train_batch_size", 2.5, "has type float, expected int"),
        ("num_train_epochs", True, "has type bool, expected float"),
        ("save_strategy", False, "has type bool.*quote it"),  # YAML reads an unquoted `no` as false
        ("dataset_config", 405, "has type int.*quote it"),  # and an unquoted 0625 as an octal number
        ("compare_direct", "perhaps", "compare_direct"),
        ("learning_rate", "fast", "learning_rate"),
        ("lr_scheduler_type", "cosin", "cosin"),
        ("graft_dtype", "int8", "graft_dtype must be one of"),
        ("graft_scale", float("nan"), "graft_scale must be a finite number"),
        ("score_dtype", "int8", "score_dtype must be one of"),
        ("score_batch_size", 0, "score_batch_size must be at least 1"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, key: str, value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse("dpo", ["--config", str(write(tmp_path, **{key: value}))])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", "1e-5"),  # YAML 1.1 reads 1e-5 as a string
        ("warmup_steps", 3),
        ("pad_to_multiple_of", 8),
        ("model_init_kwargs", {"attn_implementation": "eager"}),
        ("lora_target_modules", ["q_proj", "v_proj"]),
        ("graft_modules", "linear"),
        ("resume_from_checkpoint", True),
        ("loss_type", "ipo"),
        ("report_to", ["none"]),
        ("max_length", "none"),
    ],
)
def test_values_in_their_usual_spellings_are_accepted(tmp_path: Path, key: str, value: object) -> None:
    parse("dpo", ["--config", str(write(tmp_path, **{key: value}))])


def test_repeated_keys_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_text(path.read_text() + "beta: 0.1\nbeta: 0.2\n")
    with pytest.raises(ConfigError, match="repeated keys: beta"):
        parse("dpo", ["--config", str(path)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "is a list, not a mapping"),
        ("word", "is a str, not a mapping"),
        ("", "is empty, not a mapping"),
        ("# only a comment\n", "is empty"),
        ("a: [", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("[a]: 1", "not valid YAML"),
        ("seed: 2024-13-45", "not valid YAML"),
        (f"seed: {'9' * 5000}", "not valid YAML"),
        (f"seed: {'[' * 20000}{']' * 20000}", "nested too deeply"),
        ("1: 2", "1 unknown keys:\n  1"),
        ("null: 2", "1 unknown keys:\n  None"),
        ("env: [A]", "`env` of .* is a list"),
        ('env: {A: "\\0"}', "`env` of .* cannot be set"),
        ("seed: &a [*a]", r"seed: \[.*\] has type list, expected int"),
    ],
)
def test_a_file_that_is_no_mapping_of_known_keys_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        parse("dpo", ["--config", str(path)])
    assert type(caught.value) is ConfigError  # its name is what a terminal shows


def test_a_small_file_that_stands_for_a_huge_value_is_refused_in_a_short_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("seed: [&a0 [x, x]" + "".join(f", &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)) + "]\n")
    with pytest.raises(ConfigError, match=r"seed: .* has type list") as caught:
        parse("dpo", ["--config", str(path)])
    assert len(str(caught.value)) < 4000


@pytest.mark.parametrize(("encoding", "fits"), [("utf-8-sig", True), ("utf-16", False)])
def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path, encoding: str, fits: bool) -> None:
    path = write(tmp_path, beta=0.5)
    path.write_text(path.read_text(), encoding=encoding)
    if fits:
        assert parse("dpo", ["--config", str(path)]).training.beta == 0.5
        return
    with pytest.raises(InputError, match="cannot read the configuration"):
        parse("dpo", ["--config", str(path)])


def test_env_of_a_config_sets_variables_as_with_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADOW_TEST_COUNT", "0")
    parse("dpo", ["--config", str(write(tmp_path, env={"SHADOW_TEST_COUNT": 3}))])
    assert os.environ["SHADOW_TEST_COUNT"] == "3"
    with pytest.raises(ConfigError, match=r"`env` of .* is a list"):
        parse("dpo", ["--config", str(write(tmp_path, env=["SHADOW_TEST_COUNT"]))])


def test_missing_file_missing_name_and_missing_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothere\.yaml"):
        parse("dpo", ["--config", str(tmp_path / "nothere.yaml")])
    with pytest.raises(ConfigError, match="--config needs one value"):
        parse("dpo", ["--config"])
    with pytest.raises(ConfigError, match="more than once"):
        parse("dpo", ["--config", "a", "--config=b"])
    for default in (None, tmp_path / "left-out-of-the-wheel.yaml"):
        with pytest.raises(ConfigError, match="pass --config"):
            parse("dpo", [], default)


@pytest.mark.parametrize("key", ["model_name_or_path", "dataset_name"])
def test_what_is_missing_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}.* is missing"):
        parse("sft", ["--config", str(write(tmp_path, **{key: None}))])


def test_options_that_cannot_go_together(tmp_path: Path) -> None:
    for changes, words in (
        ({"compare_direct": True, "resume_from_checkpoint": "x"}, "compare_direct cannot resume"),
        ({"train_rows": 3, "dataset_streaming": True}, "streamed"),
    ):
        with pytest.raises(ConfigError, match=words):
            parse("dpo", ["--config", str(write(tmp_path, **changes))])


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, learning_rate=1e-3, compare_direct=True, output_dir="from-file")
    options = parse("dpo", [f"--config={path}", "--learning_rate", "2e-3", "--compare_direct", "false"])
    assert options.training.learning_rate == 2e-3
    assert options.recipe.compare_direct is False
    assert options.output_given
    assert options.training.output_dir == "from-file"


def test_without_arguments_the_embedded_config_is_used_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the repository's layout: the models' paths follow the config, not the current folder."""
    home, elsewhere = tmp_path / "repository", tmp_path / "elsewhere"
    config = home / "recipes/configs/nano/shadow_dpo.yaml"
    for folder in (config.parent, home / "data/nano-base", home / "data/nano-instruct", elsewhere / "data/nano-base"):
        folder.mkdir(parents=True)
    shutil.copy(NANO, config)
    for name in ("preferences", "dpo-test"):
        (home / f"data/{name}.jsonl").touch()
    for folder, data in ((home, "data"), (elsewhere, "../repository/data")):
        monkeypatch.chdir(folder)
        options = parse("dpo", ["--beta", "0.2"], config)
        assert options.model.model_name_or_path == f"{data}/nano-base"
        assert options.training.instruct_model == f"{data}/nano-instruct"
        assert options.script.dataset_name == f"{data}/preferences.jsonl"
        assert options.recipe.score_rows == f"{data}/dpo-test.jsonl"
        assert options.training.beta == 0.2
        assert options.recipe.compare_direct
        assert options.recipe.score_scales == [0.5, 1.0]


def test_scales_to_score_are_those_a_graft_can_have(tmp_path: Path) -> None:
    words = ["--config", str(write(tmp_path)), "--score_rows", "rows.jsonl", "--score_scales"]
    assert parse("sft", [*words, "0.5", "1", "0.5"]).recipe.score_scales == [0.5, 1.0]
    with pytest.raises(ConfigError, match="each of score_scales must be a finite number, got nan"):
        parse("sft", [*words, "1", "nan"])


@pytest.mark.parametrize(("key", "value"), [("score_kept", ["rule"]), ("score_scales", [0.5])])
def test_what_is_scored_needs_rows(key: str, value: list, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{key} without score_rows"):
        parse("dpo", ["--config", str(write(tmp_path, **{key: value}))])


def test_a_named_model_does_not_get_the_embedded_settings() -> None:
    words = ["--model_name_or_path=b", "--instruct_model", "i", "--dataset_name", "d", "--bf16", "false"]
    options = parse("dpo", words, NANO)
    assert options.training.learning_rate == 1e-6  # TRL's default
    assert not options.recipe.compare_direct


def test_paths_of_other_configs_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b").mkdir()
    path = write(tmp_path)
    monkeypatch.chdir(ROOT)
    assert parse("dpo", ["--config", str(path)]).model.model_name_or_path == "b"
    shipped = tmp_path / "recipes/configs/x"
    shipped.mkdir(parents=True)
    options = parse("dpo", ["--config", str(write(shipped))])
    assert options.model.model_name_or_path == os.path.relpath(tmp_path / "b")
    assert options.training.instruct_model == "i"  # not there: a hub id
