"""`compare --config`: arms trained with the same data, seeds and rates, then measured side by side."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..checkpoints.digests import weight_digests
from ..checkpoints.hub import locate, output_folder
from ..checkpoints.json_files import read_json
from ..checkpoints.manifest import versions
from ..errors import ConfigError, list_names
from ..evaluation.comparison import Comparison, Measured, Settings, choose_target
from ..evaluation.comparison_report import write_comparison
from ..evaluation.models import tokenizer_and_ends
from ..evaluation.scales import PAIR, Data, Sources, Step, check_all, measure, note_of_halves, steps_of, tried_with
from ..grafting.options import DTYPES
from ..results.folder import whole_file
from ..results.lock import RunLock
from ..results.written import tells_what_is_written
from ..runtime.processes import say
from .data import load_data
from .options import Options, parse_values, read_yaml
from .record import check_record, record_of
from .run import DIRECT_FOLDER, find_models, prepare, train_stage

DONE = "trained.json"
"""In the folder of a training that is complete: the seconds of each step."""
RUNS = "runs"


@dataclass(frozen=True)
class Design:
    """What is compared: the keys of the YAML file.

    Args:
        recipe: `sft` or `dpo`.
        config: YAML file of that recipe: data, settings, and a pair where `pairs` names none.
        pairs: name -> [BASE, INSTRUCT].
        learning_rates, seeds, ref_policies: of the trainings; left out: the config's own.
        guidance_powers: of SFT, each a training of its own with that `guidance_power` of INSTRUCT; 0 for one without
            guidance. Left out: the config's own.
        direct: whether INSTRUCT is tuned directly too. Default True.
        scales: multipliers of what training changed.
        modules: choices of weights that receive it.
        instruct_scales: multipliers of INSTRUCT below 1, each an arm `re-adapt` beside the graft. Default: none.
        chat_vector: see `Sources`. Default False.
        graft_dtype: of the grafts. Default `auto`.
        rows, validation_rows, conversations, preferences, functions, kept, batch_size, max_new_tokens, tasks,
            task_folders: see `Data`.
        target, keep, within, margin: see `Comparison`.
        score_dtype: in which all models answer. Default float32.
    """

    recipe: str
    config: str
    pairs: dict[str, list[str]] = field(default_factory=dict)
    learning_rates: list[float] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    ref_policies: list[str] = field(default_factory=list)
    guidance_powers: list[float] = field(default_factory=list)
    direct: bool = True
    scales: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0, 1.25])
    modules: list[str] = field(default_factory=lambda: ["all"])
    instruct_scales: list[float] = field(default_factory=list)
    chat_vector: bool = False
    graft_dtype: str = "auto"
    rows: str | None = None
    validation_rows: str | None = None
    conversations: str | None = None
    preferences: str | None = None
    functions: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    batch_size: int = 64
    max_new_tokens: int = 64
    tasks: list[str] = field(default_factory=list)
    task_folders: list[str] = field(default_factory=list)
    target: str | None = None
    keep: str | None = None
    within: float = 1.0
    margin: float = 2.0
    score_dtype: str = "float32"

    @classmethod
    def read(cls, path: Path) -> Design:
        """Read the YAML file; paths in it are from the current folder.

        Raises:
            ConfigError: an unknown, missing or wrong key.
        """
        values = read_yaml(path)
        kinds: dict[str, tuple[type, ...]] = {
            "str": (str,), "str | None": (str, type(None)), "bool": (bool,), "int": (int,), "float": (int, float),
        }  # fmt: skip
        known = {item.name: str(item.type).partition("[")[0] for item in fields(cls)}
        faults = [f"{key}: there is no such key" for key in values if key not in known]
        faults += [f"{key}: missing" for key in ("recipe", "config") if key not in values]
        for key in values.keys() & known.keys():
            wanted = kinds.get(known[key], (dict,) if known[key] == "dict" else (list,))
            if not isinstance(values[key], wanted) or (isinstance(values[key], bool) and bool not in wanted):
                faults.append(f"{key}: {values[key]!r} is no {known[key]}")
        if not faults:
            faults = cls(**values)._faults()
        if faults:
            raise ConfigError(f"{path} has {len(faults)} faults:\n{list_names(sorted(faults))}")
        return cls(**values)

    def _faults(self) -> list[str]:
        faults = [] if self.recipe in ("sft", "dpo") else [f"recipe: {self.recipe!r} is neither sft nor dpo"]
        if self.ref_policies and self.recipe != "dpo":
            faults.append("ref_policies: only dpo has a reference")
        if self.guidance_powers and self.recipe != "sft":
            faults.append("guidance_powers: only sft is guided")
        for name, pair in self.pairs.items():
            if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
                faults.append(f"pairs: {name} is not [BASE, INSTRUCT]")
            if not re.fullmatch(r"\w[\w.-]*", str(name)):
                faults.append(f"pairs: {name!r} is no name of a folder (letters, digits, dots, hyphens)")
        for name in ("learning_rates", "scales", "instruct_scales", "guidance_powers"):
            if not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in getattr(self, name)):
                faults.append(f"{name}: not all are numbers (write 1.0e-4, which YAML reads as a number)")
        if not all(isinstance(seed, int) for seed in self.seeds):
            faults.append("seeds: not all are whole numbers")
        if self.score_dtype not in DTYPES:
            faults.append(f"score_dtype: {self.score_dtype!r} is none of {', '.join(DTYPES)}")
        if not (self.within >= 0.0 and self.margin > 0.0):
            faults.append("within is below 0, or margin not above 0")
        return faults

    @property
    def data(self) -> Data:
        """The held-out data."""
        return Data(
            self.rows, self.validation_rows, self.conversations, self.preferences, tuple(self.functions),
            tuple(self.kept), self.batch_size, self.max_new_tokens, tuple(self.tasks), tuple(self.task_folders),
        )  # fmt: skip

    def tried(self) -> list[tuple[Settings, Any]]:
        """Return the settings of the graft and of `re-adapt`."""
        tried = tried_with(self.scales, self.modules, self.graft_dtype)
        more = [
            (replace(one, arm="re-adapt", instruct_scale=scale), replace(how, instruct_scale=scale))
            for scale in self.instruct_scales
            for one, how in tried
        ]
        return [*tried, *more]

    def trainings(self) -> Iterator[Training]:
        """Yield what is trained: BASE for all, and INSTRUCT directly once for all reference policies."""
        values = read_yaml(Path(self.config))
        own = parse_values(self.recipe, [], values, Path(self.config))
        pairs = self.pairs or {PAIR: [str(own.model.model_name_or_path), str(own.training.instruct_model)]}
        cases = itertools.product(
            pairs.items(),
            dict.fromkeys(map(float, self.learning_rates or [own.training.learning_rate])),
            dict.fromkeys(self.seeds or [own.training.seed]),
            dict.fromkeys(map(float, self.guidance_powers))
            or [own.recipe.guidance_power if own.recipe.sft_guidance else None],
        )
        policies: list[str | None] = list(dict.fromkeys(self.ref_policies)) or [
            getattr(own.training, "ref_policy", None)
        ]
        for (pair, (base, instruct)), rate, seed, power in cases:
            guidance = {} if power is None else {"sft_guidance": "instruct" if power else None, "guidance_power": power}
            for policy in policies:
                chosen = {
                    **values, "learning_rate": rate,
                    "seed": seed, "graft": False, "push_to_hub": False,
                    "compare_direct": self.direct and policy == policies[0],
                    "score_rows": None, "score_kept": None, "score_scales": None,
                }  # fmt: skip
                chosen |= guidance | ({} if policy is None else {"ref_policy": policy})
                yield Training(pair, base, instruct, rate, seed, policy, power or None, chosen)


@dataclass(frozen=True)
class Training:
    """One training of BASE, and of INSTRUCT directly where that is asked for in `values`."""

    pair: str
    base: str
    instruct: str
    learning_rate: float
    seed: int
    ref_policy: str | None
    guidance: float | None
    values: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of its folder."""
        guidance = None if self.guidance is None else f"guided-{self.guidance!r}"
        parts = [self.pair, repr(self.learning_rate), str(self.seed), self.ref_policy, guidance]
        return "_".join(part for part in parts if part is not None)

    def options(self, design: Design, folder: Path) -> Options:
        """Return the options of the recipe, whose run is in `folder`."""
        words = ["--model_name_or_path", self.base, "--instruct_model", self.instruct, "--output_dir", str(folder)]
        return parse_values(design.recipe, words, self.values, Path(design.config))


