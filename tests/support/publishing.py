"""One process of a run that publishes its graft; called in each of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hub_server import client
from runs import sft

from shadow_trl.errors import ShadowError


def run(rank: int, base: str, instruct: str, output: str, url: str) -> dict[str, Any]:
    """Train, graft, and upload twice: to a branch that the hub refuses, and to another."""
    with client(SimpleNamespace(url=url)):  # type: ignore[arg-type]
        trainer = sft((base, instruct), output, push_to_hub=True, max_steps=1)  # type: ignore[arg-type]
        assert trainer.accelerator.num_processes == 2
        trainer.args.push_to_hub = False
        trainer.train()
        try:
            trainer.push_to_hub(revision="refused")
            refused = ""
        except ShadowError as error:
            refused = str(error)
        commit = trainer.push_to_hub(revision="taken")
        return {"refused": refused, "commit": commit and commit.oid, "id": trainer.hub_model_id}
