"""Combinations of members, from their logits alone."""

import pytest
import torch

from harness.ensembles.combinations import combined_results
from harness.reports.classes import calibration


def test_a_vote_with_ties_is_calibrated_by_what_was_voted():
    logits = torch.tensor([[[0.0, 1.0, 0.0]], [[3.0, 0.0, 0.0]]])  # the second is surer
    labels = {"scored": torch.tensor([0, 0])}
    logits = {"scored": logits.expand(2, 2, 3).clone()}
    vote = combined_results(["a", "b"], logits, labels, seed=0)[1]
    assert vote.details == {"ties": 2} and vote.labels.tolist() == [0, 0]
    assert vote.probabilities.argmax(1).tolist() == [0, 0]
    assert calibration(vote.probabilities, labels["scored"])["ece"] == pytest.approx(0.5, abs=1e-6)
