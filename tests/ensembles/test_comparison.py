"""The tests of combinations against the best member, and what the report says of them."""

import pytest
import torch

from harness.ensembles import report as words
from harness.ensembles.combinations import Result
from harness.ensembles.comparison import compare


def result(name, kind, right, n=200):
    """Predictions of two classes for n images of class 0: those listed are right."""
    predicted = torch.ones(n, dtype=torch.int64)
    predicted[list(right)] = 0
    probabilities = torch.nn.functional.one_hot(predicted, 2).double() * 0.8 + 0.1
    return Result(name, kind, predicted, probabilities, probabilities, [1.0], {}, 1)


@pytest.fixture(scope="module")
def rows():
    return compare(
        [
            result("a", "member", range(150)),
            result("b", "member", range(140)),
            result("average", "combination", range(158)),  # 8 more: p = 2 / 2⁸
            result("vote", "combination", range(156)),  # 6 more: p = 2 / 2⁶
            result("weighted", "combination", range(150)),  # the same: p = 1
            result("a, as a soup of one", "control", range(155)),  # 5 more: p = 2 / 2⁵
        ],
        torch.zeros(200, dtype=torch.int64),
    )


def test_p_values_of_all_combinations_are_corrected_together(rows):
    tested = {row["name"]: row["against"] for row in rows if "against" in row}
    assert [one["p"] for one in tested.values()] == [2 / 256, 2 / 64, 1.0, 2 / 32]
    # Holm: the smallest times 4, the next times 3, then 2
    assert [one["p_holm"] for one in tested.values()] == [8 / 256, 6 / 64, 1.0, 4 / 32]
    assert {one["tests"] for one in tested.values()} == {4}


def test_the_table_and_the_outcome_show_the_corrected_values(rows):
    text = words.results_table(rows)
    assert "p (Holm)" in text and "0.031" in text and "0.094" in text
    assert "0.008" not in text  # average's own
    report = {"results": rows, "best": "average", "scored": {"role": "test"}}
    assert "McNemar's p = 0.031 after Holm's correction for 4 tests)" in words.headline(report)
    report["best"] = "vote"  # alone, 0.03 would look real
    assert "tests: chance is not ruled out)" in words.headline(report)


def test_a_single_test_is_not_corrected():
    members = [result("a", "member", range(150)), result("b", "member", range(140))]
    rows = compare(
        [*members, result("average", "combination", range(156))],
        torch.zeros(200, dtype=torch.int64),
    )
    assert rows[2]["against"]["p_holm"] == rows[2]["against"]["p"] == 2 / 64
    report = {"results": rows, "best": "average", "scored": {"role": "test"}}
    assert "Holm" not in words.headline(report)
