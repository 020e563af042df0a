"""The pipeline of a graft: how a weight is cut into blocks, and what a graft takes of the machine."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from families import family

from shadow_trl import graft
from shadow_trl.checkpoints.checkpoint import Checkpoint, Place
from shadow_trl.grafting import blocks, stream
from shadow_trl.grafting.blocks import blocks_of
from shadow_trl.grafting.jobs import LowRank, WeightJob


def job(*shape: int, product: bool = False, delta: bool = True, runs=None) -> WeightJob:
    """A weight with a full delta, with a product, or with none; nothing of it is read."""
    place = Place(Checkpoint("model", None, None), "weight")
    low_rank = LowRank(place, place, 1.0, shape[-1]) if product else None
    return WeightJob("weight", "F32", shape, place, tuned=place if delta and not product else None, low_rank=low_rank,
                     runs=runs)  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "first", "last", "wanted"),
    [
        (job(20), 0, 20, [(0, 8, True), (8, 16, True), (16, 20, True)]),
        (job(20, delta=False), 3, 20, [(3, 11, False), (11, 19, False), (19, 20, False)]),
        # Of a product whole rows, where a block has room for one: no row of it is multiplied twice.
        (job(7, 3, product=True), 0, 21, [(0, 6, True), (6, 12, True), (12, 18, True), (18, 21, True)]),
        (job(7, 3, product=True), 4, 20, [(4, 12, True), (12, 20, True)]),
        (job(2, 10, product=True), 0, 20, [(0, 8, True), (8, 10, True), (10, 18, True), (18, 20, True)]),
        # Rows that are shared receive the delta, the others are copied.
        (job(10, runs=((3, 6), (8, 10))), 1, 9, [(1, 3, False), (3, 6, True), (6, 8, False), (8, 9, True)]),
        (job(30, runs=((20, 22),)), 0, 30,
         [(0, 8, False), (8, 16, False), (16, 20, False), (20, 22, True), (22, 30, False)]),
        (job(10, runs=((0, 2),)), 2, 10, [(2, 10, False)]),
    ],
)  # fmt: skip
def test_a_weight_is_cut_into_blocks(monkeypatch, weight, first, last, wanted):
    monkeypatch.setattr(blocks, "BLOCK", 8)
    assert list(itertools.islice(blocks_of(weight, first, last), 10)) == wanted


def test_a_chunk_is_whole_pages_of_any_system_and_small():
    assert stream.CHUNK % 2**16 == 0
    assert 2**20 <= stream.CHUNK <= 2**23  # one for each thread is in memory


def test_torch_has_as_many_threads_as_before(tmp_path):
    """In this thread and in one that begins later, which takes the number that was set last in any."""
    before, later = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        graft(**family(tmp_path), output=tmp_path / "out", digest="none", progress=False)
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *later] == [2, 2]
    finally:
        torch.set_num_threads(before)
