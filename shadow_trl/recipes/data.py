"""Data sets of the recipes: hub ids, local folders and local files, loaded with the `datasets` library."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, InputError, ends_with, list_names
from ..evaluation.scoring import read_rows
from ..runtime.processes import say

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import DatasetMixtureConfig, ScriptArguments

    from .options import Options, RecipeArguments

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Builder of `datasets` for each suffix of a local file."""

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
"""Names of the speakers in ShareGPT's format and what chat templates call them."""


def check_data_options(options: Options) -> None:
    """Refuse options of the data that are missing or contradict each other.

    Raises:
        ConfigError: there are.
    """
    script, mixture, evaluates = options.script, options.mixture, options.training.eval_strategy != "no"
    if not script.dataset_name and not mixture.datasets:
        raise ConfigError(
            "dataset_name is missing; give it in the YAML file or on the command line, or give `datasets` there."
        )
    if mixture.streaming and not mixture.datasets:
        raise ConfigError("streaming is for `datasets`; with dataset_name the option is dataset_streaming.")
    for name, given in (("train_rows", options.recipe.train_rows), ("test_split_size", mixture.test_split_size)):
        if given is not None and options.streams:
            raise ConfigError(f"{name} draws rows at random, which streamed data do not allow; leave one of them out.")
    if mixture.test_split_size is None and mixture.datasets and evaluates:
        raise ConfigError(
            f"eval_strategy is {str(options.training.eval_strategy)!r}, and `datasets` have no rows to evaluate on. "
            "Give test_split_size, their share of the rows, or set eval_strategy to 'no'."
        )
    if mixture.test_split_size is not None and script.dataset_test_split != "test" and not mixture.datasets:
        raise ConfigError(
            f"test_split_size takes the evaluation's rows from {script.dataset_train_split}, and dataset_test_split "
            f"from {script.dataset_test_split}; leave one of them out."
        )


@ends_with("Nothing was written.")
def load_data(options: Options) -> dict[str, Any]:
    """Load `train_dataset`, and `eval_dataset` where there is an evaluation, as keyword arguments of a trainer.

    With `test_split_size` the rows to evaluate on are drawn from those to train on, with the seed of the run: each of
    its processes, and a run that resumes, draws the same.

    Raises:
        InputError: a data set or split cannot be loaded.
    """
    script, training, train_rows = options.script, options.training, options.recipe.train_rows
    name, evaluates, share = script.dataset_name, training.eval_strategy != "no", options.mixture.test_split_size
    if options.mixture.datasets:
        if name:
            say(f"The data are those of `datasets`; dataset_name {name} is ignored, as by TRL")
        name, train = "the mixture", load_mixture(options.mixture)
    else:
        for split in (script.dataset_train_split, *([script.dataset_test_split] if evaluates and not share else [])):
            _check_file(name, split)
        train = load_split(script, script.dataset_train_split)
    data = {}
    if share is not None:
        train, drawn = _divided(train, share, training.seed)
        data = {"eval_dataset": drawn} if evaluates else {}
    elif evaluates:
        data["eval_dataset"] = load_split(script, script.dataset_test_split)
    if train_rows is not None and train_rows > len(train):
        raise ConfigError(
            f"train_rows is {train_rows:,}{options.origin('train_rows')}, and {name} has {len(train):,} "
            f"rows. Pass --train_rows {len(train)} for all of them, or leave train_rows out."
        )
    if train_rows is not None:
        train = train.shuffle(seed=training.seed).select(range(train_rows))
    return {"train_dataset": train, **data}


def load_mixture(mixture: DatasetMixtureConfig) -> Dataset | IterableDataset:
    """Load the data sets of a mixture, one after the other, as TRL's scripts do.

    Raises:
        InputError: one cannot be loaded, or they do not fit together; the message has what `datasets` or TRL says.
    """
    from trl import get_dataset

    names = ", ".join(source.path for source in mixture.datasets)
    try:
        # Whole: TRL would divide it differently in each process.
        data = get_dataset(dataclasses.replace(mixture, test_split_size=None))["train"]
        first = next(iter(data), None)
    except Exception as reason:
        raise _not_loaded(f"the mixture of {names}", reason) from reason
    return _usable(data, first, f"the mixture of {names}")


def sources_of(options: Options) -> list[tuple[str, Any]]:
    """Return the data sets that a run is trained on: the name of each, and the files that are named beside it."""
    if not options.mixture.datasets:
        return [(str(options.script.dataset_name), None)]
    return [(source.path, source.data_files or source.data_dir) for source in options.mixture.datasets]


def hub_ids(options: Options) -> list[str]:
    """Return the data sets of the hub that a run is trained on."""
    return [name for name, files in sources_of(options) if not Path(name).exists() and (files is None or "/" in name)]


