"""The linear probe: its numbers, which images it reads, where a head may start from it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from harness.counters import generator
from harness.data.stores import Samples
from harness.models import build
from harness.models.heads import start_heads
from harness.training import plan, probe


def blobs(n, classes=4, width=20, noise=2.0, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(classes, width)) * 2
    labels = rng.integers(0, classes, n)
    x = centres[labels] + rng.normal(size=(n, width)) * noise
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


def test_the_probe_is_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = blobs(200)
    new, _ = blobs(50, seed=3)
    std, mean = x.double().std(0, correction=0), x.double().mean(0)
    theirs = linear_model.LogisticRegression(C=1.0, max_iter=2000, tol=1e-10)
    theirs.fit(((x - mean) / std).numpy(), labels.numpy())
    ours = probe.linear_probe(x, labels, 4)
    wanted = theirs.predict_proba(((new - mean) / std).numpy())
    np.testing.assert_allclose(ours(new.double()).softmax(1).detach(), wanted, atol=1e-4)
    # Another start leads to the same place
    some = probe.linear_probe(x[:100], labels[:100], 4)
    again = probe.linear_probe(x, labels, 4, some)(new.double()).softmax(1)
    np.testing.assert_allclose(again.detach(), wanted, atol=1e-4)


def test_a_feature_that_hardly_varies_has_no_say():
    x, labels = blobs(100)
    x[:, 0] = 3.0
    x[:, 1] = 5.0 + 1e-4 * labels  # it would tell all, in digits that bf16 does not have
    weight = probe.linear_probe(x, labels, 4).weight
    assert weight.isfinite().all() and not weight[:, :2].any() and weight[:, 2:].all()


# -- of a network --------------------------------------------------------------------------------


class Alone:
    """What the probe uses of an Accelerator."""

    device, is_local_main_process, is_main_process = torch.device("cpu"), False, True
    process_index, num_processes = 0, 1

    def autocast(self):
        return torch.autocast("cpu", enabled=False)


class Plain:
    """Views of samples that are features already."""

    def evaluation(self, images):
        return images


def network(width=20, classes=4):
    """Its last layer sees the pixels as they are."""
    return nn.Sequential(nn.Identity(), nn.Linear(width, classes))


def samples(x, labels):
    """Stored in another order than they are used."""
    return Samples(x.flip(0), torch.arange(len(x)).flip(0), labels)


def fitted(train, val=None, width=20, **flags):
    splits = {"train": train} | ({"val": val} if val else {})
    known = flags.pop("known", {})
    return probe.fit_probe(Alone(), network(width), splits, Plain(), 4, 0, known, **flags)


def test_it_is_scored_on_what_it_was_not_fitted_to():
    easy = samples(*blobs(400, noise=0.5))
    seen = fitted(easy)
    assert seen.accuracy > 0.95 and seen.text.endswith("% of 80 held-out train images")
    noise = torch.randn(200, 150, generator=generator(0, "noise"))
    # 150 numbers fit 160 images of pure noise perfectly; held-out images tell
    assert fitted(samples(noise, torch.arange(200) % 4), width=150).accuracy < 0.5
    val = samples(*blobs(100, noise=0.5, seed=5))
    seen = fitted(easy, val)
    assert seen.accuracy > 0.95 and seen.text.endswith("of 100 val images")
    assert fitted(easy, val._replace(labels=(val.labels + 1) % 4)).accuracy < 0.05


def test_the_head_gets_what_all_images_say():
    """What was held out to score the probe is fitted to afterwards."""
    x, labels = blobs(100)
    both = [fitted(samples(x, labels)).layer, probe.linear_probe(x, labels, 4)]
    np.testing.assert_allclose(both[0].weight, both[1].weight.detach(), atol=1e-4)


@pytest.mark.parametrize(("all_images", "read"), [(False, 50 + 40), (True, 400 + 100)])
def test_it_reads_only_the_images_it_needs(monkeypatch, all_images, read):
    """Unless a stage will want the features of all."""
    monkeypatch.setattr(probe, "IMAGES", 50)
    counted, known = [], {}
    taken = Samples.take
    monkeypatch.setattr(
        Samples, "take", lambda self, i, device: counted.append(len(i)) or taken(self, i, device)
    )
    val = samples(*blobs(100 if all_images else 40, seed=5))
    fitted(samples(*blobs(400)), val, known=known, all_images=all_images)
    assert sum(counted) == read
    assert bool(known) == all_images or len(val.labels) == 40


# -- and its head --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "can"),
    [
        ("shufflenet_v2_x0_5", {}, True),
        ("shufflenet_v2_x0_5", {"dropout": 0.5}, True),
        ("shufflenet_v2_x0_5", {"head": "mlp"}, False),
        ("vgg11", {}, True),  # a ReLU and a dropout stand between the features kept and the head
        ("squeezenet1_1", {}, False),
        ("deit_tiny_distilled_patch16_224", {}, False),
        ("convnext_pico", {}, True),
        ("test_vit", {}, True),
    ],
)
def test_where_a_head_can_start_from_it(name, flags, can):
    size = 32
    model = build.build_model(name, 4, image_size=size, stem="standard", **flags)
    start_heads(model, size)  # a zero head must not deceive
    assert probe.can_start_from_probe(model, size) is can
    if not can:
        return
    rng = generator(0, "images")
    x = torch.randint(0, 256, (40, 3, size, size), dtype=torch.uint8, generator=rng)
    split = Samples(x, torch.arange(40), torch.arange(40) % 4)
    views = SimpleNamespace(evaluation=lambda images: images.float() / 255)
    seen = probe.fit_probe(Alone(), model, {"train": split}, views, 4, 0, {})
    probe.start_from_probe(model, seen)
    with torch.no_grad():
        logits = model.eval()(x / 255)
    assert (logits.argmax(1) == split.labels).float().mean() > 0.6  # of images it was fitted to


@pytest.mark.parametrize(("accuracy", "told"), [(0.91, True), (0.93, False), (None, False)])
def test_a_result_well_under_the_probe_is_told(accuracy, told):
    summary = {"accuracy": accuracy, "probe": {"accuracy": 0.95, "of": "val"}}
    line = plan.under_probe(summary)
    assert bool(line) == told
    if told:
        assert "4.0 points under a linear probe" in line and "95.0% of val images" in line
    assert plan.under_probe({"accuracy": 0.5}) == ""
