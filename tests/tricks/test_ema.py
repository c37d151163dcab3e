"""The averaged weights: against a slow loop, torch's AveragedModel, and the raw weights' bits."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim import swa_utils

from tricks.ema import ModelEma, decay_at, half_life


def make_model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 2 * 4, 7)
        )


def train_a_step(model, seed, size=0.1):
    """Moves every parameter, and BatchNorm's statistics by a forward pass in training mode."""
    generator = torch.Generator().manual_seed(seed)
    model.train()(torch.randn(5, 3, 4, 6, generator=generator) * 2 + 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


class Attention(nn.Module):
    """Has what a forward pass reads and `state_dict` leaves out, as Swin's and EVA's blocks."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("index", torch.arange(4), persistent=False)
        self.register_buffer("mask", torch.tensor([0.0, 1.0, 2.0, 3.0]), persistent=False)

    def forward(self, x):
        return self.norm(self.embed(x) + self.head(x)) * self.mask + self.index


def assert_same_bits(left, right):
    assert left.keys() == right.keys() and left
    for name in left:
        assert torch.equal(left[name], right[name]), name


# --- the decay ----------------------------------------------------------------------------------


def test_decay_table():
    steps = [0, 8, 80, 890, 8_990, 89_990, 10**9]
    expected = [0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.9999]
    assert [decay_at(step, 0.9999) for step in steps] == pytest.approx(expected, abs=1e-12)
    assert decay_at(80, 0.5) == 0.5
    with pytest.raises(ValueError, match="-1"):
        decay_at(-1, 0.9)


def test_half_life():
    assert 0.99 ** half_life(0.99) == pytest.approx(0.5)
    assert half_life(0.5) == pytest.approx(1.0)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, float("nan")])
def test_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=str(decay)):
        ModelEma(nn.Linear(1, 1), decay)
    with pytest.raises(ValueError, match=str(decay)):
        half_life(decay)


# --- the average --------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [True, False])
def test_equals_a_slow_loop(warmup):
    model = make_model()
    ema, expected = ModelEma(model, 0.9, warmup), tensors(model)
    for step in range(20):
        train_a_step(model, step)
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * tensor
            else:
                expected[name] = tensor.clone()
    averages = ema.state_dict()
    assert averages.keys() == expected.keys()
    for name, average in averages.items():
        torch.testing.assert_close(average, expected[name])
    assert averages["1.num_batches_tracked"] == 20


def test_equals_torchs_averaged_model():
    model = make_model()
    ema = ModelEma(model, 0.8, warmup=False)
    theirs = swa_utils.AveragedModel(
        model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8), use_buffers=True
    )
    theirs.update_parameters(model)  # its first update copies
    for step in range(10):
        train_a_step(model, step)
        ema.update(model, step)
        theirs.update_parameters(model)
    averages = ema.state_dict()
    for name, tensor in theirs.module.state_dict().items():
        if tensor.is_floating_point():  # theirs averages the counter, too
            torch.testing.assert_close(averages[name], tensor)


def test_equals_timms():
    timm_utils = pytest.importorskip("timm.utils", reason="parity with timm")
    model = make_model()
    ema, theirs = ModelEma(model, 0.8, warmup=False), timm_utils.ModelEmaV3(model, decay=0.8)
    for step in range(10):
        train_a_step(model, step)
        ema.update(model, step)
        theirs.update(model)
    assert_same_bits(ema.state_dict(), theirs.module.state_dict())


def test_stale_batch_norm_statistics_would_matter():
    """The initial statistics (0, 1) are far from those of inputs of mean 3."""
    model = make_model()
    ema = ModelEma(model, 0.9)
    for step in range(60):
        train_a_step(model, step, size=0.01)
        ema.update(model, step)
    images = torch.randn(64, 3, 4, 6, generator=torch.Generator().manual_seed(99)) * 2 + 3
    with ema.applied_to(model), torch.no_grad():
        model.eval()
        exact = functional.batch_norm(
            model[0](images), None, None, model[1].weight, model[1].bias, training=True
        )
        averaged = model[:2](images)
        model[1].reset_running_stats()
        stale = model[:2](images)
    # what is left is the lag of the running statistics themselves, at momentum 0.1
    assert (averaged - exact).abs().mean() < (stale - exact).abs().mean() / 5


def test_a_model_that_stands_still_is_its_own_average():
    model = make_model()
    ema, before = ModelEma(model, 0.9999), tensors(model)
    for step in range(50):
        ema.update(model, step)
    assert_same_bits(ema.state_dict(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_weights_are_averaged_in_fp32(dtype):
    model = nn.Linear(1, 1, bias=False).to(dtype)
    model.weight.data.fill_(1.0)
    ema = ModelEma(model, 0.999, warmup=False)
    model.weight.data.fill_(2.0)
    for step in range(100):
        ema.update(model, step)
    average = ema.state_dict()["weight"]
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(2 - 0.999**100, rel=1e-5)
    with ema.applied_to(model):
        assert model.weight.dtype == dtype
        assert model.weight.item() == average.to(dtype).item()
    assert model.weight.item() == 2.0


def test_tied_weights_are_held_and_updated_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    ema = ModelEma(model, 0.5, warmup=False)
    start = model[0].weight.detach().clone()
    model[0].weight.data += 1
    ema.update(model, 0)
    assert list(ema.tensors()) == ["0.weight"]
    with ema.applied_to(model):
        assert model[1].weight is model[0].weight
        torch.testing.assert_close(model[1].weight.detach(), start + 0.5)
    torch.testing.assert_close(model[0].weight.detach(), start + 1)


def test_without_a_step_updates_are_counted():
    model, other = make_model(), make_model()
    counted, told = ModelEma(model, 0.9), ModelEma(other, 0.9)
    for step in range(5):
        train_a_step(model, step)
        train_a_step(other, step)
        counted.update(model)
        told.update(other, step)
    assert_same_bits(counted.state_dict(), told.state_dict())
    told.update(other)  # goes on after the last step that was given
    counted.update(model, 5)
    assert_same_bits(counted.state_dict(), told.state_dict())


def test_naming_what_changes_gives_the_same_average():
    """Where the rest stands still; what is not named is not looked at."""
    model = make_model()
    head = ["4.weight", "4.bias"]
    named, whole = ModelEma(model, 0.9), ModelEma(model, 0.9)
    for step in range(3):
        with torch.no_grad():
            for name in head:
                model.get_parameter(name).add_(step + 0.5)
        named.update(model, step, head)
        whole.update(model, step)
    assert_same_bits(named.state_dict(), whole.state_dict())
    assert not torch.equal(named.state_dict()["4.bias"], model[4].bias)
    with torch.no_grad():
        model[0].weight.add_(1)
    before = {name: value.clone() for name, value in named.state_dict().items()}
    named.update(model, 3, head)
    assert torch.equal(named.state_dict()["0.weight"], before["0.weight"])
    with pytest.raises(KeyError):
        named.update(model, 4, ["4.wieght"])
    named.update(model, 4, [])


def test_the_model_may_replace_its_tensors():
    model = make_model()
    ema = ModelEma(model, 0.9)
    model.load_state_dict(tensors(make_model(seed=1)), assign=True)
    ema.update(model, 10**6)
    start, target = tensors(make_model()), tensors(model)
    for name, average in ema.state_dict().items():
        if average.is_floating_point():
            torch.testing.assert_close(average, 0.9 * start[name] + 0.1 * target[name])


def test_the_average_costs_no_gradient_and_keeps_the_layout():
    model = make_model().to(memory_format=torch.channels_last)
    ema = ModelEma(model, 0.9)
    ema.update(model, 0)
    assert not any(average.requires_grad for average in ema.state_dict().values())
    weight = ema._averages["0.weight"]
    assert weight.stride() == model[0].weight.stride()  # or foreach falls back to a slow loop


# --- lent to the model --------------------------------------------------------------------------


def moved_model_and_ema():
    model = make_model()
    ema = ModelEma(model, 0.9)
    for step in range(3):
        train_a_step(model, step)
        ema.update(model, step)
    return model, ema


def test_applied_to_lends_the_average_and_gives_the_raw_bits_back():
    model, ema = moved_model_and_ema()
    raw, averages = tensors(model), {k: v.clone() for k, v in ema.state_dict().items()}
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with ema.applied_to(model) as lent:
        assert lent is model
        assert_same_bits(tensors(model), averages)
        model.train()(torch.ones(5, 3, 4, 6))  # moves the running statistics
    assert_same_bits(tensors(model), raw)
    assert_same_bits(ema.state_dict(), averages)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_applied_to_gives_back_after_an_exception():
    model, ema = moved_model_and_ema()
    raw = tensors(model)
    with pytest.raises(KeyboardInterrupt), ema.applied_to(model):
        raise KeyboardInterrupt
    assert_same_bits(tensors(model), raw)


def test_gradients_and_optimizer_survive_an_evaluation():
    model, ema = moved_model_and_ema()
    model(torch.ones(5, 3, 4, 6)).sum().backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    with ema.applied_to(model):
        pass
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)


# --- saved --------------------------------------------------------------------------------------


def test_saved_and_loaded_equals_uninterrupted(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="the format of our checkpoints")
    model = make_model().to(memory_format=torch.channels_last)
    ema = ModelEma(model, 0.9)
    for step in range(10):
        if step == 5:
            safetensors.save_file(ema.state_dict(), tmp_path / "ema.safetensors")
            ema = ModelEma(make_model(seed=7), 0.9)
            ema.load_state_dict(safetensors.load_file(tmp_path / "ema.safetensors"))
        train_a_step(model, step)
        ema.update(model, step)

    through = make_model().to(memory_format=torch.channels_last)
    expected = ModelEma(through, 0.9)
    for step in range(10):
        train_a_step(through, step)
        expected.update(through, step)
    assert_same_bits(ema.state_dict(), expected.state_dict())


def moved_attention():
    torch.manual_seed(0)
    model = Attention()
    ema = ModelEma(model, 0.5, warmup=False)
    with torch.no_grad():
        model(torch.randn(5, 3))
        model.embed.weight += 1
        model.mask += 2
    ema.update(model)
    return model, ema


def test_a_model_takes_the_state_though_it_has_ties_and_buffers_of_no_state():
    model, ema = moved_attention()
    state = ema.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)  # as safetensors
    before = {name: tensor.clone() for name, tensor in state.items()}
    model.load_state_dict(state)
    assert_same_bits(tensors(model), before)
    assert model.head.weight is model.embed.weight
    assert not torch.equal(model.mask, ema.tensors()["mask"])  # averaged, for `applied_to`
    with ema.applied_to(model):
        assert torch.equal(model.mask, torch.tensor([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("given", ["state_dict", "tensors"])
def test_either_form_is_loaded(given):
    _, ema = moved_attention()
    fresh = ModelEma(Attention(), 0.5)
    mask = fresh.tensors()["mask"].clone()
    fresh.load_state_dict(getattr(ema, given)())
    assert_same_bits(fresh.state_dict(), ema.state_dict())
    expected = ema.tensors()["mask"] if given == "tensors" else mask
    assert torch.equal(fresh.tensors()["mask"], expected)


@pytest.mark.parametrize("architecture", ["swin_tiny_patch4_window7_224", "eva02_tiny_patch14_224"])
def test_timms_transformers_take_the_state(architecture):
    timm = pytest.importorskip("timm")
    model = timm.create_model(architecture)
    model.load_state_dict(ModelEma(model, 0.9).state_dict())


@pytest.mark.parametrize("damage", ["missing", "extra", "shape"])
def test_what_does_not_fit_is_named_and_touches_nothing(damage):
    ema = ModelEma(make_model(), 0.9)
    before = {name: average.clone() for name, average in ema.state_dict().items()}
    state = {name: average + 1 for name, average in before.items()}
    if damage == "missing":
        del state["4.bias"]
    elif damage == "extra":
        state["4.bias.extra"] = torch.zeros(1)
    else:
        state["4.bias"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"4\.bias"):
        ema.load_state_dict(state)
    assert_same_bits(ema.state_dict(), before)


def test_another_model_is_refused():
    ema = ModelEma(make_model(), 0.9)
    with pytest.raises(ValueError, match="the model does not fit the average"):
        ema.update(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match=r"4\.weight"), ema.applied_to(make_model()[:4]):
        pass
