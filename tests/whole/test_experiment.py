"""The experiment of docs/results.md: the order and the resumption of its cells, and its figures by other means."""

from __future__ import annotations

import base64
import gzip
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from repository import ROOT

SHARED = ROOT.parent / "shared" / "data"
MODULES = (
    "cells", "designs", "experiment", "gather", "predictors", "real", "report", "stored", "tables", "work"
)  # fmt: skip
PAGE = ROOT / "docs/results.md"


@pytest.fixture(autouse=True)
def _package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks/experiment")
    monkeypatch.chdir(ROOT)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture(scope="module")
def content() -> dict:
    return json.loads(gzip.decompress((ROOT / "docs/results.json.gz").read_bytes()))


def test_what_is_cut_off_leaves_all_pairs_of_fewer_seeds(tmp_path):
    from designs import cells

    found = cells(tmp_path, None, None)
    assert len({cell.file for cell in found}) == len(found)
    core = [cell for cell in found if cell.design.startswith("core")]
    names = [(cell.design, *cell.training.split("_")[:3]) for cell in core]
    assert len(names) == 2 * 3 * 2 * 5
    for start in range(0, len(core), 12):  # one seed of every task, pair and rate
        part = names[start : start + 12]
        assert len({seed for *_, seed in part}) == 1
        assert len(set(part)) == 12
        assert {pair for _, pair, *_ in part} == {"pair-1", "pair-2", "pair-3"}
    others = [at for at, cell in enumerate(found) if not cell.design.startswith("core")]
    assert others == list(range(36, 36 + len(others)))
    # INSTRUCT is measured once a pair of a design, and before nothing of that pair.
    firsts = [(cell.design, cell.training.split("_")[0]) for cell in found if cell.first]
    assert len(set(firsts)) == len(firsts)
    assert set(firsts) == {(cell.design, cell.training.split("_")[0]) for cell in found}
    assert [cell.design for cell in cells(tmp_path, None, ["lora_sft"])] == ["lora_sft"] * 6
    with pytest.raises(SystemExit, match=r"no such designs: lora\. There are: core_dpo"):
        cells(tmp_path, None, ["lora"])


def test_values_of_rows_are_stored_without_loss():
    from stored import from_dict, pack, to_dict, unpack

    from shadow_trl.evaluation.measured import Measured, Settings

    rng = np.random.default_rng(0)
    for rows in (1, 7, 8, 9, 300):
        bits = tuple(map(float, rng.integers(0, 2, rows)))
        assert unpack(json.loads(json.dumps(pack(bits)))) == bits
    losses = tuple(rng.random(5).tolist())
    assert unpack(json.loads(json.dumps(pack(losses)))) == losses
    model = Measured(
        Settings("shadow", 1e-4, 0.5, "all", None), {"test": {"target": (1.0, 0.0), "loss": losses}}, "pair-1", 3,
        {"score": 1.5},
    )  # fmt: skip
    assert from_dict(json.loads(json.dumps(to_dict(model)))) == model


def test_a_cell_that_is_there_is_not_made_again_and_a_changed_one_is(tmp_path, monkeypatch):
    import work
    from designs import cells

    from shadow_trl.evaluation.measured import Measured, Settings

    trained = []
    values = {split: {"target": (1.0, 0.0)} for split in ("validation", "test")}
    monkeypatch.setattr(work, "train_once", lambda *given, **more: trained.append(given[1].name) or {"train": 1.0})
    monkeypatch.setattr(work, "measure_arms", lambda *given: [Measured(Settings("shadow"), values, "pair-1", 42)])
    (cell,) = [one for one in cells(tmp_path, None, ["core_sft"]) if one.training == "pair-1_3e-05_42"]
    assert work.make(cell, tmp_path) > 0.0
    assert work.make(cell, tmp_path) == 0.0
    assert trained == ["pair-1_3e-05_42"]
    content = yaml.safe_load(cell.source.read_text())
    changed = tmp_path / "core_sft.yaml"
    changed.write_text(yaml.safe_dump({**content, "scales": [0.3]}))
    assert work.make(type(cell)(cell.design, cell.training, 42, True, changed), tmp_path) > 0.0
    assert len(trained) == 2


