"""GenFL with pre-training: its stages against plain torch loops and counts by hand."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from fl_ray import checkpoint
from fl_ray.config import Component, RunConfig, TrainingConfig
from fl_ray.data.parts import prepare
from fl_ray.errors import PlacementError, SettingError
from fl_ray.experiment import Experiment
from fl_ray.methods.genfl_pretrain import GenFLPretrain
from fl_ray.model import ImageShape, WeightLayout, build_module, initial_weights
from fl_ray.runtime.host import ClientHost
from fl_ray.runtime.in_process import InProcessRuntime
from fl_ray.runtime.local_training import batches_of
from fl_ray.runtime.start import open_runtime
from fl_ray.runtime.tasks import Job, JobData, ServerTraining, Task
from tests.synthesis import synthesis_of

Run = Callable[..., tuple[Experiment, dict[str, Any]]]
PRETRAIN = {
    "with_generator": True,
    "method__name": "genfl_pretrain",
    "method__images": 45,
    "method__pretrain_epochs": 2,
    "method__pretrain_batch_size": 8,
}


def final(experiment: Experiment) -> dict[str, torch.Tensor]:
    return load_file(experiment.folder / "model.safetensors")


def test_pretraining_is_adam_on_uniform_synthetic_images(run_small: Run) -> None:
    """Without local training the final model is what a plain loop makes of the drawn weights."""
    experiment, summary = run_small(**PRETRAIN, method__local_training=False, rounds=1)
    config = experiment.config
    data = prepare(config.data, config.seed)
    counts = np.array([5] * 5 + [4] * 5)
    images, labels = synthesis_of(config, data=data).images(counts, config.seed)
    shape = ImageShape.of(data.source)
    module = build_module(config.model, shape, config.training)
    layout = WeightLayout(module)
    layout.write(torch.from_numpy(initial_weights(config.model, shape, config.training, config.seed)))
    x, y = shape.normalise(images, torch.device("cpu")), torch.from_numpy(labels)
    adam = torch.optim.Adam(module.parameters(), lr=1e-3)
    for rows in batches_of(45, 8, 2, (config.seed, "server", 0, 0)):
        adam.zero_grad()
        cross_entropy(module(x[rows]), y[rows]).backward()
        adam.step()
    for name, value in layout.named(layout.read().numpy()).items():
        torch.testing.assert_close(final(experiment)[name], value, rtol=1e-5, atol=1e-6)
    assert summary["bytes_up"] == 0
    assert summary["samples_trained"] == 90
    assert summary["pretrained_accuracy"] == summary["final_accuracy"]
    assert summary["virtual_time_s"] > 0


def test_without_pretraining_it_is_fedavg(run_small: Run) -> None:
    settings = {"method__name": "genfl_pretrain", "method__pretrain_epochs": 0}
    ours, fedavg = run_small(**settings)[0], run_small()[0]
    assert all(torch.equal(value, final(fedavg)[name]) for name, value in final(ours).items())


def test_delft_accuracy_is_on_the_clients_own_training_images(run_small: Run) -> None:
    skewed = PRETRAIN | {"data__partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 5}}
    experiment, summary = run_small(**skewed, method__protocol="delft")
    config = experiment.config
    data = prepare(config.data, config.seed)
    shape = ImageShape.of(data.source)
    module = build_module(config.model, shape, config.training)
    module.load_state_dict(final(experiment))
    right = []
    for owned in map(data.partition.of, range(config.data.clients)):
        with torch.no_grad():
            found = module(shape.normalise(data.images[owned], torch.device("cpu"))).argmax(dim=1).numpy()
        right.append(found == data.labels[owned])
    assert len({len(each) for each in right}) > 1
    assert summary["final_accuracy"] == pytest.approx(np.mean([each.mean() for each in right]), abs=1e-9)
    assert summary["size_weighted_accuracy"] == pytest.approx(np.concatenate(right).mean(), abs=1e-9)
    plain, clean = run_small(**skewed)
    assert summary["clean_accuracy"] == clean["final_accuracy"]
    assert len(summary["clean_accuracies"]) == len(summary["size_weighted_accuracies"]) == 3
    report = (experiment.folder / "report.html").read_text()
    assert "Accuracy on the clients&#x27; own training images, every client alike, against rounds" in report
    assert "Test accuracy" not in report
    assert f"<td>weighted by size [%]</td><td>{100 * summary['size_weighted_accuracy']:.2f}</td>" in report
    assert all(torch.equal(value, final(plain)[name]) for name, value in final(experiment).items())


@pytest.mark.parametrize("protocol", ["clean", "delft"])
def test_cas_is_that_of_a_plain_loop(run_small: Run, protocol: str) -> None:
    """Of the drawn weights, trained on the synthetic images, on real ones: the test part, for Delft all."""
    experiment, summary = run_small(**PRETRAIN, method__cas_epochs=3, method__protocol=protocol, rounds=1)
    config = experiment.config
    data = prepare(config.data, config.seed)
    images, labels = synthesis_of(config, data=data).images(np.array([5] * 5 + [4] * 5), config.seed)
    shape = ImageShape.of(data.source)
    module = build_module(config.model, shape, config.training)
    WeightLayout(module).write(torch.from_numpy(initial_weights(config.model, shape, config.training, config.seed)))
    owned = data.partition.owned()
    real, answers = [data.test_images], [data.test_labels]
    if protocol == "delft":
        real, answers = [*real, data.images[owned]], [*answers, data.labels[owned]]
    inputs = shape.normalise(np.concatenate(real), torch.device("cpu"))
    x, y = shape.normalise(images, torch.device("cpu")), torch.from_numpy(labels)
    adam, batches = torch.optim.Adam(module.parameters(), lr=1e-3), batches_of(45, 8, 3, (config.seed, "score", 0, 0))
    expected = []
    for number, rows in enumerate(batches, 1):
        adam.zero_grad()
        cross_entropy(module(x[rows]), y[rows]).backward()
        adam.step()
        if number % 6 == 0:  # 45 images in batches of 8
            with torch.no_grad():
                right = module(inputs).argmax(dim=1).numpy() == np.concatenate(answers)
            expected.append(right.mean())
    assert summary["cas_epochs"] == pytest.approx(expected, abs=0.51 / len(right))  # a last bit may turn an answer
    assert summary["cas"] == pytest.approx(100 * (np.mean(expected) if protocol == "delft" else expected[-1]), abs=0.1)


@pytest.fixture
def host(small: Callable[..., RunConfig]) -> ClientHost:
    """Of a module with batch norm and dropout."""
    config = small()
    data = prepare(config.data, 0)
    job = Job(Component("tests.fl_ray.own:OwnModule"), ImageShape.of(data.source), config.training, 0, 1, 1)
    arrays = JobData.of(data)
    return ClientHost(job, arrays)


@pytest.mark.parametrize("size", [8, 13])  # 13: the last of 40 joins the batch before, as batch norm asks
def test_epochs_one_by_one_are_a_training_at_once(host: ClientHost, size: int) -> None:
    job, adam = host.job, TrainingConfig("adam", 1e-2, batch_size=size)
    images, labels = host.data.images[:40], host.data.labels[:40]
    weights = initial_weights(job.model, job.shape, job.training, 0)
    at_once, _ = host.train_on(images, labels, weights, 0, 3, adam)
    state = ServerTraining(weights)
    for epoch in range(3):
        assert state.epochs == epoch
        torch.rand(epoch + 1)  # others may draw meanwhile
        state = pickle.loads(pickle.dumps(host.train_epoch(images, labels, state, adam, "server")))
    assert np.array_equal(state.weights, at_once)
    other = host.train_epoch(images, labels, ServerTraining(state.weights, 2), adam, "server")
    again = host.train_epoch(images, labels, ServerTraining(state.weights, 2, state.left), adam, "server")
    assert not np.array_equal(other.weights, again.weights)  # what is left does count


class CountsInNumpy(torch.optim.SGD):
    """Its state has a number of numpy's; with ``own`` an object of its own, too."""

    own = False

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            group["steps"] = np.int64(group.get("steps", 0) + 1)
            group["own"] = Path("a") if self.own else None


