"""From the folder of the experiment to one file: measured models, what each delta is beside the gap, what BASE knew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from designs import CORE, folder_of, read_design, sources_of, training_of

from shadow_trl.recipes.arms import RUNS
from shadow_trl.recipes.design import Design

CHOSEN = 200
"""Training rows whose answers tell what a model knew before."""
GAP = ("sigma", "delta", "delta_to_gap", "cosine")


def gather(output: Path) -> dict[str, Any]:
    """Return the content of docs/results.json.gz."""
    found: dict[str, Any] = {"cells": [], "known": {}}
    for name, source in sources_of(output).items():
        files = sorted((output / "cells" / name).glob("*.json"))
        design = read_design(name, source, output) if files else None
        for file in files:
            assert design is not None
            cell = json.loads(file.read_text(encoding="utf-8"))
            del cell["digest"]
            if name in CORE:
                cell["gap"] = _gap(design, cell["training"], output)
            found["cells"].append(cell)
        if name in CORE and design is not None:
            found["known"][design.recipe] = {pair: _known(design, *sides) for pair, sides in design.pairs.items()}
    return found


def _gap(design: Design, name: str, output: Path) -> dict[str, Any]:
    """Return sigma, and the delta of a training beside the gap: overall and by kind of weight."""
    from shadow_trl import gap

    training = training_of(design, name)
    run = folder_of(design, output) / RUNS / name
    report = gap(training.base, training.instruct, str(run), progress=False).to_dict()
    kinds = {kind: {key: figures[key] for key in GAP} for kind, figures in report["by_kind"].items()}
    return {key: report[key] for key in GAP} | {"by_kind": kinds}


def _known(design: Design, base: str, instruct: str) -> dict[str, dict[str, float]]:
    """Return the loss of BASE and INSTRUCT before training, on the template and on answers of the training rows."""
    from shadow_trl.evaluation.likelihood import losses
    from shadow_trl.evaluation.models import load, tokenizer_and_ends
    from shadow_trl.recipes.yaml_files import read_yaml

    path = Path(read_yaml(Path(design.config))["dataset_name"])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:CHOSEN]]
    talks = [{"messages": [*row["prompt"], *row.get("chosen", row.get("completion"))]} for row in rows]
    tokenizer, _ = tokenizer_and_ends(instruct)
    found = {}
    for side, source in (("base", base), ("instruct", instruct)):
        model = load(source, dtype="float32")
        chosen, _ = losses(model, tokenizer, talks)
        found[side] = {"template": template_loss(model, tokenizer, talks), "chosen": sum(chosen) / len(chosen)}
    return found


def template_loss(model: Any, tokenizer: Any, talks: list[dict[str, Any]]) -> float:
    """Return the mean loss, nats, of the tokens that the chat template adds to conversations, but for the first."""
    import torch

    special, lost = torch.tensor(sorted(tokenizer.get_added_vocab().values())), []
    for talk in talks:
        ids = torch.tensor([tokenizer.apply_chat_template(talk["messages"], return_dict=False)])
        with torch.inference_mode():
            told = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        of_template = torch.isin(ids[0, 1:], special)
        lost += (-told.gather(-1, ids[0, 1:, None])[of_template, 0]).tolist()
    return sum(lost) / len(lost)
