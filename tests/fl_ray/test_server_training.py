"""How a server trains: all of its model or its head alone; and models that start from files of weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fl_ray.config import Component, RayConfig, RuntimeConfig, TrainingConfig
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.head import frozen_but_head, head_name
from fl_ray.model import ImageShape, build_module
from fl_ray.recipes import apply_overrides, make_config, to_dict
from fl_ray.runtime.ray_backend import RayRuntime
from tests.fl_ray.test_one_shot import COMMON, GUIDED

Run = Callable[..., tuple[Experiment, dict[str, Any]]]
MODEL = Component("small_cnn", {"width": 3, "hidden": 12, "dropout": 0.3, "batch_norm": True})
HEAD = "network.12."
SERVER = {"model": {"name": MODEL.name, **MODEL.settings}, "method__server__epochs": 3, "method__server__lr": 0.1}
FEDDF = {**COMMON, **SERVER, "method__name": "feddf", "method__server__batch_size": 32}
METHODS = {
    "feddf": FEDDF,
    "fedlmg": {**GUIDED, **SERVER},
    "dense": {
        **COMMON, **SERVER, "method__name": "dense", "method__turns": 2, "method__generator_steps": 1,
        "method__student_steps": 2, "method__server__batch_size": 16,
    },
}  # fmt: skip
ALONE = {"rounds": 2, "model": SERVER["model"], "method__train": "head"}
SERVERS = {
    "public_only": {**ALONE, "method__name": "public_only"},
    "centralised": {**ALONE, "method__name": "centralised"},
    "prompts_only": {**ALONE, "method__name": "prompts_only", "with_generator": True, "method__images_per_class": 4},
}


def module(classes: int = 10, model: Component = MODEL) -> nn.Module:
    """A model whose weights and running statistics are like no drawn one's."""
    torch.manual_seed(7)
    made = build_module(model, ImageShape(1, 8, classes, (0.5,), (0.5,)), TrainingConfig())
    for name, tensor in made.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) * 0.3 + 0.1)
        else:
            tensor.fill_(5 + len(name) % 2)
    return made


@pytest.fixture
def start(tmp_path: Path) -> str:
    """Weights of the server's model in a file."""
    folder = tmp_path / "weights"
    folder.mkdir()
    save_file(module().state_dict(), folder / "start.safetensors")
    return str(folder / "start.safetensors")


def result(experiment: Experiment) -> dict[str, torch.Tensor]:
    return load_file(experiment.folder / "model.safetensors")


def assert_only_the_head_moved(experiment: Experiment, start: str) -> None:
    before, after = load_file(start), result(experiment)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {f"{HEAD}weight", f"{HEAD}bias"}


