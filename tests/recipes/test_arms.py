"""`compare --config` on tiny models: what is trained, what shares it, and that an interruption changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from repository import COMPARISONS, ROOT
from rows import SETTINGS, write_rows
from tiny import make_pair, preference_data, sft_data

from shadow_trl.cli import main
from shadow_trl.recipes import arms

DESIGN = {
    "recipe": "dpo", "config": "dpo.yaml", "rows": "rows.jsonl", "max_new_tokens": 1, "scales": [0.5, 1.0],
    "seeds": [3, 4], "ref_policies": ["init", "instruct"], "instruct_scales": [0.9], "within": 100.0,
    "chat_vector": True, "conversations": "talks.jsonl",
}  # fmt: skip


@pytest.fixture
def workspace(tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, folder in zip(("base", "instruct"), pair, strict=True):
        (tmp_path / name).symlink_to(folder)
    write_rows(tmp_path / "dpo.jsonl", list(preference_data()))
    models = {"model_name_or_path": "base", "instruct_model": "instruct", "graft_dtype": "float32"}
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump({**models, "dataset_name": "dpo.jsonl", **SETTINGS}))
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(DESIGN))
    rows = [{"prompt": [{"role": "user", "content": f"{at}"}], "answer": "a", "kind": "target"} for at in range(16)]
    write_rows(tmp_path / "rows.jsonl", rows)
    talks = [{"messages": [*row["prompt"], {"role": "assistant", "content": "b"}]} for row in rows]
    write_rows(tmp_path / "talks.jsonl", talks)
    return tmp_path


def without_seconds(folder: str) -> dict:
    content = json.loads(Path(folder, "comparison.json").read_text())
    return {**content, **{part: [{**one, "seconds": None} for one in content[part]] for part in ("arms", "trainings")}}


@pytest.mark.slow
def test_an_interrupted_comparison_resumes_and_equals_an_undisturbed_one(workspace, monkeypatch, capsys):
    trained: list[tuple[str, bool]] = []
    train_stage = arms.train_stage

    def counted(kind, options, data, **more):
        name = Path(options.training.output_dir).name
        if name == "pair_0.001_4_init" and dying:
            train_stage(kind, options, data, **more)
            raise KeyboardInterrupt
        trained.append((name, options.recipe.compare_direct))
        return train_stage(kind, options, data, **more)

    monkeypatch.setattr(arms, "train_stage", counted)
    dying = True
    command = ["compare", "--config", "compare.yaml", "--output"]
    assert main([*command, "cut"]) == 130
    assert trained == [("pair_0.001_3_init", True), ("pair_0.001_3_instruct", False)]
    assert not Path("cut/comparison.json").exists()
    dying = False
    capsys.readouterr()
    assert main([*command, "cut", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(Path("cut/comparison.json").read_text())
    assert trained[2:] == [("pair_0.001_4_init", True), ("pair_0.001_4_instruct", False)]
    assert main([*command, "cut"]) == 0  # nothing is trained again
    assert len(trained) == 4
    assert main([*command, "whole"]) == 0
    assert len(trained) == 8
    assert without_seconds("cut") == without_seconds("whole")

    shown = [arm for arm in without_seconds("whole")["arms"] if arm["split"] == "test"]
    found = {(arm["arm"], arm["ref_policy"], arm["scale"], arm["instruct_scale"], arm["seed"]) for arm in shown}
    assert len(found) == len(shown)
    assert found == {("instruct", None, None, None, None)} | {
        (arm, policy, scale, other, seed)
        for arm, policies, other in (
            ("direct", [None], None), ("shadow", ["init", "instruct"], None),
            ("chat-vector", ["init", "instruct"], None), ("re-adapt", ["init", "instruct"], 0.9),
        )
        for policy in policies for scale in (0.5, 1.0) for seed in (3, 4)
    }  # fmt: skip

    # The dtype of the grafts is the configuration's own: INSTRUCT is in bf16.
    assert {arm["dtype"] for arm in shown if arm["arm"] != "instruct"} == {"float32"}
    trainings = without_seconds("whole")["trainings"]
    assert [(one["side"], one["ref_policy"], one["seed"]) for one in trainings] == [
        (*side, seed) for seed in (3, 4) for side in (("base", "init"), ("instruct", None), ("base", "instruct"))
    ]
    assert all((one["steps"], one["rows"], len(one["curve"])) == (3, 12, 3) for one in trainings)
    assert all(group["delta"] > 0 for one in trainings[::3] for group in one["by_kind"].values())

    # The chat vector at scale 1 is the graft's own sum; at another scale it is another model.
    losses = {
        (arm["arm"], arm["ref_policy"], arm["seed"], arm["scale"]): arm["scores"]["loss"] for arm in shown
        if arm["instruct_scale"] is None
    }  # fmt: skip
    for (name, *how, scale), loss in losses.items():
        if name == "chat-vector":
            same = loss == pytest.approx(losses["shadow", *how, scale], rel=1e-5)
            assert same == (scale == 1.0)

    changed = {**yaml.safe_load(Path("dpo.yaml").read_text()), "beta": 0.5}
    Path("dpo.yaml").write_text(yaml.safe_dump(changed))
    assert main([*command, "cut"]) == 2
    assert len(trained) == 8


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rate": [1e-4]}, "rate: there is no such key"),
        ({"recipe": "grpo"}, "'grpo' is neither sft nor dpo"),
        ({"seeds": 3}, "seeds: 3 is not of type list"),
        ({"learning_rates": ["1e-4"]}, "write 1.0e-4"),
        ({"pairs": {"a": ["base"]}}, "a is not [BASE, INSTRUCT]"),
        ({"pairs": {"a": ["base", "nowhere"]}}, "nowhere"),
        ({"ref_policies": ["best"]}, "best"),
        ({"scales": []}, "at least one scale"),
        ({"kept": ["mood"]}, "mood"),
        ({"config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"margin": 0.0}, "margin not above 0"),
        ({"modules": ["nowhere"]}, "no weight that can be grafted"),
        ({"pairs": {"../a": ["base", "instruct"]}}, "'../a' is no name of a folder"),
        ({"pairs": {"a": ["base", "base"]}}, "chat template"),
    ],
)
def test_bad_input_is_refused_before_the_first_training(workspace, monkeypatch, capsys, change, said):
    monkeypatch.setattr(arms, "train_stage", lambda *_, **__: pytest.fail("a training began"))
    (workspace / "compare.yaml").write_text(yaml.safe_dump({**DESIGN, **change}))
    assert main(["compare", "--config", "compare.yaml", "--output", "out"]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.rstrip().endswith("Nothing was written.")
    assert not (workspace / "out").exists()


NANO = [path for path in COMPARISONS if path.stem.startswith("nano")]
REAL = {"qwen3-0.6b": "qwen3", "llama-3.2-1b": "llama", "llama-3.2-1b_full": "llama"}


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted({*COMPARISONS} - {*NANO}), ids=lambda path: path.stem)
def test_a_comparison_of_a_real_pair_on_tiny_models(path: Path, workspace: Path, tmp_path: Path) -> None:
    """Both files as shipped, but for the models, rows in GSM8K's format, few steps on a CPU, and rows for the tasks."""
    lines = path.read_text().splitlines()
    command = next(line for line in lines if line.startswith("#   shadow-trl compare"))
    assert command.split()[3:5] == ["--config", str(path.relative_to(ROOT))]
    pair = make_pair(tmp_path / "real", kind=REAL[path.stem], dtype=torch.bfloat16)
    problems = [{"question": f"what is {at} + 1?", "answer": f"{at} + 1 = {at + 1}\n#### {at + 1}"} for at in range(24)]
    write_rows(tmp_path / "gsm8k.jsonl", problems)
    design = yaml.safe_load(path.read_text())
    settings = yaml.safe_load((ROOT / design["config"]).read_text())
    assert settings["num_train_epochs"] == 1
    small = {
        "model_name_or_path": str(pair[0]), "instruct_model": str(pair[1]), "dataset_name": "gsm8k.jsonl",
        "bf16": False, "use_cpu": True, "activation_checkpointing": False, "max_length": 64,
    }  # fmt: skip
    small |= {"train_rows": 20} if "train_rows" in settings else {}
    settings.pop("dataset_config", None)
    Path("small.yaml").write_text(yaml.safe_dump({**settings, **small}))
    assert [design.pop("target"), design.pop("keep")] == [design["tasks"][0], design.pop("tasks")[-1]]
    rates = design["learning_rates"]
    changes = {"config": "small.yaml", "rows": "rows.jsonl", "max_new_tokens": 1, "score_dtype": "float32",
               "learning_rates": rates[:1], "seeds": design["seeds"][:2], "within": 100.0}  # fmt: skip
    Path("compare.yaml").write_text(yaml.safe_dump({**design, **changes}))
    assert main(["compare", "--config", "compare.yaml", "--output", "out"]) == 0
    content = json.loads(Path("out/comparison.json").read_text())
    shown = [(arm["arm"], arm["learning_rate"], arm["scale"]) for arm in content["arms"] if arm["split"] == "test"]
    assert sorted({arm for arm, *_ in shown}) == ["direct", "instruct", "shadow"]
    assert shown.count(("shadow", rates[0], 1.0)) == shown.count(("direct", rates[0], 0.5)) == 2
    done = next(Path("out/runs").iterdir())
    lora = path.stem == "llama-3.2-1b"
    assert (done / "adapter_config.json").exists() == lora
    if lora:
        assert json.loads((done / "adapter_config.json").read_text())["r"] == 128


