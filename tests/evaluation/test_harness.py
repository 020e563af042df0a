"""Tasks of lm-eval through a loaded model: the same rows are right as by our own scorer, for every form of a model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from repository import ROOT
from rows import write_rows
from tiny import make_pair
from transformers import AutoModelForCausalLM

from shadow_trl.cli import main
from shadow_trl.errors import ConfigError, InputError
from shadow_trl.evaluation.harness import harness_tasks
from shadow_trl.evaluation.models import load, tokenizer_and_ends
from shadow_trl.evaluation.scoring import read_rows, score
from shadow_trl.operations.graft import graft

HAS = pytest.mark.skipif("not __import__('importlib').util.find_spec('lm_eval')", reason="needs lm-eval (extra eval)")
FOLDER = str(ROOT / "recipes/eval")
INSTRUCT = str(ROOT / "data/nano-instruct")


def test_tasks_without_lm_eval_are_refused_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install 'shadow-trl\[eval\]'"):
        harness_tasks(["gsm8k"])
    assert harness_tasks([]) == ()


def hits(values: list[float]) -> list[bool]:
    return [value == 1.0 for value in values]


@pytest.mark.slow
@HAS
def test_the_harness_and_our_scorer_find_the_same_rows_right(tmp_path):
    """The plain model; a graft as an adapter by lm-eval's `peft=`, and dense as a loaded object."""
    from lm_eval import simple_evaluate

    adapter, forms = tmp_path / "lora", {}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(ROOT / "data/nano-base", dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned.save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(ROOT / "data/nano-base")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for form in ("adapter", "model"):
        forms[form] = tmp_path / form
        graft(instruct=INSTRUCT, base=ROOT / "data/nano-base", tuned=adapter, output=forms[form], format=form,
              scale=0.05, dtype="float32" if form == "model" else "auto", progress=False)  # fmt: skip
    tokenizer, ends = tokenizer_and_ends(INSTRUCT)
    wanted = read_rows(ROOT / "data/dpo-test.jsonl")
    seen = {}
    for kind in ("target", "t_rule"):
        (task,) = harness_tasks([f"nano_dpo:{kind}"], [FOLDER])
        places = [at for at, row in enumerate(wanted) if row["kind"] == kind][::15]
        task = replace(task, rows=(*places, len(wanted) - 1))  # the last one is a refusal, without this metric
        rows = [wanted[at] for at in places]
        for name, source in (("plain", INSTRUCT), ("dense", forms["model"])):
            model = load(source, dtype="float32")
            found = hits(task.values(model, tokenizer, 32))
            own = score(model, tokenizer, rows, max_new_tokens=16, eos_token_ids=ends).hits[kind]
            assert tuple(found) == own
            seen[name, kind] = found
        told = simple_evaluate(
            model="hf", model_args={"pretrained": INSTRUCT, "peft": str(forms["adapter"]), "dtype": "float32"},
            tasks=[task.task], samples={"nano_dpo": places}, apply_chat_template=True, batch_size=32, device="cpu",
            bootstrap_iters=0,
        )  # fmt: skip
        assert [one[kind] == 1.0 for one in told["samples"]["nano_dpo"]] == seen["dense", kind]
    assert any(seen["plain", "t_rule"])
    assert [seen["plain", kind] for kind in ("target", "t_rule")] != [
        seen["dense", kind] for kind in ("target", "t_rule")
    ]


TASK = {
    "task": "echo", "dataset_path": "json", "test_split": "test", "output_type": "generate_until",
    "doc_to_text": "{{question}}", "doc_to_target": "{{wanted}}", "num_fewshot": 0,
    "generation_kwargs": {"until": ["<|end|>"], "do_sample": False, "max_gen_toks": 1},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}  # fmt: skip


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A task whose answers INSTRUCT of a tiny pair gives to the even questions, in the current folder."""
    monkeypatch.chdir(tmp_path)
    make_pair(tmp_path, gap=0.5)
    model = load("instruct", dtype="float32")
    tokenizer, _ = tokenizer_and_ends("instruct")
    rows = []
    for at in range(24):
        prompt = [{"role": "user", "content": f"{at} a"}]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        told = tokenizer.decode(
            model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1:], skip_special_tokens=True
        )
        answer = told.strip() if at % 2 == 0 else "other"
        rows.append({"question": prompt[0]["content"], "wanted": answer, "prompt": prompt, "answer": answer})
    write_rows(tmp_path / "asked.jsonl", rows)
    write_rows(tmp_path / "rows.jsonl", [{name: row[name] for name in ("prompt", "answer")} for row in rows])
    (tmp_path / "own").mkdir()
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(tmp_path / "asked.jsonl")}}}
    (tmp_path / "own/echo.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


@pytest.mark.slow
@HAS
def test_compare_takes_tasks_as_metrics(own_task):
    words = ["--base", "base", "--instruct", "instruct", "--tuned", "base", "--scales", "1", "--max-new-tokens", "1"]
    data = ["--rows", "rows.jsonl", "--task", "echo", "--task-folder", "own", "--target", "echo", "--quiet"]
    assert main(["compare", *words, *data, "--output", "out"]) == 0
    content = json.loads(Path("out/comparison.json").read_text())
    assert content["metrics"]["echo"] == {"higher": True, "unit": "%"}
    right = {"echo": 0.0, "all": 0.0}
    for arm in content["arms"]:
        if arm["arm"] == "instruct":
            for name in right:
                # The splits of the task and of the rows are by other texts; all rows together are the same.
                size = {"echo": halves("echo")[arm["split"]], "all": arm["rows"] - halves("echo")[arm["split"]]}[name]
                right[name] += arm["scores"][name] * size / 100
    assert right["echo"] == pytest.approx(right["all"])
    assert right["echo"] >= 12


def halves(name: str) -> dict[str, int]:
    (task,) = harness_tasks([name], ["own"])
    first, second = task.halves()
    assert sorted((*first.rows, *second.rows)) == list(task.rows)
    return {"validation": len(first.rows), "test": len(second.rows)}


@pytest.mark.slow
@HAS
def test_a_task_that_cannot_be_taken_is_refused(own_task):
    Path("own/gone.yaml").write_text(
        yaml.safe_dump({**TASK, "task": "gone", "dataset_kwargs": {"data_files": "no.json"}})
    )
    for asked, said in (("echo:bleu", "exact_match"), ("echo:exact_match,last", "filters none")):
        with pytest.raises(ConfigError, match=said):
            harness_tasks([asked], ["own"])
    with pytest.raises(InputError, match="cannot load the task gone"):
        harness_tasks(["gone"], ["own"])


@pytest.mark.slow
@HAS
def test_a_head_of_its_own_stays_apart_from_its_embedding(own_task):
    """lm-eval ties again what the configuration ties."""
    from shadow_trl.evaluation.harness import _served

    model = load("instruct", dtype="float32")
    model.config.tie_word_embeddings = True
    head = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.lm_head.weight = head
    tokenizer, _ = tokenizer_and_ends("instruct")
    assert _served(model, tokenizer, 4).model.lm_head.weight is head


@pytest.mark.slow
@HAS
def test_the_shipped_groups_name_tasks_of_lm_eval():
    import re

    import lm_eval

    tasks = Path(lm_eval.__file__).parent / "tasks"
    roots = (
        "aime arc bbh benchmarks drop gpqa gsm8k hendrycks_math humaneval ifeval minerva_math mmlu mmlu_pro winogrande"
    )
    text = "\n".join(path.read_text() for root in roots.split() for path in (tasks / root).rglob("*.y*ml"))
    text += "".join(f"\ntask: {path.stem}" for path in Path(FOLDER).glob("*.yaml"))
    for group in Path(FOLDER).glob("*.yaml"):
        content = group.read_text()
        if content.count("\ngroup: "):
            for name in yaml.safe_load(content)["task"]:
                assert re.search(rf"^(task|group|tag|  *-) *:? *['\"]?{name}['\"]?$", text, re.M), name


@pytest.mark.slow
@HAS
def test_svamp_is_read_as_its_authors_wrote_it(tmp_path):
    from lm_eval.tasks import TaskManager

    row = {"ID": "x", "Body": " Ann has 7 pens", "Question": "How many?", "Equation": "7.0", "Answer": 7.0, "Type": "t"}
    (tmp_path / "svamp.json").write_text(json.dumps([row]))
    known = TaskManager(include_path=FOLDER, include_defaults=False)
    files = {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "svamp.json")}}}
    task = known.load([{**yaml.safe_load(Path(FOLDER, "svamp.yaml").read_text()), **files}])["tasks"]["svamp"]
    (doc,) = task.eval_docs
    assert task.doc_to_text(doc).startswith("Ann has 7 pens How many?\n")
    assert str(task.doc_to_target(doc)) == "7"
