"""The CVAE: its size, its loss against independent formulas, what it is given."""

import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from lightning_modules.cvae import CVAE, kl_to_standard_normal


def test_parameters_of_the_published_network() -> None:
    assert sum(parameter.numel() for parameter in CVAE(1, 28, 10).parameters()) == 1_072_150


def test_kl_is_that_of_torch_distributions() -> None:
    torch.manual_seed(0)
    mu, sigma = torch.randn(7, 3, dtype=torch.double), torch.rand(7, 3, dtype=torch.double) + 0.01
    expected = kl_divergence(Normal(mu, sigma), Normal(torch.zeros_like(mu), torch.ones_like(mu))).sum()
    assert torch.allclose(kl_to_standard_normal(mu, sigma), expected)
    assert kl_to_standard_normal(torch.zeros(2, 3), torch.ones(2, 3)) == 0


def test_the_loss_is_squared_error_plus_kl_summed_over_the_batch() -> None:
    """By the layers one after another, and image by image."""
    torch.manual_seed(0)
    module = CVAE(1, 4, 5, hidden=[8, 6], latent=2, binarise=False)
    x, y = torch.rand(3, 1, 4, 4), torch.tensor([4, 0, 2])
    first, second, last = (layer for layer in module.encoder if isinstance(layer, nn.Linear))
    expected = 0.0
    for image, label in zip(x, y, strict=True):
        code = last(second(first(image.flatten()).relu()).relu())
        mu, sigma = code[:2], 1e-6 + torch.log1p(code[2:].exp())
        one_hot = torch.eye(5)[label]
        made = module.decoder(torch.cat([mu, one_hot]))
        kl = kl_divergence(Normal(mu, sigma), Normal(torch.zeros(2), torch.ones(2))).sum()
        expected += ((made - image.flatten()).square().sum() + kl).item()
    correct, loss = module.evaluation(x, y)
    assert correct == 0
    assert abs(loss.item() - expected) < 1e-4
    assert (module(x, y) - x).square().sum() < loss


def test_training_draws_codes_and_evaluation_does_not() -> None:
    torch.manual_seed(0)
    module = CVAE(1, 4, 3)
    batch = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    assert module.training_step(batch, 0) != module.training_step(batch, 0)
    assert module.evaluation(*batch)[1] == module.evaluation(*batch)[1]


def test_images_are_rounded_where_that_is_set() -> None:
    torch.manual_seed(0)
    rounding, exact = CVAE(1, 4, 3), CVAE(1, 4, 3, binarise=False)
    exact.load_state_dict(rounding.state_dict())
    x, y = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    assert rounding.evaluation(x, y)[1] == exact.evaluation((x > 0.5).float(), y)[1] != exact.evaluation(x, y)[1]
