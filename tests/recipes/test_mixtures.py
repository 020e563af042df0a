"""Data of the recipes from several sources, TRL's `datasets`, and rows to evaluate on that are drawn from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from rows import write_rows
from trl import DatasetMixtureConfig, get_dataset

from shadow_trl.errors import ConfigError, InputError
from shadow_trl.recipes import run
from shadow_trl.recipes.data import hub_ids, load_data
from shadow_trl.recipes.options import Options, parse
from shadow_trl.recipes.pipeline_options import read_plan
from shadow_trl.recipes.record import record_of


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Two files of 12 and 8 rows in the current folder, and what names them in a mixture."""
    monkeypatch.chdir(tmp_path)
    for name, number in (("a", 12), ("b", 8)):
        write_rows(Path(f"{name}.jsonl"), [{"text": f"{name}{row}", "more": row} for row in range(number)])
    return [{"path": "json", "data_files": f"{name}.jsonl", "columns": ["text"]} for name in ("a", "b")]


def options(*words: str, kind: str = "sft", **keys: object) -> Options:
    values = {"model_name_or_path": "b", "instruct_model": "i", "bf16": False, "use_cpu": True, **keys}
    Path("config.yaml").write_text(yaml.safe_dump(values))
    return parse(kind, ["--config", "config.yaml", *words])


def texts(data: object) -> list[str]:
    return [row["text"] for row in data]


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ([{}, {}], {}),
        ([{"fraction": 0.75}, {"fraction": 0.25}], {}),
        ([{"split": "train[2:4]"}, {"data_files": ["b.jsonl", "a.jsonl"]}], {}),
        ([{}, {}], {"streaming": True}),
    ],
)
def test_a_mixture_is_that_of_the_scripts_of_trl(files: list[dict], changes: list[dict], keys: dict) -> None:
    sources = [{**file, **change} for file, change in zip(files, changes, strict=True)]
    data = load_data(options(datasets=sources, **keys))
    assert data.keys() == {"train_dataset"}
    found = texts(data["train_dataset"])
    assert found == texts(get_dataset(DatasetMixtureConfig(datasets=sources, **keys))["train"])
    assert len(found) > 3


def test_a_mixture_is_brought_into_a_format_of_trl_as_one_file_is(files: list[dict]) -> None:
    for name in ("a", "b"):
        write_rows(Path(f"{name}.jsonl"), [{"question": name, "answer": "1"}])
        del files[0 if name == "a" else 1]["columns"]
    (first, second) = load_data(options(datasets=files))["train_dataset"]
    assert [one["prompt"] for one in (first, second)] == [[{"role": "user", "content": name}] for name in ("a", "b")]


@pytest.mark.parametrize("mixed", [True, False], ids=["datasets", "dataset_name"])
@pytest.mark.parametrize(("share", "drawn"), [(0.25, {True: 5, False: 3}), (4, {True: 4, False: 4})])
def test_rows_to_evaluate_on_are_drawn_with_the_seed(files: list[dict], mixed: bool, share: float, drawn: dict) -> None:
    source = {"datasets": files} if mixed else {"dataset_name": "a.jsonl"}
    words = ["--eval_strategy", "steps", "--eval_steps", "1", "--test_split_size", str(share)]
    one, again, other = (
        {name: texts(rows) for name, rows in load_data(options(*words, "--seed", seed, **source)).items()}
        for seed in ("1", "1", "2")
    )
    assert one == again != other
    assert len(one["eval_dataset"]) == drawn[mixed]
    every = [f"{name}{row}" for name, number in (("a", 12), ("b", 8)) for row in range(number)]
    assert sorted(one["train_dataset"] + one["eval_dataset"]) == sorted(every if mixed else every[:12])
    few = load_data(options(*words, "--train_rows", "2", **source))
    assert set(texts(few["train_dataset"])) <= set(every) - set(texts(few["eval_dataset"]))


def test_the_mixture_wins_over_one_data_set_with_a_word(files: list[dict], capsys: pytest.CaptureFixture[str]) -> None:
    data = load_data(options(datasets=files[1:], dataset_name="a.jsonl"))
    assert texts(data["train_dataset"]) == [f"b{row}" for row in range(8)]
    assert "dataset_name a.jsonl is ignored" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"data_files": "a.jsonl"}, "1: path is missing"),
        ({"path": 3}, "1: path is no text"),
        ({"path": "json", "datafiles": "a.jsonl"}, r"1: datafiles \(did you mean data_files\?\)"),
        ("a.jsonl", "1: 'a.jsonl' is no mapping"),
    ],
)
def test_a_wrong_source_is_named(files: list[dict], source: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options(datasets=[source, *files])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "dataset_name is missing.*`datasets`"),
        ({"dataset_name": "a.jsonl", "streaming": True}, "dataset_streaming"),
        ({"datasets": 2, "streaming": True, "test_split_size": 0.5}, "test_split_size draws rows at random"),
        ({"datasets": 2, "streaming": True, "train_rows": 5}, "train_rows draws rows at random"),
        ({"datasets": 2, "eval_strategy": "epoch"}, "Give test_split_size"),
        ({"dataset_name": "a.jsonl", "test_split_size": 0.5, "dataset_test_split": "valid"}, "leave one of them out"),
    ],
)
def test_options_of_the_data_that_do_not_fit_together(files: list[dict], keys: dict, words: str) -> None:
    if "datasets" in keys:
        keys = {**keys, "datasets": files}
    with pytest.raises(ConfigError, match=words):
        options(**keys)


