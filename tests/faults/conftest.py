"""All of tests/faults is marked `faults`; every day only what is marked `everyday`, too.

`make test-faults`, `pytest -m faults` and `pytest tests/faults` run all of it.
"""

from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)  # before -m chooses by marks
def pytest_collection_modifyitems(config, items):
    asked = "faults" in config.option.markexpr or any("faults" in a for a in config.args)
    kept, left = [], []
    for item in items:
        ours = HERE in item.path.parents
        if ours:
            item.add_marker("faults")
        everyday = item.get_closest_marker("everyday")
        (kept if asked or everyday or not ours else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)
