"""Of what a recipe trains, only the graft that it was asked for is published."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shadow_trl.recipes import pipeline, run
from shadow_trl.recipes.arms import Design


def options(folder: Path) -> Any:
    training = SimpleNamespace(output_dir=str(folder), push_to_hub=True, graft=True, resume_from_checkpoint=None)
    return SimpleNamespace(training=training, model=SimpleNamespace(), recipe=SimpleNamespace(
        merge_adapter=False, compare_direct=True
    ))  # fmt: skip


@pytest.mark.parametrize(("stages", "pushed"), [(("sft", "dpo"), [False, True]), (("sft",), [True])])
def test_the_pipeline_publishes_its_last_stage(tmp_path, monkeypatch, stages, pushed):
    seen = []
    monkeypatch.setattr(pipeline, "train_stage", lambda stage, given, *_, **__: seen.append(given.training.push_to_hub))
    every = {stage: options(tmp_path) for stage in stages}
    plan = pipeline.Plan(stages, every, str(tmp_path), dict.fromkeys(stages), {stage: {} for stage in stages})
    for stage in stages:
        pipeline._run_stage(plan, stage, tmp_path, {})
    assert seen == pushed


def test_instruct_tuned_directly_is_not_published(tmp_path, monkeypatch):
    trainer = SimpleNamespace(
        origins=SimpleNamespace(base="b", instruct=SimpleNamespace(source="i")), train=lambda **_: None,
        args=SimpleNamespace(),
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(run, "_set_model_options", lambda _: None)
    monkeypatch.setattr(run, "_engine_of_its_own", lambda _: __import__("contextlib").nullcontext())
    monkeypatch.setattr(run, "_shadow_trainer", lambda *_: trainer)
    monkeypatch.setattr(run, "_free", lambda _: None)
    monkeypatch.setattr(run, "_train_direct", lambda kind, given, origins, args, data: seen.append(args.push_to_hub))
    given = options(tmp_path)
    run.train_stage("sft", given, {})
    assert seen == [False]
    assert given.training.push_to_hub is True


def test_no_training_of_a_comparison_is_published(tmp_path):
    config = tmp_path / "sft.yaml"
    config.write_text(
        "model_name_or_path: b\ninstruct_model: i\ndataset_name: d\npush_to_hub: true\nuse_cpu: true\nbf16: false\n"
    )
    (training,) = Design(recipe="sft", config=str(config)).trainings()
    assert training.values["graft"] is False
    assert training.values["push_to_hub"] is False
