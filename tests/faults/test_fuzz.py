"""Anything at all as flags, recipes, images, manifests, config.json: one line, or the right thing.

Property-based: hypothesis makes the input, and shrinks what fails.
"""

import contextlib
import copy
import importlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import smallruns
from harness.cli.flags import AUGMENTS
from harness.data.batches import Views
from harness.data.pixels import decode_image
from harness.errors import UserError
from harness.models.trained import load_model, read_trained
from harness.training.checkpoint import Damaged, load_checkpoint, save_checkpoint

FEW = settings(
    max_examples=60, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
SCRIPTS = ("train", "finetune", "ensemble_eval", "gradcam")
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**20), 10**20), st.floats(), st.text(max_size=8),
    st.sampled_from(["nan", "1e999", "-1", "0", "", "none", "auto", "../x", "\0", "1,2", "[", "é"]),
)  # fmt: skip
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=6), inner, max_size=3), max_leaves=6,
)  # fmt: skip


def names(script):
    from harness.cli import flags

    found = []

    class Spy(flags.Parser):
        def read(self, argv=None):
            found.extend(a.dest for a in self._actions if a.dest != "help")

    real, flags.Parser = flags.Parser, Spy
    try:
        importlib.import_module(script).read_flags([])
    finally:
        flags.Parser = real
    return found


def one_line_or_parsed(script, argv):
    """read_flags returns, or exits with one line; anything else fails the test."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            return importlib.import_module(script).read_flags(argv)
        except SystemExit as stop:
            code = stop.code
        except UserError as error:  # of what depends on several flags; script() prints it
            assert "\n" not in str(error)
            return None
    assert code in (0, 2)
    if code == 2:
        assert err.getvalue().strip() and "Traceback" not in err.getvalue()
    return None


@pytest.mark.parametrize(
    "script", [pytest.param("train", marks=pytest.mark.everyday), *SCRIPTS[1:]]
)
def test_flags(script):
    known = names(script)
    assert len(known) > 10

    @FEW
    @given(st.lists(st.tuples(st.sampled_from([*known, "nope"]), SCALARS), max_size=4),
           st.lists(st.text(max_size=5), max_size=2))  # fmt: skip
    def check(pairs, words):
        argv = [f"--{name}={value}" for name, value in pairs if name != "config"]
        one_line_or_parsed(script, [*argv, *words])

    check()


@pytest.mark.everyday
@pytest.mark.parametrize("script", SCRIPTS)
def test_recipes(script, tmp_path):
    known = names(script)

    @FEW
    @given(st.one_of(
        st.binary(max_size=30), JSON.map(lambda v: yaml.safe_dump(v).encode()),
        st.dictionaries(st.sampled_from([*known, "nope"]), JSON, max_size=3)
        .map(lambda v: yaml.safe_dump(v).encode()),
    ))  # fmt: skip
    def check(content):
        (tmp_path / "recipe.yaml").write_bytes(content)
        one_line_or_parsed(script, ["--config", str(tmp_path / "recipe.yaml")])

    check()


@FEW
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(4, 40), st.sampled_from(["L", "RGB", "P"]),
    st.sampled_from(AUGMENTS),
    st.sampled_from([0.0, 0.3]), st.integers(0, 5), st.integers(1, 5),
)  # fmt: skip
def test_image_shapes(width, height, size, mode, augment, crop_scale, padding, n):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "png")
    decoded = decode_image(buffer, size)
    assert decoded.shape == (3, size, size) and decoded.dtype == np.uint8
    views = Views(
        size, (0.5,) * 3, (0.5,) * 3, augment=augment, padding=min(padding, size), flip_prob=0.5,
        erasing=0.5, ops=2, magnitude=9, crop_scale=crop_scale,
    )  # fmt: skip
    batch = torch.from_numpy(decoded).repeat(n, 1, 1, 1)
    draw = views.draw(n, torch.Generator().manual_seed(1))
    out = views.train(batch, draw)
    assert out.shape == (n, 3, size, size) and torch.isfinite(out).all()
    assert torch.equal(out, views.train(batch, draw))


# --- what is on the disk ---


@st.composite
def mutations(draw, document):
    """The JSON document with a value, a key or a piece of text changed somewhere."""
    document = copy.deepcopy(document)
    place = document
    for _ in range(draw(st.integers(0, 3))):
        inner = [k for k, v in (place.items() if isinstance(place, dict) else enumerate(place))
                 if isinstance(v, dict | list) and v]  # fmt: skip
        if not inner:
            break
        place = place[draw(st.sampled_from(inner))]
    keys = list(place) if isinstance(place, dict) else list(range(len(place)))
    key = draw(st.sampled_from(keys))
    how = draw(st.sampled_from(["change", "delete", "add"]))
    if how == "delete":
        del place[key]
    elif how == "add" and isinstance(place, dict):
        place[draw(st.text(max_size=12))] = draw(JSON)
    else:
        place[key] = draw(JSON)
    return document


def test_manifests(tmp_path):
    tensors = {"model": {"w": torch.arange(6.0)}, "ema": {"w": torch.ones(2)}}
    folder = save_checkpoint(tmp_path, 7, tensors, {"step": 7, "best": None}, keep=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    damaged = []

    @FEW
    @given(mutations(manifest))
    def check(mutated):
        (folder / "manifest.json").write_text(json.dumps(mutated))
        try:
            found, state = load_checkpoint(folder)
        except Damaged:
            damaged.append(1)
            return
        assert state == {"step": 7, "best": None}
        assert all(torch.equal(found[k]["w"], tensors[k]["w"]) for k in found)
        assert found.keys() == tensors.keys(), "a file is missing and nobody says so"

    check()
    assert damaged


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzzed")
    folder, status = smallruns.train(root, max_steps=1, epochs=None, warmup_epochs=0)
    assert status == 0
    return folder


@pytest.mark.parametrize("what", ["result", "weights"])
def test_config_json(run, tmp_path, what):
    config = json.loads((run / "config.json").read_text())
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    refused = []

    @FEW
    @given(mutations(config))
    def check(mutated):
        (tmp_path / "run" / "config.json").write_text(json.dumps(mutated))
        try:
            if what == "result":
                trained = read_trained(tmp_path / "run")
                assert trained.recipes
                load_model(trained)
            else:
                from harness.models.weights import find_weights

                find_weights(str(tmp_path / "run"), config["architecture"])
        except UserError as error:
            assert "\n" not in str(error)
            refused.append(1)

    check()
    assert refused
