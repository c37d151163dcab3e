"""The four scripts on photographs, whose random crops are cut from the packed store."""

import json

import numpy as np
import pytest
from PIL import Image

import faulty
import smallruns
from harness.cli import flags as cli_flags
from harness.data import jpegs, packed, packing
from harness.data.preprocessing import Preprocessing
from harness.data.sources import load_data
from harness.data.stores import StoreOptions, choose_store
from harness.errors import UserError

FLAGS = {
    "dataset": None, "image_size": 32, "crop_scale": 0.3, "max_train_samples": None,
    "max_eval_samples": None, "val_fraction": 0.25, "batch_size": 12, "epochs": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three classes of 20 pictures of several sizes, one of them turned, one a PNG."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name, (width, height) in {"wide": (120, 70), "tall": (66, 140), "small": (40, 40)}.items():
        (root / name).mkdir()
        for k in range(20):
            small = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
            image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
            suffix = "png" if k == 3 else "jpg"
            exif = Image.Exif()
            exif[0x0112] = 6 if k == 5 else 1
            image.save(root / name / f"{k}.{suffix}", exif=exif)
    return root


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    run, status = smallruns.train(
        tmp_path_factory.mktemp("straight"), **FLAGS | {"dataset": photos}
    )
    assert status == 0
    return run


def test_a_stopped_run_goes_on_bit_for_bit(photos, straight, tmp_path, capsys):
    flags = FLAGS | {"dataset": photos}
    smallruns.train(tmp_path, **flags, stop_after=4)
    assert "pixels       packed, " in capsys.readouterr().out
    resumed, _ = smallruns.train(tmp_path, **flags, resume_from_checkpoint="auto")
    assert smallruns.digest(resumed) == smallruns.digest(straight)


def test_nvjpeg_is_for_packed_pixels_on_a_gpu(photos, tmp_path, monkeypatch):
    flags = FLAGS | {"dataset": photos, "jpeg_decoder": "nvjpeg"}
    with pytest.raises(UserError, match="--jpeg_decoder nvjpeg needs a CUDA GPU, this is cpu"):
        smallruns.train(tmp_path, **flags)
    args = smallruns.build_parser("train.py").read(["--jpeg_decoder=nvjpeg", "--pixels=decoded"])
    data = load_data(str(photos), val_fraction=0.25)
    with pytest.raises(UserError, match="--jpeg_decoder nvjpeg is for packed pixels"):
        options = cli_flags.pick(StoreOptions, args)
        choose_store(options, data, Preprocessing(32, 0.875, "bilinear", (0.5,) * 3, (0.5,) * 3))


def test_other_pixels_do_not_continue_a_run(photos, tmp_path, monkeypatch):
    flags = FLAGS | {"dataset": photos, "stop_after": 2}
    smallruns.train(tmp_path, **flags)
    again = flags | {"resume_from_checkpoint": "auto"}
    with pytest.raises(UserError, match="the packed ones, these are decoded; --pixels packed cont"):
        smallruns.train(tmp_path, **again, pixels="decoded")
    monkeypatch.setattr(jpegs.simplejpeg, "__version__", "0.1")
    with pytest.raises(UserError, match=r"simplejpeg .* decoded them, here it is simplejpeg 0.1;"):
        smallruns.train(tmp_path, **again)


def test_the_other_scripts_look_through_the_same_store(photos, straight, tmp_path, capsys):
    config = json.loads((straight / "config.json").read_text())
    assert config["packed_side"] == 64
    summary = json.loads((straight / "summary.json").read_text())
    report = smallruns.ensemble(tmp_path, straight, split="val")
    found = json.loads((report / "report.json").read_text())
    (member,) = (r for r in found["results"] if r["name"] == "run")
    assert member["accuracy"] == pytest.approx(summary["accuracy"], abs=1e-6)
    capsys.readouterr()
    words = [str(straight), "--output_dir", str(tmp_path), "--run_name", "cam"]
    folder, status = smallruns.run("gradcam", [*words, "--split", "val", "--max_images", "15"])
    assert status in (0, None) and (folder / "report.md").exists()


def test_features_are_kept_of_packed_images(photos, tmp_path, capsys):
    flags = FLAGS | {"dataset": photos, "strategy": "feature_extraction", "weights": "none"}
    flags |= {"views": 2, "dropout": None, "lr": 0.01}
    whole, _ = smallruns.train(tmp_path / "a", script="finetune", **flags)
    assert "pixels       packed, " in capsys.readouterr().out
    smallruns.train(tmp_path / "b", script="finetune", **flags, stop_after=4)
    resumed, _ = smallruns.train(
        tmp_path / "b", script="finetune", **flags, resume_from_checkpoint="auto"
    )
    assert smallruns.digest(resumed) == smallruns.digest(whole)


@pytest.mark.slow
def test_two_processes_pack_together_and_go_on_bit_for_bit(photos, tmp_path):
    flags = FLAGS | {"dataset": photos, "gradient_accumulation_steps": 1, "batch_size": 8}
    whole = faulty.start(tmp_path / "a", processes=2, **flags).done()
    faulty.start(tmp_path / "b", processes=2, **flags, stop_after=5).done()
    resumed = faulty.start(tmp_path / "b", processes=2, **flags, resume_from_checkpoint="auto")
    assert smallruns.digest(resumed.done()) == smallruns.digest(whole)


def test_data_can_be_prepared_ahead(photos, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    flags = FLAGS | {"dataset": photos}
    folder, status = smallruns.train(tmp_path, **flags, prepare_data=True)
    assert status == 0 and not folder.exists()
    assert len(list((tmp_path / "cache" / "pixels").glob("*.index"))) == 1
    monkeypatch.setattr(packing, "pack_image", None)
    smallruns.train(tmp_path, **flags, stop_after=1)


@pytest.mark.slow
def test_two_machines_pack_and_see_their_own_shares(photos, tmp_path):
    """Each with a cache of its own; the stopped run goes on bit for bit."""
    flags = FLAGS | {"dataset": str(photos), "gradient_accumulation_steps": 1, "batch_size": 8}
    flags |= {"shard_store": True, "val_fraction": None, "test_split": "none"}

    def run(folder, **more):
        (tmp_path / folder).mkdir(exist_ok=True)
        done = [
            smallruns.two_machines(tmp_path / folder, k, port, **flags, **more) for k in range(2)
        ]
        for process in done:
            output, _ = process.communicate(timeout=200)
            assert process.returncode == 0, output
        return tmp_path / folder / "run"

    port = faulty.free_port()
    whole = run("a")
    port = faulty.free_port()
    run("b", stop_after=4)
    sizes = []
    for k in range(2):
        (index,) = (tmp_path / "b" / f"cache{k}" / "pixels").glob("*.index")
        sizes.append(int((packed.read_index(index)[1]["length"] > 0).sum()))
    assert sizes == [30, 30]
    port = faulty.free_port()
    assert smallruns.digest(run("b", resume_from_checkpoint="auto")) == smallruns.digest(whole)


def test_a_share_wants_packed_pixels(photos, tmp_path):
    with pytest.raises(UserError, match="--shard_store is for packed pixels: add --pixels packed"):
        smallruns.train(tmp_path, **FLAGS | {"dataset": photos, "crop_scale": 0}, shard_store=True)