def test_the_time_left_is_that_of_the_cells_that_are_missing(tmp_path, monkeypatch):
    import work
    from designs import cells

    monkeypatch.setattr(work, "_cost", lambda design: (19, 60.0))
    todo = cells(tmp_path, None, ["reference_dpo", "lora_dpo"])
    made = tmp_path / "cells" / todo[0].file
    made.parent.mkdir(parents=True)
    made.touch()
    text = work.estimate(todo, tmp_path, 2)
    assert "| lora_dpo | 6 | 5 | 19 | 60 | 5.0 |" in text
    assert "| reference_dpo | 3 | 3 | 19 | 60 | 3.0 |" in text
    assert text.endswith("8 minutes of one core, about 4 with 2 at once.")


def shares(model: dict, split: str) -> dict[str, float]:
    """Exact match in percent by kind, from the stored bits."""
    found = {}
    for kind, packed in model["values"][split].items():
        bits = "".join(f"{byte:08b}" for byte in base64.b64decode(packed["bits"]))[: packed["rows"]]
        found[kind] = 100 * bits.count("1") / packed["rows"]
    return found


def test_figures_of_the_page_are_those_of_the_stored_answers(content):
    """The lines of equal rate and scale, and the setting chosen with one point to lose, by plain means."""
    page = PAGE.read_text(encoding="utf-8")
    for task, kept, name in (
        ("dpo", ("t_rule", "rule", "skill", "refuse"), "DPO"), ("sft", ("rule", "skill", "refuse"), "SFT")
    ):  # fmt: skip
        arms: dict[tuple, list[dict]] = {}
        seeds: dict[int, int] = {}
        cells = [cell for cell in content["cells"] if cell["design"] == f"core_{task}"]
        for cell in cells:
            seeds[cell["models"][-1]["seed"]] = seeds.get(cell["models"][-1]["seed"], 0) + 1
        for model in [model for cell in cells for model in cell["models"]]:
            if model["seed"] is None or seeds[model["seed"]] == 6:  # three pairs at two rates
                how = model["settings"]
                arms.setdefault((how["arm"], how.get("learning_rate"), how.get("scale")), []).append(model)

        def mean(arm, split, kinds, arms=arms):
            found = [shares(model, split) for model in arms[arm]]
            return np.mean([np.mean([one[kind] for kind in kinds]) for one in found])

        for rate, scale in itertools.product(sorted({key[1] for key in arms if key[1]}), (0.5, 1.0)):
            line = next(line for line in page.splitlines() if line.startswith(f"| {name} | {rate:g} | {scale:g} |"))
            sides = ("direct", rate, scale), ("shadow", rate, scale)
            for kinds in (("target",), ("in style",), kept):
                direct, graft = (mean(side, "test", kinds) for side in sides)
                assert f"| {direct:.1f} / {graft:.1f} | {graft - direct:+.1f} (" in line
        least = mean(("instruct", None, None), "validation", kept) - 1.0
        line = next(line for line in page.splitlines() if line.startswith(f"| {name} | 1 | "))
        for arm in ("direct", "shadow"):
            fit = [key for key in arms if key[0] == arm and mean(key, "validation", kept) >= least - 1e-9]
            best = max(fit, key=lambda key: mean(key, "validation", ("target",)))
            shown = [f"{mean(best, 'test', kinds):.1f}" for kinds in (("target",), ("in style",), kept)]
            assert f"| {best[1]:g} x {best[2]:g} | {' / '.join(shown)} |" in line


def test_tables_without_a_draw_are_those_of_the_page():
    from report import read
    from tables import TABLES

    experiment, page = read(ROOT / "docs/results.json.gz"), PAGE.read_text(encoding="utf-8")
    for name in ("untouched", "factors", "stages", "predictors", "correlations", "kinds", "cost"):
        assert TABLES[name](experiment) in page
    assert "{" not in page


def test_p_of_a_rank_correlation_is_over_all_orders():
    from predictors import all_orders

    assert all_orders([1, 2, 3, 5], [10, 20, 40, 80]) == (pytest.approx(1.0), pytest.approx(2 / 24))
    x, y = [3.0, 1.0, 1.0, 2.0, 9.0], [1.0, 5.0, 2.0, 2.0, 7.0]

    def correlation(order) -> float:
        ranks = [[sum(other < one for other in side) + sum(other == one for other in side) / 2 for one in side]
                 for side in (x, order)]  # fmt: skip
        return float(np.corrcoef(ranks)[0, 1])

    drawn = [correlation(order) for order in itertools.permutations(y)]
    found, p = all_orders(x, y)
    assert found == pytest.approx(correlation(y))
    tails = [np.mean([sign * one >= sign * correlation(y) - 1e-9 for one in drawn]) for sign in (1, -1)]
    assert p == pytest.approx(2 * min(tails))


