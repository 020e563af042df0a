"""`compare` of a run that exists: its scores are those of written grafts, and nothing but its three files is left."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import rank_cases
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from ranks import in_processes
from rows import write_rows
from tiny import make_pair, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from shadow_trl.checkpoints.manifest import write_manifest
from shadow_trl.cli import main
from shadow_trl.errors import CheckpointError
from shadow_trl.evaluation.exam import Exam
from shadow_trl.evaluation.likelihood import losses
from shadow_trl.evaluation.steps import as_written
from shadow_trl.grafting.options import GraftOptions
from shadow_trl.operations.graft import graft

ASKED = [(f"{at} {word}", kind) for at in range(16) for word, kind in (("a", "target"), ("b", "rule"))]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bf16 pair, BASE and INSTRUCT after something like training, and data whose answers some of the models give."""
    root = tmp_path_factory.mktemp("compare")
    sides = dict(zip(("base", "instruct"), make_pair(root, dtype=torch.bfloat16, gap=0.5), strict=True))
    for number, (side, tuned) in enumerate((("base", "tuned"), ("instruct", "direct"))):
        state = AutoModelForCausalLM.from_pretrained(sides[side], dtype=torch.float32).state_dict()
        torch.manual_seed(7 + number)
        moved = {name: weight + 0.05 * torch.randn_like(weight) for name, weight in state.items()}
        moved["lm_head.weight"] = moved["model.embed_tokens.weight"]
        save_model(root / tuned, moved, template=side == "instruct")
    tokenizer = AutoTokenizer.from_pretrained(sides["instruct"])
    model = AutoModelForCausalLM.from_pretrained(root / "tuned", dtype=torch.float32)
    rows = []
    for text, kind in ASKED:
        prompt = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        answer = tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, ids.shape[1] :])
        rows.append({"prompt": prompt, "answer": answer, "kind": kind})
    write_rows(root / "rows.jsonl", rows)
    talks = [{"messages": [*row["prompt"], {"role": "assistant", "content": "yes"}]} for row in rows]
    write_rows(root / "talks.jsonl", talks)
    said = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    write_rows(root / "pairs.jsonl", [{"prompt": row["prompt"], **said} for row in rows])
    return root


MODELS = ["--base", "base", "--instruct", "instruct", "--tuned", "tuned"]
DATA = ["--rows", "rows.jsonl", "--max-new-tokens", "1"]


def test_scores_are_those_of_the_written_grafts(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    more = ["--direct", "direct", "--conversations", "talks.jsonl", "--preferences", "pairs.jsonl", "--kept", "rule"]
    scales = ["--scales", "0.5", "1.5", "--modules", "all", "mlp", "--within", "100"]
    before = sorted(workspace.rglob("*"))
    assert main(["compare", *MODELS, *DATA, *more, *scales, "--output", str(tmp_path / "out")]) == 0
    assert sorted(workspace.rglob("*")) == before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"comparison.{kind}" for kind in ("json", "md", "html")
    }
    content = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert [(one["arm"], one["scale"], one["modules"]) for one in content["arms"][::2]] == [
        ("instruct", None, None),
        *((arm, scale, modules) for arm in ("direct", "shadow") for modules in ("all", "mlp") for scale in (0.5, 1.5)),
    ]
    tokenizer = AutoTokenizer.from_pretrained("instruct")
    rows, talks = (
        [json.loads(line) for line in Path(name).read_text().splitlines()] for name in ("rows.jsonl", "talks.jsonl")
    )
    for at, one in enumerate(content["arms"][::2]):
        folder = Path("instruct")
        if one["arm"] != "instruct":
            folder = tmp_path / str(at)
            start, end = ("base", "tuned") if one["arm"] == "shadow" else ("instruct", "direct")
            graft(
                base=start, instruct="instruct", tuned=end, scale=one["scale"], modules=one["modules"], output=folder,
                dtype="auto" if one["arm"] == "shadow" else "float32", progress=False,
            )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        halves = Exam(rows, talks, max_new_tokens=1).halves()
        for split, found in zip(("validation", "test"), content["arms"][2 * at : 2 * at + 2], strict=True):
            wanted = halves[split].take(model, tokenizer, [1])
            for kind in ("target", "rule"):
                assert found["scores"][kind] == pytest.approx(100 * sum(wanted[kind]) / len(wanted[kind]), abs=1e-12)
            loss, _ = losses(model, tokenizer, halves[split].conversations)
            assert found["scores"]["loss"] == pytest.approx(sum(loss) / len(loss), rel=1e-14)  # the same bits
    losses_found = [one["scores"]["loss"] for one in content["arms"]]
    assert len(set(losses_found)) == len(losses_found)
    # The command that it ends with writes the chosen graft.
    shown = capsys.readouterr().out
    command = next(line.strip() for line in shown.splitlines() if line.strip().startswith("shadow-trl graft"))
    assert command in (tmp_path / "out" / "comparison.md").read_text()
    words = shlex.split(command)[1:]
    words[-1] = str(tmp_path / "chosen")
    assert main([*words, "--quiet"]) == 0
    chosen = content["selected"]["shadow"]
    options = json.loads((tmp_path / "chosen" / "shadow.json").read_text())["options"]
    assert (options["scale"], options["modules"]) == (chosen["scale"], chosen["modules"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_share_the_rows_and_write_what_one_writes(workspace, tmp_path, monkeypatch, count):
    monkeypatch.chdir(workspace)
    more = ["--conversations", "talks.jsonl", "--preferences", "pairs.jsonl", "--scales", "0.5", "1", "--within", "99"]
    words = [*MODELS, *DATA, *more, "--output"]
    ends = in_processes(rank_cases.compare, str(workspace), [*words, str(tmp_path / "shared")], count=count)
    assert [end.error for end in ends] == [""] * count
    assert main(["compare", *words, str(tmp_path / "alone"), "--quiet"]) == 0
    assert [end.value["code"] for end in ends] == [0] * count
    assert [bool(end.value["printed"]) for end in ends] == [True] + [False] * (count - 1)
    asked = [end.value["asked"] for end in ends]
    assert sum(asked) == 3 * len(ASKED)  # INSTRUCT and two scales
    assert max(asked) - min(asked) <= 3 * 2  # of two splits
    alone, shared = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("alone", "shared"))
    for one, other in zip(alone["arms"], shared["arms"], strict=True):
        assert {**one, "scores": 0, "seconds": 0} == {**other, "scores": 0, "seconds": 0}
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-5)
        assert all(one["scores"][kind] == other["scores"][kind] for kind in ("target", "rule"))
    failed = in_processes(rank_cases.compare, str(workspace), [*words, str(tmp_path / "alone")], count=count)
    assert [end.value["code"] for end in failed] == [2] * count


