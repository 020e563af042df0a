"""KTO, GRPO, RLOO, CPO and ORPO in two processes, under any engine: as TRL, and with references worked out by hand."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from other_trainers import (
    KINDS,
    check_sum,
    data_of,
    generated_log_probabilities,
    kto_by_hand,
)
from peft import PeftModel
from ranks import in_processes
from releases import has
from stages import weights
from transformers import AutoModelForCausalLM, AutoTokenizer

Pair = tuple[Path, Path]
# Without being told to, TRL leaves the shards of ZeRO-3 as they are.
_GATHERS = {"stage3_gather_16bit_weights_on_model_save": True}
_FROZEN = "layers.0."
_ONE = {"max_steps": 1, "graft": False}


def _run(engine: str, pair: Pair, folder: Path, cases: dict[str, Any]) -> list[dict[str, Any]]:
    """Run the cases in two processes under `engine`; return what each process saw."""
    if not has("trl", "1.16"):
        pytest.skip("TRL 1.16: older ones are refused, as tests/training/test_older.py shows")
    given = (engine, tuple(map(str, pair)), str(folder), cases)
    ends = in_processes(engines.run_each, *given, limit=300)
    assert [end.error for end in ends] == ["", ""]
    return [end.value for end in ends]


def check_as_trl(engine: str, pair: Pair, folder: Path, *, full: Collection[str], adapted: Collection[str]) -> None:
    """Check that each kind leaves the TUNED of TRL under `engine`, with its losses, and that the graft is the sum.

    So does SFT with a frozen layer, which is that of BASE in TUNED and that of INSTRUCT in the graft.

    Args:
        engine: of `engines.run`.
        pair: BASE and INSTRUCT.
        folder: of the runs.
        full: kinds that train all weights.
        adapted: kinds that train a LoRA.
    """
    kinds: dict[str, tuple[str, dict[str, Any]]] = {kind: (kind, {"lora": kind in adapted}) for kind in KINDS}
    kinds = {kind: case for kind, case in kinds.items() if kind in (*full, *adapted)}
    kinds["frozen"] = ("sft", {"freeze": _FROZEN})
    cases: dict[str, Any] = {}
    for name, (kind, how) in kinds.items():
        cases[f"{name}-plain"] = (kind, {**how, "plain": True, "zero": _GATHERS})
        cases[name] = (kind, {**how, "graft_scale": 0.5, "graft_dtype": "float32", "graft_format": "model"})
    seen = _run(engine, pair, folder, cases)[0]
    for name in kinds:
        ours, plain = seen[name], seen[f"{name}-plain"]
        assert engines.weights(folder / name) == engines.weights(folder / f"{name}-plain") != {}, name
        assert (ours["logged"], ours["generated"]) == (plain["logged"], plain["generated"])
        check_sum(pair, folder / name, 0.5)
    base, instruct, tuned, grafted = map(weights, (*pair, folder / "frozen", folder / "frozen/grafted"))
    for name in base:
        frozen = _FROZEN in name
        assert torch.equal(tuned[name], base[name]) == frozen
        assert torch.equal(grafted[name], instruct[name]) == frozen


def check_references(engine: str, pair: Pair, start: Path, folder: Path) -> None:
    """Check the references of KTO, GRPO and RLOO under `engine` by hand: INSTRUCT, and the graft of an adapter.

    Args:
        engine: of `engines.run`.
        pair: BASE and INSTRUCT.
        start: folder of an earlier run on that pair, an adapter, that the second stages start from.
        folder: of the runs.
    """
    second = {"pair": (str(start), str(pair[1])), "ref_policy": "grafted"}
    generates = {"temperature": 0.7, "beta": 0.5, **_ONE}
    cases = {
        "KTO": ("KTO", {"ref_policy": "instruct", "beta": 2.0, **_ONE}),
        "KTO in memory": ("KTO", {"beta": 2.0, "precompute_ref_log_probs": False, **second, **_ONE}),
        "GRPO": ("GRPO", {"ref_policy": "instruct", **generates}),
        "RLOO": ("RLOO", {**second, **generates}),
    }
    seen = _run(engine, pair, folder, cases)
    base, instruct = map(_load, pair)
    # A plain LoRA on INSTRUCT is its graft.
    policy, grafted = (
        PeftModel.from_pretrained(_load(side), str(start), autocast_adapter_dtype=False) for side in pair
    )
    tokenizer, rows = AutoTokenizer.from_pretrained(pair[1]), data_of("KTO", 4)
    for name, models in (("KTO", (base, instruct)), ("KTO in memory", (policy, grafted))):
        # The two rows of a process are each other's pairs in the KL term.
        loss, kl = kto_by_hand(models, tokenizer, rows, beta=2.0, batch=2)
        logged = seen[0][name]["logged"][0]
        assert (logged["loss"], logged["kl"]) == pytest.approx((loss, kl), abs=1e-6)
        assert abs(loss - 0.5) > 1e-4  # or a wrong reference would not be seen
        assert seen[0][name]["reference"] == (name != "KTO")
    for kind, models in (("GRPO", (base, instruct)), ("RLOO", (policy, grafted))):
        generated = [process[kind]["generated"][0] for process in seen]
        batches = [{key: torch.tensor(value) for key, value in batch.items()} for batch in generated]
        _check_kl(kind, batches, *models, logged=seen[0][kind]["logged"][0]["kl"])


def _load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def _check_kl(kind: str, batches: list[dict[str, torch.Tensor]], policy: Any, reference: Any, *, logged: float) -> None:
    total, count = 0.0, 0
    for batch in batches:
        ours, other = (generated_log_probabilities(model, batch, 0.7) for model in (policy, reference))
        mask, gap = batch["completion_mask"], other - ours
        terms = gap.exp() - gap - 1 if kind == "GRPO" else -gap
        total, count = total + (terms * mask).sum().item(), count + int(mask.sum())
        if kind == "GRPO":
            found = batch["ref_per_token_logps"].double() * mask
            torch.testing.assert_close(found, other * mask, rtol=0, atol=2e-6)
    assert logged == pytest.approx(total / count, abs=1e-6)
    assert abs(total / count) > 1e-5  # or a wrong reference would not be seen