@pytest.mark.parametrize("path", NANO, ids=lambda path: path.stem)
def test_every_shipped_comparison_can_begin(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All is read and checked as before the first training, by the command at the head of the file."""
    monkeypatch.chdir(ROOT)
    command = next(line for line in path.read_text().splitlines() if line.startswith("#   shadow-trl compare"))
    words = command.split()[2:]
    assert words[words.index("--config") + 1] == str(path.relative_to(ROOT))

    def begin(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(arms, "train_once", begin)
    assert main([*words[:-1], str(tmp_path / "compared")]) == 130
    assert not list(tmp_path.iterdir())


def test_options_beside_the_file_are_refused(workspace, capsys):
    assert main(["compare", "--config", "compare.yaml", "--output", "out", "--margin", "3"]) == 2
    assert "--margin beside --config" in capsys.readouterr().err
    assert main(["compare", "--output", "out", "--instruct", "instruct"]) == 2
    assert "--tuned is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_guided_arms_of_sft(workspace):
    """The same rows with and without INSTRUCT as a guide: two trainings of BASE and two of INSTRUCT."""
    write_rows(Path("sft.jsonl"), list(sft_data()))
    values = {"model_name_or_path": "base", "instruct_model": "instruct", "dataset_name": "sft.jsonl", **SETTINGS}
    Path("sft.yaml").write_text(yaml.safe_dump(values))
    design = {"recipe": "sft", "config": "sft.yaml", "guidance_powers": [0, 0.5], "scales": [1.0],
              "conversations": "talks.jsonl", "within": 100.0}  # fmt: skip
    Path("guided.yaml").write_text(yaml.safe_dump(design))
    assert main(["compare", "--config", "guided.yaml", "--output", "out"]) == 0
    shown = [arm for arm in without_seconds("out")["arms"] if arm["split"] == "test"]
    scores = {(arm["arm"], arm["guidance_power"]): arm["scores"]["loss"] for arm in shown}
    assert scores.keys() == {("instruct", None), *((arm, how) for arm in ("direct", "shadow") for how in (None, 0.5))}
    assert len(set(scores.values())) == 5
    Path("wrong.yaml").write_text(yaml.safe_dump({**DESIGN, "guidance_powers": [1]}))
    assert main(["compare", "--config", "wrong.yaml", "--output", "none"]) == 2
