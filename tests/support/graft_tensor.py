"""A graft of whole tensors, by the arithmetic of the product."""

from __future__ import annotations

from typing import Any

import torch

from shadow_trl.arithmetic.grafter import BlockGrafter, array_of


def graft_tensor(
    instruct: torch.Tensor,
    base: torch.Tensor,
    tuned: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    name: str = "",
    **options: Any,
) -> torch.Tensor:
    grafted = instruct.new_empty(instruct.shape, dtype=dtype)
    grafter = BlockGrafter(stats=False, **options)
    grafter.graft(*map(array_of, (grafted, instruct, base, tuned)), name=name)
    return grafted