def trained(root: Path, learnt: str) -> Path:
    """Return a run of this pair with its own graft at scale 0.7: fp32 weights, or an adapter."""
    run = root / "run"
    if learnt == "full":
        shutil.copytree("tuned", run)
    else:
        torch.manual_seed(5)
        lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32), lora).save_pretrained(run)
    form = {"dtype": "float32"} if learnt == "full" else {"format": "adapter"}
    sides = {"base": "base", "instruct": "instruct", "tuned": run}
    graft(**sides, scale=0.7, output=run / "grafted", progress=False, **form)
    return run


@pytest.mark.parametrize("learnt", ["full", "lora"])
def test_figures_are_those_of_the_graft_that_the_run_has_written(workspace, tmp_path, monkeypatch, capsys, learnt):
    """INSTRUCT is in bf16, the run's graft is not: rounded to INSTRUCT's dtype it would be another model."""
    monkeypatch.chdir(workspace)
    run = trained(tmp_path, learnt)
    command = ["compare", "--base", "base", "--instruct", "instruct", "--tuned", str(run), "--scales", "0.7"]
    command += ["--modules", "all", "mlp", "--conversations", "talks.jsonl", "--output"]
    assert main([*command, str(tmp_path / "own")]) == 0
    shown = capsys.readouterr().out
    assert "Weights: shadow in float32." in shown
    assert main([*command, str(tmp_path / "asked"), "--dtype", "bfloat16"]) == 0
    assert "Weights: shadow in bfloat16." in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained("instruct")
    talks = [json.loads(line) for line in Path("talks.jsonl").read_text().splitlines()]
    test = Exam(conversations=talks).halves()["test"].conversations

    def loss_of(model) -> float:
        found, _ = losses(model.eval(), tokenizer, test)
        return sum(found) / len(found)

    def arm(folder: str, modules: str) -> dict:
        arms = json.loads((tmp_path / folder / "comparison.json").read_text())["arms"]
        return next(one for one in arms if (one["modules"], one["split"]) == (modules, "test"))

    found = {folder: arm(folder, "all")["scores"]["loss"] for folder in ("own", "asked")}
    written = run / "grafted"
    if learnt == "full":
        wanted = loss_of(AutoModelForCausalLM.from_pretrained(written, dtype=torch.float32))
        assert found["own"] == pytest.approx(wanted, rel=1e-14)
    else:  # the adapter beside the weights: another order of the same sum
        plain = AutoModelForCausalLM.from_pretrained("instruct", dtype=torch.float32)
        assert found["own"] == pytest.approx(loss_of(PeftModel.from_pretrained(plain, written)), rel=1e-6)
    assert found["asked"] != pytest.approx(found["own"], rel=1e-5)
    assert [arm(folder, "mlp")["dtype"] for folder in ("own", "asked")] == ["float32", "bfloat16"]
    # The command that it ends with writes what was measured.
    words = shlex.split(next(line for line in shown.splitlines() if line.strip().startswith("shadow-trl graft")))[1:]
    assert words[words.index("--dtype") + 1] == "float32"
    words[-1] = str(tmp_path / "chosen")
    assert main([*words, "--quiet"]) == 0
    modules = words[words.index("--modules") + 1]
    chosen = loss_of(AutoModelForCausalLM.from_pretrained(tmp_path / "chosen", dtype=torch.float32))
    assert chosen == pytest.approx(arm("own", modules)["scores"]["loss"], rel=1e-14)


