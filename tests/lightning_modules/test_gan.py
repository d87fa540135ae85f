"""The conditional GAN's networks at any size, its losses by hand, and whose weights a step changes."""

import math

import pytest
import torch

from generators.training import fit_steps
from lightning_modules.gan import ConditionalGAN, Discriminator, ImageGenerator


@pytest.mark.parametrize("size", [8, 9, 28, 32, 50, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size(size: int, channels: int) -> None:
    y = torch.tensor([0, 3])
    images = ImageGenerator(channels, size, 4, width=4, noise=6)(torch.randn(2, 6), y)
    assert images.shape == (2, channels, size, size)
    assert images.abs().max() <= 1
    assert Discriminator(channels, size, 4, width=4)(images, y).shape == (2,)


def test_both_networks_see_the_label() -> None:
    torch.manual_seed(0)
    generator, discriminator = ImageGenerator(1, 8, 3, 4).eval(), Discriminator(1, 8, 3, 4).eval()
    z, zero, one = torch.randn(5, 64), torch.zeros(5, dtype=torch.long), torch.ones(5, dtype=torch.long)
    images = generator(z, zero)
    assert torch.equal(images, generator(z, one))  # at first
    for norm in generator.norms:
        torch.nn.init.normal_(norm.shift.weight)
    images = generator(z, zero)
    assert not torch.allclose(images, generator(z, one))
    difference = discriminator(images, one) - discriminator(images, zero)
    embedding = discriminator.embedding.weight
    assert torch.allclose(difference, discriminator.features(images) @ (embedding[1] - embedding[0]), atol=1e-6)


def test_the_losses_by_hand() -> None:
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    networks = ImageGenerator(1, 8, 2, 4), Discriminator(1, 8, 2, 4)
    hinge, bce = ConditionalGAN(*networks), ConditionalGAN(*networks, loss="bce")
    assert hinge.discriminator_loss(real, made).item() == pytest.approx((0 + 0.5) / 2 + (0 + 1.25) / 2)
    assert hinge.generator_loss(made).item() == pytest.approx((3 - 0.25) / 2)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    right = [-math.log(sigmoid(2)), -math.log(sigmoid(0.5)), -math.log(1 - sigmoid(-3)), -math.log(1 - sigmoid(0.25))]
    assert bce.discriminator_loss(real, made).item() == pytest.approx(sum(right) / 2)
    assert bce.generator_loss(made).item() == pytest.approx(-(math.log(sigmoid(-3)) + math.log(sigmoid(0.25))) / 2)


def test_each_networks_step_changes_its_own_weights_alone() -> None:
    """One step of each on one batch, seen from the optimisers: what each may change, and that it does."""
    torch.manual_seed(0)
    module = ConditionalGAN(ImageGenerator(1, 8, 2, 4), Discriminator(1, 8, 2, 4), lr=0.1)
    parts = {"generator": module.generator, "discriminator": module.discriminator}
    changed: list[set[str]] = []

    def weights() -> dict[str, list[torch.Tensor]]:
        return {name: [value.detach().clone() for value in part.parameters()] for name, part in parts.items()}

    class Watched(ConditionalGAN):
        def _step(self, optimizer: object, loss: torch.Tensor) -> None:
            before = weights()
            super()._step(optimizer, loss)
            after = weights()
            changed.append(
                {name for name in parts if any((a != b).any() for a, b in zip(before[name], after[name], strict=True))}
            )

    module.__class__ = Watched
    images, labels = torch.randn(6, 1, 8, 8).clamp(-1, 1), torch.tensor([0, 1] * 3)
    fit_steps(module, images, labels, 4, 2, lambda *told: None, seed=0)
    assert changed == [{"discriminator"}, {"generator"}] * 2
