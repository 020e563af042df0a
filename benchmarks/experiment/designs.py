"""The designs of the experiment and the order of their cells: a run cut off leaves a smaller design without holes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from shadow_trl.recipes.arms import RUNS
from shadow_trl.recipes.design import Design, Training

FOLDER = Path(__file__).resolve().parent / "designs"
CORE = ("core_dpo", "core_sft")
AFTER_SFT = "sft_dpo"
SFT_RATE = 3e-5
"""Learning rate of the SFT stage before DPO, that of the recipe for both."""
FIRST = 3
"""Seeds of the core that come before the other designs."""


@dataclass(frozen=True)
class Cell:
    """One training of a design, with what is measured of it.

    Args:
        design: name of the design.
        training: name of the training in it.
        seed: of the training.
        first: whether INSTRUCT is measured with it, as with one cell of a pair.
        source: file of the design.
    """

    design: str
    training: str
    seed: int
    first: bool
    source: Path

    @property
    def file(self) -> str:
        """Name of its file below `cells/`."""
        return f"{self.design}/{self.training}.json"


def read_design(name: str, source: Path, output: Path) -> Design:
    """Read a design; that of DPO after SFT takes what the core has trained with SFT for its pairs."""
    design = Design.read(source)
    return replace(design, pairs=stages(output, design.seeds), seeds=design.seeds[:1]) if name == AFTER_SFT else design


def stages(output: Path, seeds: list[int]) -> dict[str, list[str]]:
    """Return the pairs that DPO starts from: tuned BASE with its graft, and with INSTRUCT tuned directly."""
    pairs = {}
    for seed in seeds:
        folder = output / "after_sft" / str(seed)
        for arm in ("shadow", "direct"):
            pairs[f"{arm}-{seed}"] = [str(folder / "tuned"), str(folder / arm)]
    return pairs


def sft_run(output: Path, seed: int) -> Path:
    """Return the folder of the core's SFT training that DPO starts from."""
    return runs_of(output, "recipes/configs/nano/shadow_sft.yaml") / RUNS / f"pair-1_{SFT_RATE!r}_{seed}"


def runs_of(output: Path, config: str) -> Path:
    """Return the folder of the trainings by a configuration, which designs share."""
    return output / Path(config).stem


def folder_of(design: Design, output: Path) -> Path:
    """Return the folder that holds the `runs/` of a design."""
    return runs_of(output, design.config)


def sources_of(output: Path) -> dict[str, Path]:
    """Return the files of the designs by name; those of real data are in the output."""
    made = (path for path in (output / "real").glob("*.yaml") if not path.name.endswith(".config.yaml"))
    return {path.stem: path for path in sorted([*FOLDER.glob("*.yaml"), *made])}


def cells(output: Path, real: Path | None, only: list[str] | None) -> list[Cell]:
    """Return the cells: those of the core's first seeds, of each other design, of the core's rest; seed after seed."""
    if real is not None:
        from real import prepare

        prepare(real, output / "real")
    sources = sources_of(output)
    if only and (unknown := set(only) - set(sources)):
        raise SystemExit(f"no such designs: {', '.join(sorted(unknown))}. There are: {', '.join(sources)}.")
    found: list[tuple[int, int, Cell]] = []
    for place, (name, source) in enumerate(sources.items(), start=1):
        if only and name not in only:
            continue
        design = read_design(name, source, output)
        for cell in _cells_of(name, source, design):
            seed = design.seeds.index(cell.seed)
            core = 0 if seed < FIRST else len(sources) + 1
            found.append((core if name in CORE else place, seed, cell))
    return [cell for *_, cell in sorted(found, key=lambda item: item[:2])]


def _cells_of(name: str, source: Path, design: Design) -> list[Cell]:
    pairs: set[str] = set()
    made = []
    for training in design.trainings():
        made.append(Cell(name, training.name, training.seed, training.pair not in pairs, source))
        pairs.add(training.pair)
    return made


def training_of(design: Design, name: str) -> Training:
    """Return a training of a design by its name."""
    return next(one for one in design.trainings() if one.name == name)