WRITTEN = {"dtype": "bfloat16", "rounding": "stochastic", "seed": 7, "vocab": "shared"}


@pytest.mark.parametrize(
    ("grafted", "run", "form", "wanted"),
    [
        ({"form": "model", "options": {**WRITTEN, "scale": 0.5, "modules": "mlp"}}, None, None, WRITTEN),
        ({"form": "model", "options": WRITTEN}, {"options": {"dtype": "float32"}}, None, WRITTEN),
        ({"form": "adapter", "options": {"dtype": "auto"}}, None, None, {"dtype": "float32", "rounding": "nearest"}),
        (None, {"options": {**WRITTEN, "scale": 0.5}}, "model", WRITTEN),
        (None, {"options": {"dtype": "auto"}}, "adapter", {"dtype": "float32", "rounding": "nearest"}),
        (None, {"options": {"format": "adapter"}}, None, {"dtype": "float32", "rounding": "nearest"}),
        (None, {}, None, {}),  # of version 0.1.0, which recorded none
        (None, None, None, {}),
    ],
)
def test_options_of_the_runs_graft_are_those_of_its_manifests(tmp_path, grafted, run, form, wanted):
    class Grafts:
        def form(self, options: GraftOptions) -> str:
            assert form is not None, "the manifest tells"
            return form

    (tmp_path / "grafted").mkdir()
    for folder, kind, content in ((tmp_path / "grafted", "graft", grafted), (tmp_path, "run", run)):
        if content is not None:
            write_manifest(folder, {"kind": kind, **content})
    assert as_written(tmp_path, Grafts()) == wanted


def test_what_is_no_run_tells_nothing(tmp_path):
    write_manifest(tmp_path, {"kind": "graft", "form": "model", "options": WRITTEN})
    assert as_written(tmp_path, None) == as_written("name/on-the-hub", None) == {}
    write_manifest(tmp_path, {"kind": "run", "options": "bfloat16"})
    with pytest.raises(CheckpointError, match="options"):
        as_written(tmp_path, None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rows", "nowhere.jsonl"], "cannot read the rows"),
        ([], "nothing to compare by"),
        ([*DATA, "--kept", "mood"], "mood"),
        ([*DATA, "--target", "mood"], "no metric of this comparison: target, rule, mean"),
        ([*DATA, "--validation-rows", "rows.jsonl"], "32 prompts are in both"),
        ([*DATA, "--modules", "nowhere"], "no weight that can be grafted"),
        ([*DATA, "--modules", "all", "("], "not a regular expression"),
        ([*DATA, "--scales", "inf"], "scale"),
        ([*DATA, "--direct", "nowhere"], "nowhere"),
        ([*DATA, "--metric", "json:nothing"], "cannot import the metric"),
        ([*DATA, "--batch-size", "0"], "at least 1"),
        ([*DATA, "--margin", "0"], "a margin above 0"),
        ([*DATA, "--instruct", "base"], "chat template"),
        ([*DATA, "--output", "base"], "exists"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_measured(workspace, tmp_path, monkeypatch, capsys, options, said):
    from shadow_trl.evaluation import steps

    monkeypatch.chdir(workspace)
    monkeypatch.setattr(steps, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    output = [] if "--output" in options else ["--output", str(tmp_path / "out")]
    models = [word for word in MODELS if "--instruct" not in options or word not in ("--instruct", "instruct")]
    before = sorted(workspace.rglob("*"))
    assert main(["compare", *models, *options, *output]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.rstrip().endswith("Nothing was written.")
    assert not list(tmp_path.iterdir())
    assert sorted(workspace.rglob("*")) == before
