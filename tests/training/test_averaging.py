"""BatchNorm's statistics over several processes."""

from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from harness.training.guard import StepGuard


@pytest.mark.parametrize("norm", [True, False])
def test_batch_norms_averages_are_written_back_in_one_call(monkeypatch, norm):
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.BatchNorm2d(2)]
    norms = layers[1:] if norm else []
    for k, layer in enumerate(norms):
        layer.running_mean.fill_(k + 1.0)
    calls = []

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(func.__name__)
            return func(*args, **(kwargs or {}))

    def reduced(flat):  # another process has three times as much of everything
        flat *= 4

    monkeypatch.setattr(torch.distributed, "all_reduce", reduced)
    guard = SimpleNamespace(_norms=norms, accelerator=SimpleNamespace(num_processes=2))
    with Calls():
        vector = StepGuard._average_over_processes(guard, torch.tensor([1.0, 2.0, 3.0, 5.0]))
    assert vector.tolist() == [2.0, 4.0, 6.0, 20.0]  # the last, of signals, is a sum
    assert [layer.running_mean.unique().tolist() for layer in norms] == [[2.0], [4.0]][: len(norms)]
    assert [layer.running_var.unique().tolist() for layer in norms] == [[2.0]] * len(norms)
    assert calls.count("copy_") == 0 and calls.count("_foreach_copy_") == int(norm)
