"""Evaluation: equal to a plain loop, every sample once, the same at any number of processes."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.data.stores import Samples
from harness.training.scoring import batch_starts, evaluate, score
from tricks.ema import ModelEma
from tricks.tta import tta_views

CPU = torch.device("cpu")


class Alone:
    """What evaluation uses of an Accelerator, in one process."""

    device, num_processes, process_index, is_main_process = CPU, 1, 0, True
    autocast = contextlib.nullcontext

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        return tensor


class OneOf(Alone):
    """Process `process_index` of several: `reduce` adds the partial sums of the others."""

    def __init__(self, process_index, num_processes, partials):
        self.process_index, self.num_processes = process_index, num_processes
        self.partials = partials

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        self.partials[self.process_index] = tensor.clone()
        return sum(self.partials.values())


class Network(nn.Module):
    """Three classes from 4×6 pixels, with BatchNorm, one frozen, and Dropout."""

    def __init__(self):
        super().__init__()
        self.frozen, self.norm = nn.BatchNorm2d(3), nn.BatchNorm1d(5)
        self.first, self.dropout, self.head = nn.Linear(72, 5), nn.Dropout(0.5), nn.Linear(5, 3)

    def forward(self, images):
        hidden = self.norm(self.first(self.frozen(images).flatten(1)))
        return self.head(self.dropout(hidden))


def prepare(images):
    return images.float() / 255


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = Network()
    for norm in (network.frozen, network.norm):  # statistics that matter
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    network.frozen.eval()
    return network


def make_split(n):
    rng = torch.Generator().manual_seed(n)
    stored = torch.randint(0, 256, (n + 7, 3, 4, 6), generator=rng, dtype=torch.uint8)
    rows = torch.randperm(n + 7, generator=rng)[:n]
    return Samples(stored, rows, torch.randint(0, 3, (n,), generator=rng))


def modes(network):
    return {name: module.training for name, module in network.named_modules()}


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 513])
def test_evaluate_equals_a_plain_loop(network, n):
    split = make_split(n)
    got = evaluate(Alone(), network, split, prepare)

    network.eval()
    loss, correct = 0.0, 0
    for row, label in zip(split.rows, split.labels, strict=True):
        logits = network(prepare(split.stored[row : row + 1]))
        loss += F.cross_entropy(logits, label.view(1)).item()
        correct += logits.argmax(1).item() == label.item()
    assert got == {"acc": correct / n, "loss": pytest.approx(loss / n, rel=1e-6)}


def test_every_sample_is_seen_once(network):
    split, seen = make_split(513), []

    def watch(images):
        seen.append(images)
        return prepare(images)

    evaluate(Alone(), network, split, watch)
    assert [len(images) for images in seen] == [256, 256, 1]
    assert torch.equal(torch.cat(seen), split.stored[split.rows])


@pytest.mark.parametrize("n", [1, 511, 513, 1025, 2500])
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_bits(network, n, processes):
    split, partials = make_split(n), {}
    for index in range(processes):
        with contextlib.suppress(AssertionError):  # the others' partial sums are not there yet
            evaluate(OneOf(index, processes, partials), network, split, prepare)
    counts = torch.stack(list(partials.values()))[:, :, 2]
    assert (counts.count_nonzero(dim=0) == 1).all() and counts.sum() == n
    alone = evaluate(Alone(), network, split, prepare)
    for index in range(processes):
        accelerator = OneOf(index, processes, dict(partials))
        assert evaluate(accelerator, network, split, prepare) == alone


def test_every_module_gets_its_own_mode_back(network):
    before = modes(network)
    assert not before["frozen"] and before["norm"] and before["dropout"] and before[""]
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first = evaluate(Alone(), network, make_split(33), prepare)
    assert modes(network) == before
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name  # no batch statistics were taken in
    assert evaluate(Alone(), network, make_split(33), prepare) == first  # and no dropout

    network.eval()
    evaluate(Alone(), network, make_split(33), prepare)
    assert not any(modes(network).values())


def test_score_uses_the_averaged_weights_and_gives_the_raw_ones_back(network):
    split = make_split(200)
    ema = ModelEma(network, decay=0.9)
    with torch.no_grad():
        for tensor in [*network.parameters(), network.norm.running_mean]:
            tensor.add_(torch.randn_like(tensor))
    ema.update(network, step=3)
    raw = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    before = modes(network)

    scores = score(network, ema, lambda: evaluate(Alone(), network, split, prepare))

    assert modes(network) == before
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, raw[name]), name
    averaged = Network()
    averaged.load_state_dict(ema.state_dict(), strict=False)
    assert scores == {
        **evaluate(Alone(), network, split, prepare),
        **{f"{k}_ema": v for k, v in evaluate(Alone(), averaged, split, prepare).items()},
    }
    assert scores["loss"] != scores["loss_ema"]


def test_score_without_an_average(network):
    split = make_split(9)
    plain = evaluate(Alone(), network, split, prepare)
    assert score(network, None, lambda: evaluate(Alone(), network, split, prepare)) == plain


def test_batches_are_of_as_many_images_as_have_so_many_pixels():
    def sizes(pixels):
        split = Samples(torch.empty(600, 3, pixels, pixels, dtype=torch.uint8), None, range(600))
        return list(batch_starts(split))

    assert sizes(32) == [0, 256, 512]
    assert sizes(128) == [0, 128, 256, 384, 512]
    assert sizes(224) == list(range(0, 600, 64))
    features = Samples(torch.empty(600, 2, 2048), None, range(600))
    assert list(batch_starts(features)) == [0, 256, 512]


def test_several_views_are_averaged_by_their_weights(network):
    pixels = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8)
    split = Samples(pixels, torch.arange(40), torch.randint(0, 3, (40,)))
    network.first = nn.Linear(108, 5)
    views = tta_views("shift", 6)
    got = evaluate(Alone(), network, split, prepare, views)
    network.eval()
    with torch.no_grad():
        mean = sum(
            view.weight * network(prepare(view.apply(pixels, None))).softmax(1) for view in views
        )
    assert got["acc"] == (mean.argmax(1) == split.labels).sum().item() / 40
    assert got["loss"] == pytest.approx(F.nll_loss(mean.log(), split.labels).item(), abs=1e-5)
    assert got["loss"] != evaluate(Alone(), network, split, prepare)["loss"]
