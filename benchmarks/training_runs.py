"""One training run as a process of its own, for the benchmarks that compare finished runs."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def finish_run(script, folder, words, config_file=None):
    """Launch a script into this folder, or continue what a kill has left there.

    words: its flags, all but the folder's. Its output goes to FOLDER.log. Where it fails, this
    process ends with the command, the last lines and exit status 1.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", config_file] if config_file else []
    command += [
        str(ROOT / script), *words, f"--output_dir={folder.parent}", f"--run_name={folder.name}",
        "--resume_from_checkpoint=auto",
    ]  # fmt: skip
    log = folder.with_name(f"{folder.name}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        run = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT)
    if run.returncode:
        said, _, launcher = log.read_text().rpartition("Traceback (most recent call last):\n")
        lines = (said if "CalledProcessError" in launcher else said + launcher).splitlines()
        sys.exit(f"{' '.join(command)}\nended with {run.returncode}, its last lines ({log}):\n"
                 + "\n".join(lines[-5:]))  # fmt: skip
