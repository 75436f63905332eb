"""EDM's augmentation: images from labels alone, and the distribution of the labels."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from latentddae.core.errors import ConfigError
from latentddae.diffusion.augmentation import LABEL_DIM, Augmentation

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "augment_a.safetensors")
PARTS = {
    "xflip": slice(0, 1),
    "yflip": slice(1, 2),
    "scale": slice(2, 3),
    "rotate": slice(3, 5),
    "aniso": slice(5, 7),
    "translate": slice(7, 9),
    "all": slice(0, 9),
}


def label_of(**numbers: float) -> torch.Tensor:
    label = torch.zeros(1, LABEL_DIM)
    for place, number in numbers.items():
        label[0, int(place[1:])] = number
    return label


@pytest.fixture
def image() -> torch.Tensor:
    coarse = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, 32, mode="bicubic")


@pytest.mark.parametrize("name", PARTS)
def test_images_follow_from_the_label_alone(name) -> None:
    label = torch.zeros(4, LABEL_DIM)
    label[:, PARTS[name]] = GOLDEN[f"{name}_label"]
    assert (
        Augmentation.apply(GOLDEN["images"], label) - GOLDEN[f"{name}_images"]
    ).abs().max() < 1e-5


def test_zeros_leave_an_image_as_it_is(image) -> None:
    assert torch.equal(Augmentation.apply(image, label_of()), image)
    beside = torch.cat([label_of(), label_of(_2=1.0)])
    assert torch.equal(Augmentation.apply(image.expand(2, -1, -1, -1), beside)[0], image[0])


def test_mirror_quarter_turn_and_whole_shifts_are_exact(image) -> None:
    assert torch.equal(Augmentation.apply(image, label_of(_0=1)), image.flip(3))
    assert torch.equal(Augmentation.apply(image, label_of(_1=1)), image.flip(2))
    for turns in (1, 2, 3):
        angle = turns * math.pi / 2
        label = label_of(_3=math.cos(angle) - 1, _4=math.sin(angle))
        assert torch.equal(Augmentation.apply(image, label), image.rot90(turns, dims=(2, 3)))
        near = label_of(_3=math.cos(angle - 0.001) - 1, _4=math.sin(angle - 0.001))
        gap = Augmentation.apply(image, near) - Augmentation.apply(image, label)
        assert gap.abs().mean() < 0.05 * image.std()  # the same direction
    shifted = Augmentation.apply(image, label_of(_7=0.5, _8=-0.75))  # 2 right, 3 up
    torch.testing.assert_close(shifted[..., :-3, 2:], image[..., 3:, :-2], atol=1e-5, rtol=0)


def test_labels_are_drawn_by_key_whatever_the_batch() -> None:
    pipe, positions = Augmentation(probability=0.5), torch.arange(100)
    whole = pipe.draw(positions, 3)
    assert torch.equal(whole[40:60], pipe.draw(positions[40:60], 3))
    assert not torch.equal(whole, pipe.draw(positions, 4))
    assert not Augmentation(probability=0).draw(positions, 3).any()


def test_distribution_of_every_number() -> None:
    """100,000 labels against the stated probabilities and moments, within five standard errors."""
    n, p = 100_000, 0.12
    label = Augmentation(probability=p).draw(torch.arange(n), 7).double()

    def share(mask: torch.Tensor, expected: float) -> None:
        assert abs(mask.double().mean() - expected) < 5 * math.sqrt(expected * (1 - expected) / n)

    def moments(values: torch.Tensor, mean: float, variance: float) -> None:
        assert abs(values.mean() - mean) < 5 * math.sqrt(variance / len(values))
        assert abs(values.square().mean() - mean**2 - variance) < 0.05 * variance

    share(label[:, 0] == 1, 0.5)
    share(label[:, 1] == 1, p / 2)
    for column in (2, 7, 8):
        drawn = label[:, column][label[:, column] != 0]
        share(label[:, column] != 0, p)
        moments(drawn, 0.0, 1.0)
    assert torch.equal(label[:, 7] != 0, label[:, 8] != 0)  # shifted along both axes or none
    angle = torch.atan2(label[:, 4], label[:, 3] + 1)
    share(angle != 0, p)
    moments(angle[angle != 0], 0.0, math.pi**2 / 3)
    stretch = label[:, 5:7].norm(dim=1)
    share(stretch > 0, p)
    assert abs(stretch[stretch > 0].square().mean() - 1) < 0.05
    turned = label[:, 6] != 0
    share(turned, p / 2)
    frame = torch.atan2(label[turned, 6], label[turned, 5])
    moments(frame, 0.0, math.pi**2 / 3)
    straight = label[(stretch > 0) & ~turned, 5]
    assert abs((straight > 0).double().mean() - 0.5) < 0.05


def test_stretching_keeps_the_area_and_follows_the_frame() -> None:
    """A disc becomes an ellipse of the same area whose long axis is the label's."""
    axis = torch.linspace(-1, 1, 64)
    disc = ((axis[None] ** 2 + axis[:, None] ** 2) < 0.25).float()[None, None]
    out = Augmentation.apply(disc, label_of(_5=2.0))[0, 0]
    assert abs(out.sum() / disc.sum() - 1) < 0.02
    width, height = (out.sum(dim=0) > 1).sum(), (out.sum(dim=1) > 1).sum()
    assert abs(width / height - 2**0.8) < 0.1


@pytest.mark.parametrize(
    ("images", "label"),
    [
        (torch.zeros(2, 3, 8, 8), torch.zeros(2, 8)),
        (torch.zeros(2, 3, 8, 8), torch.zeros(1, 9)),
        (torch.zeros(2, 3, 8, 6), torch.zeros(2, 9)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(images, label) -> None:
    with pytest.raises(ConfigError, match="augmentation takes square images and labels"):
        Augmentation.apply(images, label)


def test_a_probability_outside_zero_and_one_is_refused() -> None:
    with pytest.raises(ValueError, match="probability"):
        Augmentation(probability=1.5)
