"""Post-processors of updates: by hand, in chains, in the ledger, and from a recipe."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fl_ray.config import Component, RunConfig
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.recipes import apply_overrides, make_config, to_dict
from fl_ray.updates import NormClip, Quantise, TopK, UpdateChain

Run = Callable[..., tuple[Experiment, dict]]
DRAWS = torch.Generator()
TOP, CLIP, EIGHT = Component("top_k", {"fraction": 0.1}), Component("clip", {"norm": 1.0}), Component("quantise")


def chain(*components: Component, parameters: int = 1000, buffers: int = 0) -> UpdateChain:
    return UpdateChain(components, np.arange(parameters + buffers) < parameters, 0)


def test_clip_by_hand() -> None:
    update = torch.tensor([3.0, 4.0])
    assert NormClip(1.0)(update, DRAWS).tolist() == pytest.approx([0.6, 0.8])
    assert NormClip(5.0)(update, DRAWS) is update  # exactly as long as allowed
    assert NormClip(1.0)(torch.zeros(2), DRAWS).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bits", [1, 3, 8, 16])
def test_quantise_rounds_to_a_neighbour_on_the_grid(bits: int) -> None:
    update = torch.randn(2000, generator=torch.Generator().manual_seed(1))
    update[::7] = 0
    found = Quantise(bits)(update, torch.Generator().manual_seed(2))
    low, high = float(update.min()), float(update.max())
    step = (high - low) / (2**bits - 1)
    assert float((found - update).abs().max()) < step * 1.001
    places = ((found[update != 0].double() - low) / step).numpy()
    assert places == pytest.approx(np.round(places), abs=2e-2)
    assert places.min() > -0.5
    assert places.max() < 2**bits - 0.5
    assert bool((found[update == 0] == 0).all())


def test_quantise_is_unbiased() -> None:
    update = torch.tensor([-1.0, -0.33, 0.0, 0.1, 0.77, 2.0])
    draws = torch.Generator().manual_seed(3)
    mean = torch.stack([Quantise(2)(update, draws) for _ in range(4000)]).mean(dim=0)
    assert mean.tolist() == pytest.approx(update.tolist(), abs=0.04)  # five deviations of half a step / sqrt(4000)


def test_quantise_keeps_what_has_no_range() -> None:
    for update in (torch.zeros(4), torch.full((4,), 0.3)):
        assert torch.equal(Quantise(1)(update, DRAWS), update)


def test_top_k_by_hand_keeps_the_first_of_equal_entries() -> None:
    update = torch.tensor([0.5, -2.0, 2.0, 0.0, -2.0, 1.0])
    assert TopK(2 / 6)(update, DRAWS).tolist() == [0, -2, 2, 0, 0, 0]
    assert TopK(0.5)(update, DRAWS).tolist() == [0, -2, 2, 0, -2, 0]
    assert TopK(1e-9)(update, DRAWS).tolist() == [0, -2, 0, 0, 0, 0]  # at least one
    assert torch.equal(TopK(1.0)(update, DRAWS), update)


@pytest.mark.parametrize(
    ("links", "size"),
    [
        ((), 4 * 1000 + 4 * 10),
        ((CLIP,), 4 * 1000 + 4 * 10),
        ((EIGHT,), 1000 + 8 + 4 * 10),  # the range's ends beside the bytes
        ((Component("quantise", {"bits": 3}),), 375 + 8 + 4 * 10),
        ((TOP,), 100 * (4 + 4) + 4 * 10),  # values and indices
        ((TOP, EIGHT), 100 * (1 + 4) + 8 + 4 * 10),
        ((EIGHT, TOP), 100 * (1 + 4) + 8 + 4 * 10),
        ((CLIP, TOP, EIGHT), 100 * (1 + 4) + 8 + 4 * 10),
        ((TOP, Component("top_k", {"fraction": 0.5})), 100 * (4 + 4) + 4 * 10),  # a tenth is left, not a twentieth
        ((Component("top_k", {"fraction": 1.0}),), 4 * 1000 + 4 * 10),  # all are sent: no indices
    ],
)
def test_bytes_of_a_chain_by_hand(links: tuple[Component, ...], size: int) -> None:
    assert chain(*links, buffers=10).upload_bytes() == size


def test_a_chain_leaves_buffers_alone_and_draws_by_key() -> None:
    links = chain(TOP, EIGHT, parameters=50, buffers=5)
    update = torch.randn(55, generator=torch.Generator().manual_seed(0))
    before = update.clone()
    found = links.apply(update, 2, 7)
    assert torch.equal(update, before)
    assert torch.equal(found[50:], update[50:])
    assert int((found[:50] != 0).sum()) == 5
    torch.manual_seed(99)
    links.apply(update, 2, 6)
    assert torch.equal(links.apply(update, 2, 7), found)
    rounded = chain(EIGHT, parameters=50, buffers=5)
    assert not torch.equal(rounded.apply(update, 2, 7), rounded.apply(update, 3, 7))


def test_any_grouping_of_clients_gives_the_same_bits(run_small: Run) -> None:
    from fl_ray.runtime.base import merge
    from fl_ray.runtime.tasks import RoundSettings, Task

    experiment, _ = run_small(updates=[{"name": "quantise", "bits": 2}], rounds=1)
    config, data = experiment.config, experiment.data
    from fl_ray.experiment import check
    from fl_ray.preparation import make_context
    from fl_ray.runtime.start import open_runtime

    with open_runtime(config) as runtime:
        _, start = make_context(config, check(config), data, experiment.folder, runtime, experiment.progress, None)
        tasks = [Task(client, 1 / 6) for client in range(6)]
        groupings = ([tasks], [tasks[::-1]], [tasks[:2], tasks[2:]], [[task] for task in tasks])
        found = [
            merge([runtime.host.train(group, start, RoundSettings(4)) for group in groups], len(start), False).update
            for groups in groupings
        ]
    assert np.abs(found[0]).max() > 0
    assert all((one == found[0]).all() for one in found)


def test_the_ledger_counts_what_is_sent_and_the_uplink_takes_less(run_small: Run) -> None:
    plain, whole = run_small()
    experiment, small = run_small(updates=["clip", {"name": "top_k", "fraction": 0.1}, "quantise"])
    parameters = whole["parameters"]
    kept = round(0.1 * parameters)
    assert whole["bytes_up"] == 3 * 3 * 4 * parameters  # rounds x clients
    assert small["bytes_up"] == 3 * 3 * (kept * 5 + 8)
    assert small["bytes_down"] == whole["bytes_down"]
    assert small["virtual_time_s"] < whole["virtual_time_s"]
    assert small["energy_j"] < whole["energy_j"]
    for entry, other in zip(plain.folder.timeline(), experiment.folder.timeline(), strict=True):
        assert entry["t_down_s"] == other["t_down_s"]
        ratio = np.array(other["t_up_s"]) / np.array(entry["t_up_s"])
        assert ratio == pytest.approx((kept * 5 + 8) / (4 * parameters))


def test_buffers_of_batch_norm_travel_as_they_are(run_small: Run) -> None:
    """With next to nothing kept of the parameters, the running statistics must come out as without a chain."""
    settings = {"model__name": "tests.fl_ray.own:OwnModule", "rounds": 1}
    whole, _ = run_small(**settings)
    sparse, _ = run_small(**settings, updates=[{"name": "top_k", "fraction": 1e-6}, "quantise"])
    from fl_ray.model import ImageShape, WeightLayout, build_module, initial_weights

    config, shape = whole.config, ImageShape.of(whole.data.source)
    buffers = ~WeightLayout(build_module(config.model, shape, config.training)).is_parameter
    start = initial_weights(config.model, shape, config.training, 0)
    assert (sparse._weights[buffers] == whole._weights[buffers]).all()
    assert (sparse._weights[buffers] != start[buffers]).any()
    assert (sparse._weights != start)[~buffers].sum() <= 3  # one entry of each client


def test_what_is_not_sent_is_not_compressed(run_small: Run) -> None:
    plain, _ = run_small(method__name="local_only", rounds=2)
    _, summary = run_small(method__name="local_only", rounds=2, updates=["top_k"])
    assert plain.folder.summary()["final_loss"] == summary["final_loss"]


def test_updates_in_a_recipe(small: Callable[..., RunConfig]) -> None:
    recipe = {"updates": [{"name": "clip", "norm": 2.0}, "top_k"]}
    config = make_config(recipe)
    assert config.updates == [Component("clip", {"norm": 2.0}), Component("top_k", {"fraction": 0.01})]
    assert make_config(to_dict(config)) == config
    over = apply_overrides(recipe, {"updates.0.norm": 0.5, "updates.1.fraction": 0.2})
    assert [item.settings for item in make_config(over).updates] == [{"norm": 0.5}, {"fraction": 0.2}]
    other = make_config(apply_overrides(recipe, {"updates.0.name": "quantise"}))
    assert other.updates[0] == Component("quantise", {"bits": 8})  # the old one's norm went with its name
    assert recipe == {"updates": [{"name": "clip", "norm": 2.0}, "top_k"]}
    assert make_config(apply_overrides(recipe, {"updates": []})).updates == []


def test_config_yaml_holds_the_updates(run_small: Run) -> None:
    experiment, _ = run_small(updates=[{"name": "quantise", "bits": 4}], rounds=1)
    assert experiment.folder.config().updates == [Component("quantise", {"bits": 4})]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"updates": ["clipp"]}, "unknown name 'clipp'. Did you mean 'clip'"),
        ({"updates": "clip"}, "updates is 'clip', but it must be a list"),
        ({"updates": [{"norm": 1.0}]}, "name is missing"),
        ({"updates": [{"name": "clip", "bits": 3}]}, "updates: unknown setting 'bits'"),
        ({"updates": [{"name": "clip", "norm": "far"}]}, "updates.norm is far, but it must be of type float"),
        ({"updates": [{"name": "clip", "norm": -1.0}]}, "updates clip: norm is -1.0, but it must be positive"),
        ({"updates": [{"name": "quantise", "bits": 17}]}, r"bits is 17, but it must be in 1\.\.16"),
        ({"updates": [{"name": "top_k", "fraction": 0.0}]}, r"fraction is 0.0, but it must be in \(0, 1\]"),
        ({"updates": ["clip"], "updates.3.norm": 1.0}, "updates.3"),
    ],
)
def test_bad_updates_are_refused(run_small: Run, settings: dict, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        run_small(**settings)