def _divided(data: Any, share: float, seed: int) -> tuple[Any, Any]:
    """Return the rows to train on and those to evaluate on: a share of them below 1, or their number."""
    size = int(share) if share >= 1 and float(share).is_integer() else share
    try:
        parts = data.train_test_split(test_size=size, seed=seed)
    except ValueError as reason:
        raise ConfigError(f"test_split_size is {share}: {reason}") from reason
    return parts["train"], parts["test"]


def load_scored(recipe: RecipeArguments) -> list[dict[str, Any]]:
    """Read the rows of `score_rows`, and check that `score_kept` names kinds that they have.

    Raises:
        ConfigError: there is no row of some kind.
        InputError: the rows cannot be scored.
    """
    assert recipe.score_rows is not None
    rows = read_rows(recipe.score_rows)
    kinds = {row["kind"] for row in rows}
    if missing := [kind for kind in recipe.score_kept or () if kind not in kinds]:
        raise ConfigError(
            f"score_kept names {len(missing)} kinds of which {recipe.score_rows} has no row:\n{list_names(missing)}\n"
            f"Its kinds are: {', '.join(sorted(kinds))}."
        )
    return rows


def load_split(script: ScriptArguments, split: str) -> Dataset | IterableDataset:
    """Load one split of a hub id, local folder or local file; it may be a slice such as `train[:1000]`.

    Raises:
        InputError: there is no such data set or split; the message has what `datasets` says about it.
    """
    from datasets import load_dataset

    name = script.dataset_name
    assert name is not None
    builder = BUILDERS.get(Path(name).suffix)
    source: dict[str, Any] = {"path": name, "name": script.dataset_config}
    if builder is not None:
        source = {"path": builder, "data_files": {"train": name}}
    try:
        data = load_dataset(**source, split=split, streaming=script.dataset_streaming)
        first = next(iter(data), None)
    except Exception as reason:
        raise _not_loaded(f"the split {split} of {name}", reason) from reason
    return _usable(data, first, f"the split {split} of {name}")


def _not_loaded(what: str, reason: Exception) -> InputError:
    """Return the error for data that cannot be loaded; `datasets` has its own exception for each cause of that."""
    cause = f"{reason} ({reason.__cause__})" if reason.__cause__ else str(reason)
    return InputError(f"cannot load {what}: {cause}")


def _usable(data: Any, first: dict[str, Any] | None, what: str) -> Any:
    """Return the data in a format of TRL's, of which `first` is the first row."""
    from trl.data_utils import is_conversational_from_value

    if first is None:
        raise InputError(f"{what} has no rows.")
    if is_conversational_from_value(first):
        return _as_messages(data)
    if set(first) == {"question", "answer"}:
        return _as_answers(data)
    return data.remove_columns("prompt") if _repeats_prompt(first) else data


def _check_file(name: str | None, split: str) -> None:
    """Refuse a data file that is not there, or of which another split than train is asked for."""
    if name is None or Path(name).suffix not in BUILDERS:
        return
    if not Path(name).is_file():
        raise InputError(f"the data file {name} does not exist.")
    if split.partition("[")[0] != "train":
        raise InputError(
            f"{name} is one file, which has the split train only, not {split}. Take the evaluation's rows from it with "
            "test_split_size (0.1 is a tenth of them), put train.jsonl and test.jsonl into a folder and pass that "
            "folder, or set eval_strategy to 'no'."
        )


def _repeats_prompt(row: dict[str, Any]) -> bool:
    """Whether `prompt` is a plain string beside whole conversations that begin with it.

    As in UltraChat, UltraFeedback and Tulu 3's preferences. TRL would take it for the prompt of a row that is not
    conversational; without it, TRL finds the prompt in the conversations.
    """
    whole = (row.get(name) for name in ("messages", "chosen"))
    return isinstance(row.get("prompt"), str) and any(isinstance(turns, list) and len(turns) > 1 for turns in whole)


def _as_answers(data: Any) -> Any:
    """Turn {question, answer}, as in GSM8K, into a prompt and a completion, which the loss covers alone."""

    def convert(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
        return {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        }

    return data.map(convert, remove_columns=["question", "answer"])


def _as_messages(data: Any) -> Any:
    """Turn ShareGPT's `conversations` of {"from", "value"} into `messages` of {"role", "content"}.

    TRL converts the keys too, but keeps the speakers' names, which no chat template knows.
    """

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted({turn["from"] for turn in row["conversations"]} - set(ROLES))
        if unknown:
            raise InputError(
                f"unknown speakers in `conversations`: {', '.join(unknown)}; known are {', '.join(ROLES)}."
            )
        return {"messages": [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]}

    return data.map(convert, remove_columns="conversations")
