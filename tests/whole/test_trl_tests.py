"""The command that runs TRL's own tests on the Shadow trainers: what it calls a fault, and that it would notice one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

FOLDER = ROOT / "benchmarks/trl_tests"
REFUSALS = {"refused": {"error": "may not", "reason": "it must not"}}

TESTS = '''
import pytest
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer


def test_models_and_data_are_at_hand():
    model = AutoModelForCausalLM.from_pretrained("trl-internal-testing/tiny-Qwen2ForCausalLM-2.5")
    assert model.config.model_type == "qwen2"
    data = load_dataset("trl-internal-testing/zen", "standard_language_modeling", split="train[:3]")
    assert data.column_names == ["text"] and len(data) == 3


def test_of_ours(tmp_path):
    """Passes with ours alone: TRL's has no such argument."""
    data = load_dataset("trl-internal-testing/zen", "standard_language_modeling", split="test")
    args = SFTConfig(output_dir=str(tmp_path), report_to="none", graft_scale=0.5)
    trainer = SFTTrainer(model="trl-internal-testing/tiny-Qwen2ForCausalLM-2.5", args=args, train_dataset=data)
    assert trainer.origins.instruct.source == trainer.origins.base.source + "-instruct"


def test_refused(tmp_path):
    SFTConfig(output_dir=str(tmp_path), bf16=False, graft_scale=float("inf"))


def test_of_trl_alone():
    assert SFTConfig.__name__ == "SFTConfig"


def test_of_nobody():
    assert 1 + 1 == 3, "sums are wrong"


@pytest.mark.skip
def test_skipped():
    raise AssertionError
'''


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(FOLDER)
    import verdicts

    return verdicts


@pytest.mark.parametrize(
    ("test", "ours", "theirs", "fault"),
    [
        ("plain", "passed", None, None),
        ("plain", "skipped", None, None),
        ("plain", "failed", "failed", None),
        ("plain", "failed", "passed", "it may not"),
        ("plain", "failed", "skipped", "it may not"),
        ("plain", "failed", None, "it may not"),
        ("refused", "failed", None, None),
        ("refused", "passed", None, "take it from the list"),
        ("refused", "other", None, "failed with: something else"),
    ],
)
def test_a_test_that_fails_with_ours_alone_is_a_fault(verdicts, test, ours, theirs, fault) -> None:
    error = {"failed": "it may not", "other": "something else"}.get(ours, "")
    outcome = verdicts.Outcome("failed" if ours == "other" else ours, error)
    beside = {} if theirs is None else {test: verdicts.Outcome(theirs, "theirs")}
    refusals = {name: verdicts.Refusal(**one) for name, one in REFUSALS.items()}
    found = verdicts.verdicts({test: outcome, "another": verdicts.Outcome("passed")}, beside, refusals)
    assert found.exit_code == int(fault is not None)
    assert list(found.faults) == ([test] if fault else [])
    assert fault is None or fault in found.text(trl="1", checkout="c")


def test_that_nothing_passed_is_a_fault(verdicts) -> None:
    assert verdicts.verdicts({}, {}, {}).exit_code == 1
    assert verdicts.verdicts({"one": verdicts.Outcome("skipped")}, {}, {}).exit_code == 1


def test_every_refusal_says_why() -> None:
    for test, refusal in json.loads((FOLDER / "refusals.json").read_text()).items():
        assert test.startswith(("tests/test_sft_trainer.py::", "tests/test_dpo_trainer.py::"))
        assert refusal.keys() == {"error", "reason"}
        assert all(refusal.values())


@pytest.mark.slow
def test_a_checkout_is_run_with_ours_and_what_fails_with_trls(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    file = "tests/test_sft_trainer.py"
    (tmp_path / file).write_text(TESTS)
    (tmp_path / "refusals.json").write_text(
        json.dumps({f"{file}::test_refused": {"error": "graft_scale must be a finite", "reason": "so it is"}})
    )
    command = [sys.executable, str(FOLDER), "--checkout", str(tmp_path), "--refusals", str(tmp_path / "refusals.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1, done.stderr[-3000:]
    found = done.stdout
    counted, refused, neither, alone = found.split("\n\n")
    for number in ("2 passed", "1 skipped", "1 refused", "1 failed with TRL's own", "1 failed with ours alone"):
        assert number in counted
    assert f"{file}::test_refused\n    so it is" in refused
    assert f"{file}::test_of_nobody\n    AssertionError: sums are wrong" in neither
    assert f"{file}::test_of_trl_alone" in alone