@pytest.mark.parametrize("method", METHODS)
def test_the_head_moves_and_nothing_else(run_small: Run, start: str, method: str) -> None:
    experiment, summary = run_small(**METHODS[method], model__start=start, method__server__train="head")
    assert_only_the_head_moved(experiment, start)
    assert summary["starts_from"][start]["head"] == "of the file"
    assert len(summary["starts_from"][start]["sha256"]) == 64
    whole, _ = run_small(**METHODS[method], model__start=start)
    before, after = load_file(start), result(whole)
    assert all(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", SERVERS)
def test_the_head_of_the_reference_rows(run_small: Run, start: str, method: str) -> None:
    experiment, _ = run_small(**SERVERS[method], model__start=start)
    assert_only_the_head_moved(experiment, start)


def test_the_same_on_ray(ray_session: None, run_small: Run, start: str) -> None:
    settings = {**FEDDF, "model__start": start, "method__server__train": "head"}
    own, expected = run_small(**settings)
    with RayRuntime(RuntimeConfig(actors="pooled", num_actors=1), RayConfig()) as runtime:
        found, summary = run_small(runtime, **settings, runtime__backend="ray")
    mine, other = result(own), result(found)
    assert all(torch.equal(mine[name], other[name]) for name in other)
    assert summary["final_accuracy"] == expected["final_accuracy"]


def test_frozen_parts_take_no_gradient_and_stay_in_evaluation_mode() -> None:
    made, seen = module(), []
    for part in made.modules():
        part.register_forward_hook(lambda part, given, out: seen.append((part.training, out.requires_grad)))
    with frozen_but_head(made, 10) as head:
        made.eval()
        head.train()
        made.training_step((torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)), 0).backward()
    assert head is made.get_submodule(HEAD[:-1])
    with_gradient = {name for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert with_gradient == {f"{HEAD}weight", f"{HEAD}bias"}
    assert seen[:12] == [(False, False)] * 12
    assert seen[12] == (True, True)
    assert all(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize("part", ["public", "reserve"])
def test_a_linear_probe_is_logistic_regression_on_the_encoders_features(run_small: Run, start: str, part: str) -> None:
    """By hand: SGD of a linear layer on what the encoder, in evaluation mode, makes of the server's images."""
    from fl_ray.data.parts import prepare
    from fl_ray.runtime.local_training import batches_of

    settings = {**SERVERS["public_only"], "rounds": 1, "training__local_epochs": 3, "training__momentum": 0.5}
    experiment, _ = run_small(**settings, model__start=start, data__reserve_fraction=0.2, method__part=part)
    data = prepare(experiment.config.data, experiment.config.seed)
    made, training = module().eval(), experiment.config.training
    images, labels = data.server_part(part)
    x, y = ImageShape.of(data.source).normalise(images, torch.device("cpu")), torch.from_numpy(labels)
    with torch.no_grad():
        features = nn.Sequential(*list(made.network)[:-1])(x)
    head = made.network[-1]
    optimiser = torch.optim.SGD(head.parameters(), training.lr, training.momentum)
    for rows in batches_of(len(x), training.batch_size, 3, (0, "server", 0, 0)):
        optimiser.zero_grad()
        nn.functional.cross_entropy(head(features[rows]), y[rows]).backward()
        optimiser.step()
    torch.testing.assert_close(result(experiment)[f"{HEAD}weight"], head.weight.data, atol=1e-5, rtol=1e-4)


def test_a_head_for_other_classes_is_left_as_drawn(run_small: Run, start: str) -> None:
    save_file(module(classes=7).state_dict(), start)
    settings = {**FEDDF, "model__start": start, "method__server__train": "head"}
    experiment, summary = run_small(**settings)
    before, after = load_file(start), result(experiment)
    assert summary["starts_from"][start]["head"] == "as drawn"
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith(HEAD))
    without = {name: tensor for name, tensor in before.items() if not name.startswith(HEAD)}
    save_file(without, start)
    again, _ = run_small(**settings)
    assert all(torch.equal(after[name], tensor) for name, tensor in result(again).items())


def test_feddf_may_probe_the_clients_average(run_small: Run) -> None:
    settings = {**FEDDF, "method__client_models": None, "method__server__train": "head"}
    experiment, summary = run_small(**settings)
    assert "starts_from" not in summary
    statistics = [name for name in result(experiment) if name.endswith("running_mean")]
    uploads = [load_file(path) for path in sorted((experiment.folder / "uploads").iterdir())]
    assert len(uploads) == 3
    for name in statistics:
        low, high = torch.stack([each[name] for each in uploads]).aminmax(dim=0)
        assert ((low <= result(experiment)[name]) & (result(experiment)[name] <= high)).all()


NOT_MOVING = {"training__lr": 1e-12, "training__local_epochs": 1}


def test_clients_models_start_from_files_too(run_small: Run, start: str) -> None:
    """With a step so small that nothing moves, what a client sends is what it started from."""
    own = {"name": MODEL.name, **MODEL.settings}
    settings = {**COMMON, **NOT_MOVING, "method__name": "ensemble"}
    settings["method__client_models"] = [{**own, "start": start}, own]
    experiment, summary = run_small(**settings)
    assert list(summary["starts_from"]) == [start]
    before = load_file(start)
    sent = [load_file(path) for path in sorted((experiment.folder / "uploads").iterdir())]
    same = [torch.allclose(before["network.0.weight"], each["network.0.weight"]) for each in sent]
    assert same == [True, False, True]


def test_every_method_s_model_may_start_from_a_file(run_small: Run, start: str) -> None:
    experiment, _ = run_small(**NOT_MOVING, model={**SERVER["model"], "start": start}, rounds=1)
    before, after = load_file(start), result(experiment)
    assert all(
        torch.allclose(before[name], after[name]) for name in before if "running" not in name and "num" not in name
    )


def test_the_file_goes_with_its_model() -> None:
    recipe = {"model": {**SERVER["model"], "start": "some.safetensors"}}
    config = make_config(recipe)
    assert config.model.settings["start"] == "some.safetensors"
    assert make_config(to_dict(config)) == config
    assert "start" not in make_config(apply_overrides(recipe, {"model.name": "mlp"})).model.settings
    assert "start" not in make_config(apply_overrides(recipe, {"model.start": None})).model.settings


@pytest.mark.parametrize(
    "model",
    [
        Component("mlp", {"hidden": [4]}),
        Component("resnet18", {"width": 2}),
        Component("mobilenet_v2", {"width": 0.25}),
        Component("mobilenet_v3_small", {"width": 0.5}),
        Component("shufflenet_v2", {"width": 0.5}),
        Component("vgg16", {"width": 8}),
        Component("small_vit", {"width": 8, "layers": 1}),
        Component("exquisite_v1", {}),
    ],
    ids=lambda model: model.name,
)
def test_the_head_is_the_layer_that_gives_the_logits(model: Component) -> None:
    shape = ImageShape(3, 32, 6, (0.5,) * 3, (0.5,) * 3)
    made = build_module(model, shape, TrainingConfig()).eval()
    name, out = head_name(made, 6), []
    made.get_submodule(name).register_forward_hook(lambda part, given, logits: out.append(logits))
    assert torch.equal(made(torch.rand(2, 3, 32, 32)), out[0])


def test_bad_settings(run_small: Run, start: str, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(SettingError, match=message):
            run_small(**{**FEDDF, **changes})

    head = {"method__server__train": "head"}
    refused(r"method\.server\.train is head, but model\.start names no file", **head)
    refused(r"method\.server\.train is tail\. Known: full, head", method__server__train="tail")
    refused(r"model\.start is 3, but it must be a file's name", model__start=3)
    refused("model small_cnn: start is nowhere, but there is no such file", model__start="nowhere")
    (tmp_path / "text").write_text("no weights")
    refused("which is no safetensors file", model__start=str(tmp_path / "text"))
    mlp = {"name": "mlp", "start": start}
    refused(r"those of the model \(the model lacks network\.0\.weight, .* and 11 more\)", model=mlp)
    without = r"\(it lacks network\.0\.bias, network\.3\.bias, .*; the model lacks network\.1\."
    refused(without, model__start=start, model__batch_norm=False)
    wider = r"network\.0\.weight has the shape \[3, 1, 3, 3\], but the model's has \[4, 1, 3, 3\]"
    refused(wider, model__start=start, model__width=4)
    refused("last linear layer does not give the 10 classes", **head, model={"name": "tests.fl_ray.own:Headless"})
    with pytest.raises(SettingError, match=r"method\.train is head, but model\.start names no file"):
        run_small(**SERVERS["public_only"])
