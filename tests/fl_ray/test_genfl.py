"""GenFL's two ends are AIGC-only and FedAvg, its sum is kappa-weighted, its images fill the scarce classes."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fl_ray.config import RunConfig
from fl_ray.data.parts import prepare
from fl_ray.experiment import Experiment
from fl_ray.model import ImageShape
from fl_ray.randomness import numpy_generator, seeded_torch, torch_generator
from tests.synthesis import synthesis_of

Run = Callable[..., tuple[Experiment, dict]]
GENFL = {"method__name": "genfl", "with_generator": True, "method__images_per_round": 30, "method__max_images": 60}


def model(experiment: Experiment) -> dict[str, torch.Tensor]:
    return load_file(experiment.folder / "model.safetensors")


def test_kappa2_zero_is_fedavg_to_the_bit(run_small: Run) -> None:
    genfl, summary = run_small(**GENFL, method__kappa1=1.0, method__kappa2=0.0)
    fedavg, expected = run_small()
    assert all(torch.equal(value, model(fedavg)[name]) for name, value in model(genfl).items())
    assert summary["energy_j"] == expected["energy_j"]
    assert summary["bytes_up"] == expected["bytes_up"]


def test_kappa1_zero_is_training_on_synthetic_images_alone(run_small: Run) -> None:
    """Against a plain loop over the same images, in the order that the keys give."""
    experiment, summary = run_small(**GENFL, method__kappa1=0.0, method__kappa2=1.0)
    assert summary["energy_j"] == 0
    config = experiment.config
    data = prepare(config.data, config.seed)
    source = synthesis_of(config, data=data)
    with seeded_torch(config.seed, "init"):
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    made = np.zeros(10, dtype=int)
    for number in range(config.rounds):
        if made.sum() < 60:
            cohort = _cohort(config, number)
            counts = data.counts(cohort).sum(axis=0)
            for _ in range(30):  # water-filling, one image after another
                made_now = made.copy()
                made_now[np.argmin(counts)] += 1
                counts[np.argmin(counts)] += 1
                made = made_now
        images, labels = source.images(made, config.seed)
        x = ImageShape.of(data.source).normalise(images, torch.device("cpu"))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        order = torch.randperm(len(x), generator=torch_generator(config.seed, "server/order", number, 0))
        for rows in order.split(8):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), torch.from_numpy(labels)[rows]).backward()
            optimizer.step()
    assert summary["synthetic_images"] == made.tolist()
    for name, value in net.state_dict().items():
        assert torch.allclose(model(experiment)[f"network.{name}"], value, atol=1e-6), name


def _cohort(config: RunConfig, number: int) -> np.ndarray:
    rng = numpy_generator(config.seed, "cohort", number)
    return rng.choice(config.data.clients, config.cohort_size, replace=False, shuffle=False)


def test_one_round_is_the_kappa_weighted_sum_of_both_ends(run_small: Run) -> None:
    mixed, _ = run_small(**GENFL, rounds=1, method__kappa1=0.25, method__kappa2=0.75)
    clients, _ = run_small(**GENFL, rounds=1, method__kappa1=1.0, method__kappa2=0.0)
    server, _ = run_small(**GENFL, rounds=1, method__kappa1=0.0, method__kappa2=1.0)
    for name, value in model(mixed).items():
        expected = 0.25 * model(clients)[name].double() + 0.75 * model(server)[name].double()
        assert torch.allclose(value.double(), expected, atol=1e-7), name


def test_images_are_capped_and_label_counts_are_sent_once(run_small: Run) -> None:
    genfl, summary = run_small(**GENFL)
    _, plain = run_small()
    assert sum(summary["synthetic_images"]) == 60
    assert summary["bytes_up"] - plain["bytes_up"] == 6 * 10 * 8
    assert summary["bytes_down"] == plain["bytes_down"]
    assert (genfl.folder / "samples.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method__kappa1": 0.5, "method__kappa2": 0.6}, "must be 1"),
        ({"method__kappa1": 1.5, "method__kappa2": -0.5}, r"must be in \[0, 1\]"),
        ({"method__images_per_round": 0}, "images_per_round is 0.*at least 1"),
        ({"method__server_epochs": 0}, "server_epochs"),
    ],
)
def test_bad_settings_are_refused(run_small: Run, settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        run_small(**{**GENFL, **settings})


def test_a_method_that_needs_a_generator_says_so(run_small: Run) -> None:
    with pytest.raises(ValueError, match="needs a generator"):
        run_small(method__name="genfl")


def test_a_generator_that_learns_from_no_images_needs_no_public_part(run_small: Run) -> None:
    settings = {"method__name": "genfl", "generator": {"name": "tests.generators.own:UntaughtGenerator"}}
    experiment, summary = run_small(**settings, data__public_fraction=0.0)
    assert sum(summary["synthetic_images"]) == 600
    assert summary["synthesis"]["real_images"] == 0
    assert len(experiment.data.public) == 0
    assert (experiment.folder / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_a_generator_may_learn_from_a_reserve_alone(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.generators.own.FlatGenerator.learns_from", "reserve")
    settings = {"method__name": "genfl", "generator": {"name": "tests.generators.own:FlatGenerator"}}
    experiment, summary = run_small(**settings, data__public_fraction=0.0, data__reserve_fraction=0.2)
    assert summary["synthesis"]["real_images"] == len(experiment.data.reserve) > 0


def test_a_generator_with_too_few_images_is_refused_before_the_first_round(run_small: Run) -> None:
    settings = {"method__name": "genfl", "generator": {"name": "real"}, "data__reserve_fraction": 0.3}
    with pytest.raises(ValueError, match=r"so a class may be given 2000 images, .* has 1\d of one; lower it to 1\d$"):
        run_small(**settings)
    with pytest.raises(ValueError, match=r"may be given 100 images, .* of one; lower it to 1\d, or .* uniform"):
        run_small(**settings, method__max_images=100)
    with pytest.raises(ValueError, match=r"may be given 30 images, .* of one; lower it to 1\d0$"):
        run_small(**settings, method__max_images=300, method__class_choice="uniform")
    _, summary = run_small(**settings, method__max_images=10, method__images_per_round=5)
    assert sum(summary["synthetic_images"]) == 10
