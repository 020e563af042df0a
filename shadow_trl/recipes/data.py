"""Data sets of the recipes: hub ids, local folders and local files, loaded with the `datasets` library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, InputError, ends_with, list_names
from ..evaluation.scoring import read_rows

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from trl import ScriptArguments

    from .options import Options, RecipeArguments

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Builder of `datasets` for each suffix of a local file."""

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
"""Names of the speakers in ShareGPT's format and what chat templates call them."""


@ends_with("Nothing was written.")
def load_data(options: Options) -> dict[str, Any]:
    """Load `train_dataset`, and `eval_dataset` where there is an evaluation, as keyword arguments of a trainer.

    Raises:
        InputError: a data set or split cannot be loaded.
    """
    script, training, train_rows = options.script, options.training, options.recipe.train_rows
    evaluates = training.eval_strategy != "no"
    for split in (script.dataset_train_split, *([script.dataset_test_split] if evaluates else [])):
        _check_file(script.dataset_name, split)
    train = load_split(script, script.dataset_train_split)
    if train_rows is not None and train_rows > len(train):
        raise ConfigError(
            f"train_rows is {train_rows:,}{options.origin('train_rows')}, and {script.dataset_name} has {len(train):,} "
            f"rows. Pass --train_rows {len(train)} for all of them, or leave train_rows out."
        )
    if train_rows is not None:
        train = train.shuffle(seed=training.seed).select(range(train_rows))
    data = {"train_dataset": train}
    if evaluates:
        data["eval_dataset"] = load_split(script, script.dataset_test_split)
    return data


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
    from trl.data_utils import is_conversational_from_value

    name = script.dataset_name
    assert name is not None
    builder = BUILDERS.get(Path(name).suffix)
    source: dict[str, Any] = {"path": name, "name": script.dataset_config}
    if builder is not None:
        source = {"path": builder, "data_files": {"train": name}}
    try:
        data = load_dataset(**source, split=split, streaming=script.dataset_streaming)
        first = next(iter(data), None)
    # Bad JSON, no such id, split or config, no connection: `datasets` has its own exception for each.
    except Exception as reason:
        cause = f"{reason} ({reason.__cause__})" if reason.__cause__ else str(reason)
        raise InputError(f"cannot load the split {split} of {name}: {cause}") from reason
    if first is None:
        raise InputError(f"the split {split} of {name} has no rows.")
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
            f"{name} is one file, which has the split train only, not {split}. Put train.jsonl and test.jsonl into a "
            "folder and pass that folder, or set eval_strategy to 'no'."
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
