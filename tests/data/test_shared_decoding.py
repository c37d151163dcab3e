"""Several processes, on one machine and on two that share the cache, decode together."""

import json
import subprocess
import sys

import datasets
import numpy as np
import pytest

import faulty
import smallruns

pytestmark = pytest.mark.slow

DECODE = """
import json, os, sys, time
import accelerate, datasets
import numpy as np
from harness.data import cache
from harness.errors import UserError

folder, name, waits = sys.argv[1:]
accelerator = accelerate.Accelerator(cpu=True)
cache.BLOCK, cache.HASHED = 16, 8
datasets.config.HF_DATASETS_CACHE = folder
images, done = datasets.load_from_disk(folder + "/" + name), []
for function in ("decode_image", "_allocate"):
    def counted(*args, original=getattr(cache, function), function=function, **options):
        if function == "_allocate":
            time.sleep(float(waits))
        done.append(function)
        return original(*args, **options)
    setattr(cache, function, counted)
try:
    pixels = cache.decode_split(images, "image", 8, name="train", accelerator=accelerator)
    said = {"sum": int(pixels.long().sum()), "first": pixels[:, 0, 0, 0].tolist()}
except UserError as error:
    said = {"error": str(error)}
said |= {name: done.count(name) for name in ("decode_image", "_allocate")}
print(json.dumps(said))
if accelerator.num_processes > 1:
    import torch
    torch.distributed.destroy_process_group()
"""


def images(folder, bad=()):
    """128 images of 8 px whose red corner is their number."""
    import io

    from PIL import Image

    cells = []
    for k in range(128):
        file = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(file, "png")
        cells.append({"bytes": b"junk" if k in bad else file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).save_to_disk(folder / "images")


def decode(folder, machines, waits=0):
    """What each process says; machines: how many processes each has. One cache for all."""
    port = faulty.free_port()
    places = [(machine, local) for machine, n in enumerate(machines) for local in range(n)]
    running = []
    for rank, (machine, local) in enumerate(places):
        env = {
            "RANK": rank, "WORLD_SIZE": len(places), "LOCAL_RANK": local, "MASTER_PORT": port,
            "LOCAL_WORLD_SIZE": machines[machine], "MASTER_ADDR": "127.0.0.1",
            "PYTHONPATH": smallruns.ROOT, "OMP_NUM_THREADS": 1, "PATH": "/usr/bin:/bin",
            "HF_HUB_OFFLINE": 1, "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        running.append(subprocess.Popen(
            [sys.executable, "-c", DECODE, str(folder), "images", str(waits)], text=True,
            env={k: str(v) for k, v in env.items()}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        ))  # fmt: skip
    said = []
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        said.append(json.loads(out.splitlines()[-1]))
    return said


@pytest.mark.parametrize("machines", [(3,), (2, 1)], ids=str)
def test_every_process_of_one_machine_decodes_its_share(tmp_path, machines):
    images(tmp_path)
    found = decode(tmp_path, machines, waits=0.5)
    for one in found:
        assert one["first"] == list(range(128))
    allocated = [k for k, one in enumerate(found) if one["_allocate"]]
    assert len(allocated) == 1  # one machine decodes, the other waits for it
    first = allocated[0]
    counts = [one["decode_image"] for one in found]
    assert sum(counts) == 128
    assert all(counts[first : first + machines[0 if first == 0 else 1]])
    left = {file.suffix for file in (tmp_path / "pixels").iterdir()}
    assert left == {".npy", ".json", ".lock"}
    assert [one["decode_image"] for one in decode(tmp_path, (1,))] == [0]


def test_all_processes_hear_of_an_image_that_cannot_be_read(tmp_path):
    images(tmp_path, bad=[40])
    found = decode(tmp_path, (2,))
    assert len({one["error"] for one in found}) == 1
    assert found[0]["error"].startswith("cannot read image 40 of split 'train': not an image")
    assert {file.suffix for file in (tmp_path / "pixels").iterdir()} == {".lock"}
