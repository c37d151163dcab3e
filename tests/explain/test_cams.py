"""What gradcam.py looks at: regions as the network sees them, and which images."""

import pytest
import torch
from PIL import Image

from harness.data.preprocessing import Preprocessing
from harness.errors import UserError
from harness.explain import cams


def test_regions_are_seen_as_the_image_is():
    """An oblong image is cut to its centre; a mask and a box of it likewise."""
    preprocessing = Preprocessing(4, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    box = cams._region([4, 0, 8, 8], (16, 8), preprocessing)  # the left half of the centre
    assert box.tolist() == [[True, True, False, False]] * 4
    mask = Image.new("L", (16, 8))
    mask.paste(1, (4, 0, 8, 8))
    assert torch.equal(cams._region(mask, (16, 8), preprocessing), box)
    assert cams._region(None, (16, 8), preprocessing) is None
    with pytest.raises(UserError, match="neither a box nor a mask"):
        cams._region([1, 2], (16, 8), preprocessing)


def test_right_and_wrong_are_as_many_as_there_are(monkeypatch):
    """Ten of a hundred are wrong: where more are asked for, right ones take their place."""

    def picture(k):
        return cams.Picture(torch.zeros(3, 2, 2), f"test {k}", 0, None)

    def predicted(network, pictures, device):
        wrong = torch.tensor([int(p.source.split()[1]) < 10 for p in pictures])
        return torch.nn.functional.one_hot(wrong.long(), 2).float()

    monkeypatch.setattr(cams, "predict", predicted)
    for only, number, expected in (
        ("all", 30, (20, 10)), ("all", 8, (4, 4)), ("wrong", 30, (0, 10)), ("right", 5, (5, 0)),
        ("all", 200, (90, 10)),
    ):  # fmt: skip
        options = cams.PictureOptions(max_images=number, only=only, seed=0)
        found = cams._right_and_wrong(options, None, None, 100, picture)
        wrong = sum(k < 10 for k in found)
        assert (len(found) - wrong, wrong) == expected, (only, number)
