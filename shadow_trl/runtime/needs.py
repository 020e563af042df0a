"""What a training takes of GPUs, hosts and disks, worked out from the sizes of its model.

docs/scale.md has the formulae in words, and its tables are made with this.
"""

from __future__ import annotations

from dataclasses import dataclass

GPU, USED = 80e9, 0.8
"""Bytes of a GPU where nothing else is said, and the share of them that a run may take."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model.

    Args:
        weights: of the whole model; a tied head counts once.
        block: weights of one layer.
        layers: how many there are.
        hidden: width of a layer's input.
        inner: width inside the MLP; of experts, of those that one token goes through.
        heads: width of all query and key heads together.
    """

    weights: int
    block: int
    layers: int
    hidden: int
    inner: int
    heads: int

    @property
    def outside(self) -> int:
        """Weights outside the layers: embeddings, head, last norm."""
        return self.weights - self.layers * self.block


@dataclass(frozen=True)
class Needs:
    """One model, trained in one way with one row a GPU under FSDP2, with AdamW and activation checkpointing.

    Args:
        shape: of the model.
        trained: weights that are trained: all in full fine-tuning, else those of the adapter.
        is_full: whether it is full fine-tuning.
        size: bytes in which a weight is loaded.
        tokens: of a row; of DPO those of both its sequences.
        has_reference: whether the values of a reference are computed before training.
    """

    shape: Shape
    trained: int
    is_full: bool
    size: int
    tokens: int
    has_reference: bool

    def state(self, gpus: int) -> float:
        """Bytes a GPU of weights, gradients and AdamW's moments."""
        frozen = 0 if self.is_full else self.size * self.shape.weights
        return (frozen + 16 * self.trained) / gpus

    def gathered(self, gpus: int, *, trains: bool) -> float:
        """Bytes a GPU of bf16 weights in whole, and their gradients; on one GPU the casts of fp32 weights."""
        if gpus == 1:
            return 2 * self.shape.weights if self.size == 4 else 0
        weights = self.shape.outside + 2 * self.shape.block
        gradients = self.shape.outside + self.shape.block if trains and self.is_full else 0
        return 2 * (weights + gradients)

    def activations(self) -> float:
        """Bytes a GPU of what a step keeps: the input of each layer, and the inside of the one that is recomputed."""
        inside = 16 * self.shape.hidden + 4 * self.shape.heads + 8 * self.shape.inner
        return self.tokens * (2 * self.shape.hidden * self.shape.layers + inside)

    def training(self, gpus: int) -> float:
        """Bytes a GPU while training."""
        return self.state(gpus) + self.gathered(gpus, trains=True) + self.activations()

    def reference(self, gpus: int) -> float:
        """Bytes a GPU while the reference values are computed: with one GPU the policy is there too."""
        models = 2 if gpus == 1 else 1
        weights = models * self.size * self.shape.weights / gpus
        return weights + self.gathered(gpus, trains=False) + self.activations()

    def memory(self, gpus: int) -> float:
        """The larger of both; without a reference that of training."""
        return max(self.training(gpus), self.reference(gpus) if self.has_reference else 0)

    def gpus_of(self, memory: float) -> int | None:
        """Return the smallest power of two of GPUs with `memory` bytes that leaves enough of each free.

        None where none does: activations and gathered weights are on each, however many there are.
        """
        return next((2**power for power in range(16) if self.memory(2**power) <= USED * memory), None)

    @property
    def host(self) -> float:
        """Bytes of the first machine: one process loads whole models there."""
        models = 2 if self.has_reference else 1
        return models * self.size * self.shape.weights

    def disk(self) -> dict[str, float]:
        """Bytes of each folder, with models of 16 bits."""
        weights, trained = self.shape.weights, self.trained
        return {
            "BASE": 2 * weights,
            "INSTRUCT": 2 * weights,
            "TUNED": 4 * trained,
            "checkpoint": 12 * trained,
            "graft": 2 * weights if self.is_full else 4 * trained,
        }


def gigabytes(size: float) -> str:
    """Return a size in GB of 10^9 bytes with at least two digits, or three.

    >>> gigabytes(1.234e9), gigabytes(2.5e11)
    ('1.2', '250')
    """
    return f"{size / 1e9:.0f}" if size >= 1e10 else f"{size / 1e9:.2g}"