def test_the_loss_on_the_template_is_that_of_its_tokens():
    """Of a model that gives every token a share that its id tells."""
    import torch
    from gather import template_loss

    class Tokenizer:
        def get_added_vocab(self):
            return {"<|user|>": 3, "<|end|>": 5}

        def apply_chat_template(self, messages, return_dict):
            return [3, 1, 5, 3, 0, 5]

    class Model:
        def __call__(self, input_ids):
            logits = torch.arange(8.0).expand(1, input_ids.shape[1], 8)
            return type("Output", (), {"logits": logits})

    shares = np.exp(np.arange(8.0)) / np.exp(np.arange(8.0)).sum()
    wanted = -np.mean([np.log(shares[token]) for token in (5, 3, 5)])  # the first token has nothing before it
    assert template_loss(Model(), Tokenizer(), [{"messages": []}]) == pytest.approx(wanted)


def check_real(folder: Path) -> dict[str, tuple[list, list]]:
    """Check what was made of real data; return the rows that train and those held out."""
    from real import LONGEST, MOST

    found = {}
    for design in sorted(folder.glob("real_*.yaml")):
        if design.name.endswith(".config.yaml"):
            continue
        rows = {
            kind: [json.loads(line) for line in (folder / f"{design.stem}_{kind}.jsonl").read_text().splitlines()]
            for kind in ("train", "held_out")
        }
        asked = {kind: {json.dumps(row.get("prompt", row.get("messages", [])[:1])) for row in several}
                 for kind, several in rows.items()}  # fmt: skip
        assert not asked["train"] & asked["held_out"]
        assert all(0 < len(several) <= MOST for several in rows.values())
        for row in itertools.chain(*rows.values()):
            turns = [turn["content"] for side in row.values() for turn in side]
            assert len(turns[0]) + max(map(len, turns[1:])) <= LONGEST
        content = yaml.safe_load(design.read_text())
        assert yaml.safe_load(Path(content["config"]).read_text())["dataset_name"].endswith("_train.jsonl")
        found[design.stem] = rows["train"], rows["held_out"]
    return found


def test_rows_of_real_data_are_short_and_each_is_on_one_side(tmp_path):
    from real import prepare

    svamp = [{"Body": f"There are {at} cats.", "Question": "How many?", "Answer": float(at)} for at in range(60)]
    svamp += [svamp[0], {"Body": "a" * 300, "Question": "How many?", "Answer": 1.0}]
    pairs = [{"instruction": "Say", "input": f"{at}", "chosen": "yes", "rejected": "no"} for at in range(60)]
    pairs.append({"instruction": "Say", "input": "x", "chosen": "same", "rejected": "same"})
    (tmp_path / "svamp.json").write_text(json.dumps(svamp))
    (tmp_path / "preferences.json").write_text(json.dumps(pairs))
    prepare(tmp_path, tmp_path / "real")
    found = check_real(tmp_path / "real")
    assert {name: len(train) + len(held) for name, (train, held) in found.items()} == {
        "real_preferences": 60, "real_svamp": 60
    }  # fmt: skip
    row = found["real_svamp"][0][0]
    number = re.search(r"\d+", row["prompt"][0]["content"])[0]
    assert row["prompt"][0]["content"] == f"There are {number} cats. How many?"
    assert row["completion"] == [{"role": "assistant", "content": number}]
    with pytest.raises(SystemExit, match="has none of"):
        prepare(tmp_path / "real", tmp_path / "nothing")


@pytest.mark.skipif(not (SHARED / "svamp.json").is_file(), reason="no svamp.json in ../shared/data")
def test_the_designs_of_real_data_can_begin(tmp_path):
    from designs import cells

    todo = cells(tmp_path, SHARED, None)
    assert {cell.design for cell in todo if cell.design.startswith("real")} == set(check_real(tmp_path / "real"))
