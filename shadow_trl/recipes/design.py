"""What a comparison with training is made of: the keys of its YAML file, and the trainings that follow from them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError, list_names
from ..evaluation.scales import Data
from ..evaluation.steps import PAIR, Tried, tried_with
from ..grafting.options import DTYPES
from .options import Options, parse_values
from .yaml_files import read_yaml

LOGGED = {"logging_strategy": "steps", "logging_steps": 0.05}
"""Twenty points of the loss, however long the training is."""


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
        graft_dtype: of the grafts, rounded to nearest. Default: dtype and rounding of the configuration's own graft.
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
    graft_dtype: str | None = None
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
                faults.append(f"{key}: {values[key]!r} is not of type {known[key]}")
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

    def tried(self) -> Tried:
        """Return the settings of the graft and of `re-adapt`."""
        tried = tried_with(self.scales, self.modules, self.graft_dtype)
        more = [
            (replace(one, arm="re-adapt", instruct_scale=scale), {**changes, "instruct_scale": scale})
            for scale in self.instruct_scales
            for one, changes in tried
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
                    "seed": seed, "graft": False, "push_to_hub": False, **LOGGED,
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