def test_an_optimiser_s_state_holds_numbers_and_nothing_else(host: ClientHost, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(host.module)
    monkeypatch.setattr(kind, "configure_optimizers", lambda module: CountsInNumpy(module.parameters(), 0.1))
    weights = initial_weights(host.job.model, host.job.shape, host.job.training, 0)
    known, training = (host.data.images[:40], host.data.labels[:40]), TrainingConfig(batch_size=8)
    first = host.train_epoch(*known, ServerTraining(weights), training, "server")
    second = host.train_epoch(*known, first, training, "server")
    assert 0 < second.loss < first.loss
    monkeypatch.setattr(CountsInNumpy, "own", True)
    bad = host.train_epoch(*known, ServerTraining(weights), training, "server")
    with pytest.raises(SettingError, match=r"OwnModule: its optimiser CountsInNumpy keeps more in its state"):
        host.train_epoch(*known, bad, training, "server")


@pytest.mark.parametrize(("protocol", "modes"), [("clean", [True] * 3), ("delft", [True, False, False])])
def test_delft_stays_in_evaluation_mode_after_an_epoch_of_cas(
    run_small: Run, monkeypatch: pytest.MonkeyPatch, protocol: str, modes: list[bool]
) -> None:
    plain, seen = InProcessRuntime.train_epoch, []

    def train(runtime: InProcessRuntime, *arguments: Any, training_mode: bool = True) -> ServerTraining:
        seen.append((arguments[3], training_mode))
        return plain(runtime, *arguments, training_mode=training_mode)

    monkeypatch.setattr(InProcessRuntime, "train_epoch", train)
    run_small(**PRETRAIN, method__cas_epochs=3, method__protocol=protocol, rounds=1)
    assert seen == [("score", mode) for mode in modes] + [("server", True)] * 2


@pytest.mark.parametrize("moves", [True, False])
def test_running_statistics_stay_in_evaluation_mode(host: ClientHost, moves: bool) -> None:
    job, adam = host.job, TrainingConfig("adam", 1e-2, batch_size=8)
    weights = initial_weights(job.model, job.shape, job.training, 0)
    known = host.data.images[:40], host.data.labels[:40]
    first = host.train_epoch(*known, ServerTraining(weights), adam, "score")
    second = host.train_epoch(*known, first, adam, "score", training_mode=moves)
    named = [host.layout.named(state.weights) for state in (first, second)]
    running = [torch.cat([v.flatten().float() for name, v in each.items() if "running" in name]) for each in named]
    assert (not torch.equal(*running)) == moves
    assert not np.array_equal(first.weights, second.weights)


def test_what_is_kept_of_a_start_outlives_a_refusal(
    small: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a cluster has lost its last node: bad input takes its new folder away, but not with work in it."""
    config, plain = small(**PRETRAIN, method__cas_epochs=2), InProcessRuntime.train_epoch

    def lost(runtime: InProcessRuntime, images: Any, before: ServerTraining, *how: Any, **more: Any) -> ServerTraining:
        if before.epochs == 1:
            raise PlacementError("no node has the room")
        return plain(runtime, images, before, *how, **more)

    monkeypatch.setattr(InProcessRuntime, "train_epoch", lost)
    (tmp_path / "run").mkdir()
    with open_runtime(config) as runtime:
        with pytest.raises(PlacementError):
            Experiment(config, tmp_path / "run", runtime).run()
        monkeypatch.setattr(InProcessRuntime, "train_epoch", plain)
        summary = Experiment(config, tmp_path / "run", runtime, resume=True).run()
    assert len(summary["cas_epochs"]) == 2


def test_a_start_that_returns_its_weights_is_refused(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GenFLPretrain, "start", lambda method, run, weights: weights)
    with pytest.raises(TypeError, match=r"GenFLPretrain\.start must yield weights \(1210,\)"):
        run_small(**PRETRAIN)


def test_class_balanced_shares() -> None:
    """Client 0 has all of class 0 and 10 of 40 of class 1, client 1 the rest: (1 + 1/4) / 2 and (0 + 3/4) / 2."""

    class Data:
        def counts(self, clients: np.ndarray) -> np.ndarray:
            return np.array([[10, 10, 0], [0, 30, 0]])[clients]

    run = type("Run", (), {"data": Data()})()
    shares = GenFLPretrain(weighting="class_balanced").balanced(run, [Task(0, 0.4), Task(1, 0.6)])
    assert [task.share for task in shares] == pytest.approx([0.625, 0.375])


def test_a_run_is_averaged_by_class_balanced_shares(run_small: Run) -> None:
    """Two clients, one round: what each of them trained follows from a round of that client alone."""
    settings = {"data__clients": 2, "rounds": 1, "method__name": "genfl_pretrain", "method__pretrain_epochs": 0}
    balanced, summary = run_small(**settings, clients_per_round=2, method__weighting="class_balanced")
    sized, plain = run_small(**settings, clients_per_round=2)
    data = prepare(balanced.config.data, 0)
    counts = data.counts(np.arange(2))
    one, one_summary = run_small(**settings, clients_per_round=1)
    sizes = counts.sum(axis=1)
    assert sizes[0] != sizes[1]
    own = int(np.flatnonzero(sizes == one_summary["samples_trained"])[0])
    shares = np.array([counts[:, c] / counts[:, c].sum() for c in range(10) if counts[:, c].sum()]).mean(axis=0)
    rho = sizes / sizes.sum()
    assert abs(shares[0] - rho[0]) > 0.001
    for name, found in final(balanced).items():
        mine = final(one)[name].double()
        other = (final(sized)[name].double() - rho[own] * mine) / rho[1 - own]
        expected = shares[own] * mine + shares[1 - own] * other
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    assert summary["bytes_up"] - plain["bytes_up"] == 2 * 10 * 8  # each client's counts, once
    assert summary["label_sharing"]["level"] == "counts"


CUTS = [("score", 0), ("score", 2), ("server", 0), ("server", 1), ("done", 0), ("rounds", 0)]


@pytest.mark.parametrize(("purpose", "epoch"), CUTS)
def test_a_run_cut_before_its_rounds_goes_on_from_there(
    small: Callable[..., RunConfig],
    run_small: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    purpose: str,
    epoch: int,
) -> None:
    """In an epoch of CAS or of the pre-training, right after them, or in the first round: none is done again."""
    settings = {**PRETRAIN, "method__cas_epochs": 3, "method__weighting": "class_balanced"}
    whole, expected = run_small(**settings)
    config, folder = small(**settings), tmp_path / "cut"
    folder.mkdir()
    plain, trained = InProcessRuntime.train_epoch, []

    def cut(*arguments: object) -> None:
        raise KeyboardInterrupt

    def train(
        runtime: InProcessRuntime, images: Any, before: ServerTraining, *how: Any, **options: Any
    ) -> ServerTraining:
        if (how[1], before.epochs) == (purpose, epoch) and (purpose, epoch) not in trained:
            trained.append((purpose, epoch))
            raise KeyboardInterrupt
        trained.append((how[1], before.epochs))
        return plain(runtime, images, before, *how, **options)

    monkeypatch.setattr(InProcessRuntime, "train_epoch", train)
    with open_runtime(config) as runtime:
        with monkeypatch.context() as patch:
            if purpose == "rounds":
                patch.setattr("fl_ray.experiment.rounds", cut)
            if purpose == "done":  # as by a kill: the last step is kept, but not that it was the last
                save = checkpoint.save
                patch.setattr(
                    "fl_ray.experiment.checkpoint.save",
                    lambda folder, state: save(folder, state) if state.starting else cut(),
                )
            with pytest.raises(KeyboardInterrupt):
                Experiment(config, folder, runtime).run()
        resumed = Experiment(config, folder, runtime, resume=True)
        summary = resumed.run()
    epochs = [("score", 0), ("score", 1), ("score", 2), ("server", 0), ("server", 1)]
    assert sorted(trained) == sorted(epochs + [(purpose, epoch)] * (purpose in ("score", "server")))
    assert all(torch.equal(value, final(whole)[name]) for name, value in final(resumed).items())
    for name in ("cas", "cas_epochs", "pretrained_accuracy", "virtual_time_s", "bytes_up", "samples_trained"):
        assert summary[name] == expected[name]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"images": 0}, "images is 0"),
        ({"pretrain_lr": 0.0}, "pretrain_lr is 0"),
        ({"local_training": False, "pretrain_epochs": 0}, "nothing would be trained"),
    ],
)
def test_bad_settings(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GenFLPretrain(**settings)
