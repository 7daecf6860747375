"""Recorded steps, by a stand-in for a CUDA graph: it runs the same function on the same tensors again."""

import pytest
import torch

from test_compare import Scheduled, options
from weightnorm.compare import run
from weightnorm.compare.loop import Comparison
from weightnorm.compare.step import WARM_UP, Recorded


class Graph:
    """Notes what is recorded; a replay reads and writes the tensors that it was recorded with, and no others."""

    def __init__(self):
        self.recorded, self.replayed = 0, 0

    def __call__(self, function):
        self.recorded += 1
        result = None

        def replay():
            nonlocal result
            self.replayed += 1
            now = function()
            result = now if result is None else result.copy_(now)
            return result

        return replay


def test_a_recorded_step_sees_each_batch_and_keeps_each_result():
    seen, graph = [], Graph()

    def take(x, y):
        seen.append((x.data_ptr(), y.data_ptr()))
        return x.sum() + y

    step = Recorded(take, graph)
    batches = [(torch.full((3,), float(i)), torch.tensor(10.0 * i)) for i in range(7)]
    found = [step(*batch) for batch in batches]
    assert [value.item() for value in found] == [13.0 * i for i in range(7)]
    assert (graph.recorded, graph.replayed) == (1, 7 - WARM_UP)
    assert len(set(seen[WARM_UP:])) == 1


@pytest.mark.parametrize("arm", ["plain", "weight_norm"])
def test_a_run_of_recorded_steps_is_the_same_and_records_anew_when_the_betas_change(monkeypatch, arm):
    eager = Comparison(Scheduled(), options([arm], 3))
    eager.train()
    graph = Graph()
    monkeypatch.setattr(run, "Recorded", lambda take: Recorded(take, graph))
    recorded = Comparison(Scheduled(), options([arm], 3))
    recorded.prepare()
    (one,) = recorded.runs
    one._records = True
    one._step = Recorded(one._take_step, graph)
    monkeypatch.setattr(
        one, "_prepare_step", lambda: setattr(one, "_step", Recorded(one._take_step, graph))
    )  # without capturable, which needs a GPU
    recorded.train()
    assert [epoch.step_loss for epoch in one.epochs] == [epoch.step_loss for epoch in eager.runs[0].epochs]
    assert graph.recorded == 3  # the schedule has other betas in each epoch


def test_bfloat16_is_of_forward_and_backward_alone():
    found = {}
    for precision in ("fp32", "bf16"):
        comparison = Comparison(Scheduled(), options(["plain"], 2, precision=precision))
        comparison.train()
        found[precision] = comparison.runs[0]
    assert {p.dtype for p in found["bf16"].model.parameters()} == {torch.float32}
    losses = [run.epochs[1].train["loss"] for run in found.values()]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