def compare_arms(config: Path, output: str | Path, *, progress: bool = True) -> Comparison:
    """Train every arm that the YAML file names, measure all of them, and write the comparison.

    Trainings that an earlier call has completed in `output` with the same options, data, models and versions are used
    again; one that was interrupted is made anew.

    Args:
        config: see `Design`.
        output: folder of `runs/`, comparison.json, comparison.md and comparison.html.
        progress: whether each step is named. Default True.

    Raises:
        InputError: bad input, found before the first training.
    """
    folder = output_folder(output)
    with tells_what_is_written(folder, instead=True):
        design = Design.read(config)
        state = PartialState()
        if state.num_processes > 1:
            raise ConfigError(f"compare works in one process, and {state.num_processes} were started. Start one.")
        exams = design.data.exams()
        metrics = exams["test"].metrics
        chosen = choose_target(metrics, design.target, design.keep)
        tried = design.tried()
        trainings = list(design.trainings())
        digests: dict[str, Any] = {}
        prepared = [prepare_training(design, training, folder, digests) for training in trainings]
        for options, _ in prepared:
            if design.chat_vector and options.model.use_peft:
                raise ConfigError(
                    "chat_vector adds INSTRUCT - BASE to TUNED, which use_peft makes an adapter. Leave one out."
                )
        _check_grafts(trainings, tried, folder)
        lock = RunLock(folder)
        lock.acquire()
        try:
            seconds = {
                training.name: train_once(design, folder / RUNS / training.name, *ready, progress)
                for training, ready in zip(trainings, prepared, strict=True)
            }
            models: list[Measured] = []
            for training in trainings:
                tell = say if progress else lambda text: None
                models += measure_arms(design, training, folder, tried, exams, models, seconds[training.name], tell)
            models.sort(key=lambda model: model.settings.arm != "instruct")
            found = Comparison(
                models, metrics, *chosen, within=design.within, margin=design.margin,
                notes=[note_of_halves(design.data, exams), _trained(trainings)],
            )  # fmt: skip
            write_comparison(found, folder)
        finally:
            lock.release()
    return found


