"""Every PEFT type: what is grafted is the delta that training made, dense and as an adapter where there is one."""

from __future__ import annotations

import pytest
from adapter_cases import CASES, MODELS, Case, Trained, adapter_delta, dense_delta, error, train

from shadow_trl import graft
from shadow_trl.errors import AdapterError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]
QUICK = (
    "LoRA, modules_to_save lm_head", "LoRA, trainable tokens", "LoRA, bias all", "LoRA, target_parameters",
    "LoRA, on embeddings", "LoRA, tied, on embeddings", "LoRA, PiSSA", "LoRA, OLoRA, start not saved",
    "LoRA, KaSA", "DoRA", "AdaLoRA", "VeRA", "IA3", "TinyLoRA",
)  # fmt: skip


def rows() -> list:
    """Every case on two of the models (the benchmark has all four); one model of the quick cases runs by default."""
    found = []
    for case in CASES:
        for kind, tied in (MODELS[0], MODELS[3]):
            if (kind, tied) not in case.models():
                continue
            quick = case.name in QUICK and (kind, tied) == (("llama", False) if case.untied_only else ("qwen3", True))
            name = f"{case.name} {kind} {'tied' if tied else 'untied'}"
            found.append(pytest.param(case, kind, tied, id=name, marks=() if quick else pytest.mark.slow))
    return found


def graft_both(case: Case, trained: Trained, folder) -> tuple[float, float | None]:
    """Return the relative error of the dense form, and of the adapter form where the case has one."""
    sides = {"base": trained.base, "instruct": trained.instruct, "tuned": trained.adapter, "progress": False}
    report = graft(**sides, output=folder / "dense", format="model")
    assert report.form == "model"
    found, wanted = dense_delta(folder / "dense", trained)
    dense = error(found, wanted)
    changed = {name for name, value in wanted.items() if bool(value.any())}
    assert report.grafted == len(changed)
    if not case.form:
        with pytest.raises(AdapterError, match=r"no exact adapter form(.|\n)*rank=R"):
            graft(**sides, output=folder / "result", format="adapter")
        assert not (folder / "result").exists()
        return dense, None
    assert graft(**sides, output=folder / "result", format="adapter").form == "adapter"
    return dense, error(adapter_delta(trained.instruct, folder / "result"), trained.delta)


@pytest.mark.parametrize(("case", "kind", "tied"), rows())
def test_both_forms_are_the_delta_of_training(case, kind, tied, tmp_path):
    case.require()
    dense, adapter = graft_both(case, train(case, tmp_path, kind=kind, tied=tied), tmp_path)
    assert dense <= 1e-6
    assert adapter is None or adapter <= 1e-6
