"""Tests run offline, on one thread a process, from any working directory."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Two processes that wait for each other's threads by spinning take 10 times as long on two cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tensors take longer on two
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