def _check_grafts(trainings: list[Training], tried: list[tuple[Settings, Any]], folder: Path) -> None:
    """Check the grafts of each pair, with BASE in the place of TUNED, which has the same weights by name."""
    for base, instruct in dict.fromkeys((training.base, training.instruct) for training in trainings):
        tokenizer_and_ends(instruct)
        with ExitStack() as opened:
            steps = steps_of(Sources(instruct, base, base), tried, folder, opened)
            check_all(steps, folder, tried[0][1].scale)


def _trained(trainings: list[Training]) -> str:
    pairs = len({training.pair for training in trainings})
    seeds = len({training.seed for training in trainings})
    return f"Pairs: {pairs}. Seeds: {seeds}. The intervals are over trainings and rows."


def prepare_training(
    design: Design, training: Training, folder: Path, digests: dict[str, Any]
) -> tuple[Options, dict[str, Any]]:
    """Check a training; return its options and all that its weights depend on. `digests` keeps those of models."""
    run = folder / RUNS / training.name
    options = training.options(design, run)
    prepare(options)
    find_models(options)
    record = record_of(options)
    for side in (training.base, training.instruct):
        if side not in digests:
            digests[side] = weight_digests(side) or str(locate(side).path)
    record["models"] = {"base": digests[training.base], "instruct": digests[training.instruct]}
    record["versions"] = versions()
    record = json.loads(json.dumps(record))
    if (run / "options.json").exists():
        check_record(run, record)
    return options, record


def train_once(design: Design, run: Path, options: Options, record: dict[str, Any], progress: bool) -> dict[str, float]:
    """Make the training in `run` unless it is complete; return the seconds of its steps."""
    direct = run / DIRECT_FOLDER
    if (run / DONE).exists() and (direct.exists() or not options.recipe.compare_direct):
        return dict(read_json(run / DONE))
    shutil.rmtree(run, ignore_errors=True)
    if progress:
        say(f"Training {run.name}")
    _, _, seconds = train_stage(design.recipe, options, load_data(options), record=record)
    with whole_file(run / DONE) as new:
        new.write_text(json.dumps(seconds) + "\n", encoding="utf-8")
    return seconds


def measure_arms(
    design: Design, training: Training, folder: Path, tried: list[tuple[Settings, Any]], exams: dict[str, Any],
    known: list[Measured], seconds: dict[str, float], tell: Callable[[str], None],
) -> Iterator[Measured]:  # fmt: skip
    """Measure the arms of a training; INSTRUCT once a pair."""
    run = folder / RUNS / training.name
    direct = run / DIRECT_FOLDER
    made = str(direct) if design.direct and direct.exists() else None
    sources = Sources(training.instruct, str(run), training.base, made, design.chat_vector)
    tokenizer, ends = tokenizer_and_ends(training.instruct)
    with ExitStack() as opened:
        steps = steps_of(sources, tried, run / "measured", opened)
        for step in steps:
            here = _step_of(training, step)
            if any((model.settings, model.training) == (here.settings, (here.pair, here.seed)) for model in known):
                continue
            tell(f"{training.name}: {here.settings.arm} {here.settings.words()}")
            device = PartialState().device
            found = measure(here, exams=exams, tokenizer=tokenizer, ends=ends, dtype=design.score_dtype, device=device)
            spent = {"direct": "tune INSTRUCT directly", "instruct": ""}.get(here.settings.arm, "train and graft")
            first = here.settings.scale == design.scales[0] and here.settings.modules == design.modules[0]
            train = {"train": seconds[spent]} if first and spent in seconds and here.settings.arm != "re-adapt" else {}
            yield replace(found, seconds={**train, **found.seconds})


def _step_of(training: Training, step: Step) -> Step:
    """Return a step with what its model was trained with."""
    if step.grafts is None:
        return step._replace(pair=training.pair)
    policy = None if step.settings.arm == "direct" else training.ref_policy
    how: dict[str, Any] = {"ref_policy": policy, "guidance_power": training.guidance}
    settings = replace(step.settings, learning_rate=training.learning_rate, **how)
    return step._replace(settings=settings, pair=training.pair, seed=training.seed)