def test_what_cannot_be_loaded_or_divided_is_named(files: list[dict]) -> None:
    with pytest.raises(InputError, match=r"cannot load the mixture of json, json: .*none.jsonl"):
        load_data(options(datasets=[files[0], {**files[1], "data_files": "none.jsonl"}]))
    with pytest.raises(InputError, match=r"cannot load the mixture.*`fraction` must be set for either all"):
        load_data(options(datasets=[files[0], {**files[1], "fraction": 0.5}]))
    with pytest.raises(ConfigError, match="test_split_size is 30"):
        load_data(options(dataset_name="a.jsonl", test_split_size=30))
    evaluated = options(dataset_name="a.jsonl", eval_strategy="steps", eval_steps=1)
    with pytest.raises(InputError, match="test_split_size"):
        load_data(evaluated)


def test_a_mixture_is_recorded_by_its_content(files: list[dict]) -> None:
    hub = {"path": "someone/rows", "data_files": "c.jsonl"}
    records = [record_of(options(datasets=[*files, hub]))]
    Path("moved.jsonl").write_bytes(Path("b.jsonl").read_bytes())
    files[1]["data_files"] = "moved.jsonl"
    records.append(record_of(options(datasets=[*files, hub])))
    write_rows(Path("moved.jsonl"), [{"text": "else"}])
    records.append(record_of(options(datasets=[*files, hub])))
    assert records[0]["datasets"] == records[1]["datasets"] != records[2]["datasets"]
    assert records[2]["datasets"][2]["data_files"] == "c.jsonl"
    assert "a.jsonl" not in json.dumps(records)


def test_both_stages_of_a_pipeline_may_name_one_mixture(files: list[dict]) -> None:
    shared = {"model_name_or_path": "b", "instruct_model": "i", "bf16": False, "use_cpu": True, "datasets": files}
    Path("both.yaml").write_text(yaml.safe_dump({**shared, "sft": {}, "dpo": {}}))
    plan = read_plan(["--config", "both.yaml"])
    for stage in ("sft", "dpo"):
        assert [source.data_files for source in plan.options[stage].mixture.datasets] == ["a.jsonl", "b.jsonl"]


def test_the_card_names_what_is_of_the_hub(files: list[dict]) -> None:
    own = {"path": "someone/rows", "data_files": "c.jsonl"}
    assert hub_ids(options(datasets=[*files, own, {"path": "squad"}])) == ["someone/rows", "squad"]
    assert hub_ids(options(dataset_name="someone/rows")) == ["someone/rows"]
    assert hub_ids(options(dataset_name="a.jsonl")) == []


def test_paths_of_a_shipped_mixture_are_from_the_folder_that_holds_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home / "recipes", home / "data", elsewhere):
        folder.mkdir(parents=True)
    write_rows(home / "data/a.jsonl", [{"text": "a"}])
    sources = [{"path": "json", "name": "data", "data_files": {"train": "data/a.jsonl"}}, {"path": "data"}]
    values = {"model_name_or_path": "b", "instruct_model": "i", "bf16": False, "datasets": sources}
    (home / "recipes/config.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(elsewhere)
    first, second = parse("sft", ["--config", str(home / "recipes/config.yaml")]).mixture.datasets
    assert (first.path, first.name, first.data_files) == ("json", "data", {"train": "../home/data/a.jsonl"})
    assert second.path == "../home/data"


def test_a_recipe_trains_on_a_mixture(
    pair: tuple[Path, Path], files: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows reach the trainer; everything behind it is the same for all data."""
    seen: list[dict] = []

    def stop(kind: str, given: Options, data: dict, **more: object) -> None:
        seen.append(data)
        raise InputError("enough")

    monkeypatch.setattr(run, "train_stage", stop)
    chosen = {"model_name_or_path": str(pair[0]), "instruct_model": str(pair[1]), "datasets": files}
    Path("config.yaml").write_text(yaml.safe_dump({**chosen, "use_cpu": True, "bf16": False}))
    assert run.main_sft(["--config", "config.yaml", "--output_dir", "out"]) == 2
    assert len(seen[0]["train_dataset"]) == 20
    assert not Path("out").exists()
