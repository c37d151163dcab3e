"""Terminals that take no output: the training goes on, and no control character gets through."""

import io
import os
import subprocess
import sys

import pytest
from imagefolders import make

import smallruns
from harness.console import Output, printable, steady_output

RUN = (
    "train.py --dataset {data} --model test_resnet --image_size 16 --batch_size 2 --max_steps 2 "
    "--output_dir {out} --run_name run --report_to none --augment none --mix_prob 0 --threads 1"
)


@pytest.mark.slow
@pytest.mark.parametrize("redirect", [">&- 2>&-", ">/dev/full 2>/dev/full", "| head -n 1", ""])
def test_training_goes_on(tmp_path, redirect):
    """With class names that no ASCII terminal has, and one that would clear the screen."""
    data = make(tmp_path / "set", "caf\u00e9/*2.png", "a\x1b[2Jb/*2.png", "\u202eright/*2.png")
    words = RUN.format(data=data, out=tmp_path)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(smallruns.ROOT)}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {words} {redirect}"],
        cwd=smallruns.ROOT, env=environment, capture_output=True, timeout=240,
    )  # fmt: skip
    shown = (done.stdout + done.stderr).decode("ascii")
    assert "Traceback" not in shown and (tmp_path / "run" / "summary.json").exists(), shown
    assert done.returncode == 0
    assert "\x1b" not in shown
    if not redirect:
        assert "a\\x1b[2Jb, caf\\xe9, \\u202eright" in shown


def test_what_is_printable():
    assert printable("a\tb\nc") == "a\tb\nc" and printable("\x07\ud800") == "\\x07\\ud800"
    assert printable("日本 é") == "日本 é"


def test_an_output_that_fails():
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    stream = Output(Broken())
    assert stream.write("text") == 4 and stream.flush() is None and not stream.isatty()
    before = sys.stdout
    with steady_output():
        print("\x1b")
    assert sys.stdout is before
