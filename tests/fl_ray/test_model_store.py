"""Trained models shared at addresses and in MLflow's registry: whole or not there, checked, trained once for all."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from fl_ray.comparison import result_settings
from fl_ray.config import RunConfig
from fl_ray.errors import OutputError, SettingError
from fl_ray.experiment import Experiment, check
from fl_ray.model_store.base import MANIFEST, ModelStore
from fl_ray.model_store.files import FileStore
from fl_ray.model_store.registry import EXPERIMENT, RegistryStore
from fl_ray.model_store.start import open_store
from fl_ray.runtime.start import open_runtime
from fl_ray.tracking_store import quiet_client
from tests.conftest import TINY_GENERATOR, Call, small_recipe
from tests.fl_ray.own import Heard
from tests.fl_ray.test_client_models import assert_same
from tests.serving import free_port, mlflow_page

Small = Callable[..., RunConfig]
ONE_SHOT = {
    "rounds": 1,
    "clients_per_round": None,
    "data__clients": 3,
    "method__name": "ensemble",
    "method__client_models": ["tests.fl_ray.own:Hooked"],
}
GUIDED = {
    **ONE_SHOT,
    "method__name": "feddf",
    "method__distil_on": "synthetic",
    "method__images_per_class": 2,
    "method__server__epochs": 1,
    "with_generator": True,
}
CLOSED = "http://127.0.0.1:9"


@dataclass
class Place:
    """A store: the settings that name it, and how to get at a file in it."""

    settings: dict[str, str]
    damage: Callable[[], None]
    """Change a byte of the generator that was published last."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An MLflow server on loopback, and its folder."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    with mlflow_page(command, port, folder) as address:
        yield address, folder


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A store in a file, and the folder of its artifacts."""
    folder = tmp_path_factory.mktemp("sqlite")
    uri = f"sqlite:///{folder}/mlflow.db"
    with contextlib.chdir(folder):  # where MLflow puts artifacts
        RegistryStore("mlflow", uri, lambda text: None).reach()
    return uri, folder


@pytest.fixture(params=["memory", "file", "sqlite", "server"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    if request.param in ("memory", "file"):
        address = f"memory://{tmp_path.name}/models" if request.param == "memory" else f"file://{tmp_path}/models"
        there, root = fsspec.core.url_to_fs(address)

        def change() -> None:
            path = max(there.find(f"{root}/generators"), key=there.size)
            there.pipe_file(path, flipped(there.cat_file(path)))

        return Place({"model_store": address}, change)
    uri, folder = request.getfixturevalue(request.param)

    def change_artifact() -> None:
        file = max(folder.rglob("artifacts/files/deep/*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        file.write_bytes(flipped(file.read_bytes()))

    return Place({"model_store": "mlflow", "tracking__uri": uri}, change_artifact)


def flipped(content: bytes) -> bytes:
    """The same with one bit of its last byte changed."""
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """An empty cache from now on, as on another machine; its folder."""

    def made() -> Path:
        folder = tmp_path / f"cache{len(list(tmp_path.glob('cache*')))}"
        folder.mkdir()
        monkeypatch.setenv("FL_RAY_CACHE", str(folder))
        return folder

    return made


@pytest.fixture
def run(small: Small, tmp_path: Path) -> Callable[..., tuple[Experiment, dict[str, Any], list[str]]]:
    """Run a small recipe; also what it told."""

    def made(**overrides: Any) -> tuple[Experiment, dict[str, Any], list[str]]:
        config, heard = small(**overrides), Heard()
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        folder.mkdir()
        with open_runtime(config) as runtime:
            experiment = Experiment(config, folder, runtime, heard)
            return experiment, experiment.run(), heard.told

    return made


def test_a_second_machine_trains_nothing(
    place: Place, run: Callable[..., Any], fresh: Callable[[], Path], steps: list[int]
) -> None:
    fresh()
    first, summary, told = run(**GUIDED, **place.settings)
    assert summary["synthesis"]["train_seconds"] > 0
    assert sum("is published in" in text for text in told) == 2
    trained = len(steps)
    cache = fresh()
    second, summary, told = run(**GUIDED, **place.settings)
    assert summary["synthesis"]["train_seconds"] == 0
    assert summary["client_models"]["from_cache"]
    assert len(steps) == trained > 0
    assert sum("is brought from" in text for text in told) == 2
    assert not any("is published in" in text for text in told)
    assert_same(first.folder, second.folder)
    assert sorted(path.name for path in cache.iterdir()) == ["client_models", "generators"]


def test_a_machine_that_finds_damage_trains_and_mends(
    run: Callable[..., Any], fresh: Callable[[], Path], steps: list[int], tmp_path: Path
) -> None:
    settings, store = {**GUIDED, "model_store": f"file://{tmp_path}/models"}, tmp_path / "models"
    fresh()
    first, *_ = run(**settings)
    trained = len(steps)
    for kind in ("generators", "client_models"):
        file = max((path for path in store.glob(f"{kind}/*/*")), key=lambda path: path.stat().st_size)
        file.write_bytes(flipped(file.read_bytes()))
    fresh()
    second, summary, told = run(**settings)
    assert summary["synthesis"]["train_seconds"] > 0
    assert len(steps) == 2 * trained
    assert sum("is not as it was published" in text and "another SHA-256" in text for text in told) == 2
    assert sum("is published in" in text for text in told) == 2
    assert_same(first.folder, second.folder)
    fresh()
    _, summary, told = run(**settings)
    assert summary["client_models"]["from_cache"]
    assert not any("is not as" in text for text in told)


def test_pretraining_publishes_what_the_cache_had(place: Place, tmp_path: Path, call: Call, small: Small) -> None:
    content = small_recipe() | {"data": {"name": "digits", "max_samples": 600, "public_fraction": 0.2}}
    content["generator"] = {**TINY_GENERATOR, "train_steps": 5}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    words = ["pretrain", "small.yaml", "--generator.cache"]
    assert "trained in" in call(*words, "here").stdout
    named = [word for name, value in place.settings.items() for word in (f"--{name.replace('__', '.')}", value)]
    here = call(*words, "here", *named)
    assert here.returncode == 0, here.stderr
    assert "found, trained before" in here.stdout
    assert "is published in" in here.stderr
    (tmp_path / "there" / "generators").mkdir(parents=True)
    (weights,) = (tmp_path / "here").glob("generators/*/weights")
    draft = tmp_path / "there" / "generators" / weights.parent.name / ".weights.part"
    draft.mkdir(parents=True)
    (draft / "training.ckpt").write_bytes(b"of a training that was cut")
    there = call(*words, "there", *named)
    assert "found, trained before" in there.stdout
    assert "is brought from" in there.stderr
    found = {path.relative_to(weights): path.read_bytes() for path in weights.rglob("*") if path.is_file()}
    copy = draft.with_name("weights")
    assert found == {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def folder_of(path: Path, value: float, size: int = 100_000) -> Path:
    """A trained model."""
    (path / "deep").mkdir(parents=True)
    save_file({"x": np.full(size, value, dtype=np.float32)}, path / "deep" / "weights.safetensors")
    (path / "settings.json").write_text(json.dumps({"value": value}))
    return path


def opened(place: Place, small: Small, heard: Heard | None = None) -> ModelStore:
    """The place's store, reached."""
    store = open_store(small(**place.settings), heard.message if heard else lambda text: None)
    store.reach()
    return store


def test_of_two_that_publish_at_once_one_is_seen_whole(place: Place, small: Small, tmp_path: Path) -> None:
    folders = [folder_of(tmp_path / str(number), number) for number in range(2)]
    stores = [opened(place, small) for _ in folders]
    both = [
        threading.Thread(target=store.publish, args=("generators", "both-0123", folder, True))
        for store, folder in zip(stores, folders, strict=True)
    ]
    for thread in both:
        thread.start()
    seen = 0
    while any(thread.is_alive() for thread in both) or not seen:
        heard = Heard()
        if opened(place, small, heard).bring("generators", "both-0123", tmp_path / "got"):
            value = json.loads((tmp_path / "got" / "settings.json").read_text())["value"]
            assert (load_file(tmp_path / "got" / "deep" / "weights.safetensors")["x"] == value).all()
            seen += 1
        assert not any("is not as" in text for text in heard.told)
    for thread in both:
        thread.join()


def test_damage_is_told_and_published_anew(place: Place, small: Small, tmp_path: Path) -> None:
    heard, folder = Heard(), folder_of(tmp_path / "one", 1)
    store = opened(place, small, heard)
    store.publish("generators", "damaged-0123", folder, False)
    place.damage()
    assert not store.bring("generators", "damaged-0123", tmp_path / "got")
    assert "deep/weights.safetensors has another SHA-256" in heard.told[-1]
    assert not (tmp_path / "got").exists()
    store.publish("generators", "damaged-0123", folder, False)  # as long as it is not known to be damaged
    assert not store.bring("generators", "damaged-0123", tmp_path / "got")
    store.publish("generators", "damaged-0123", folder, True)
    assert store.bring("generators", "damaged-0123", tmp_path / "got")
    name = "deep/weights.safetensors"
    assert (tmp_path / "got" / name).read_bytes() == (folder / name).read_bytes()


def test_what_is_not_published_is_not_there(place: Place, small: Small, tmp_path: Path) -> None:
    store = opened(place, small)
    store.publish("generators", "one-0123", folder_of(tmp_path / "one", 1), False)
    for kind, key in (("generators", "two-0123"), ("client_models", "one-0123"), ("generators", "one-012")):
        assert not store.bring(kind, key, tmp_path / "got")
    assert not (tmp_path / "got").exists()


@pytest.fixture
def at_file(tmp_path: Path) -> FileStore:
    """A store in a folder here."""
    heard = Heard()
    store = FileStore(f"file://{tmp_path}/models", heard.message)
    store.heard = heard
    return store


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("../outside.json", "which is no file of a model"),
        ("deep/../../outside.json", "which is no file of a model"),
        ("/tmp/outside.json", "which is no file of a model"),
        ("..\\outside.json", "which is no file of a model"),
        ("C:outside.json", "which is no file of a model"),
        ("weights.bin", "which is no file of a model"),
        ("weights.pkl", "which is no file of a model"),
        ("", "which is no file of a model"),
    ],
)
def test_names_outside_are_refused(name: str, why: str, at_file: FileStore, tmp_path: Path) -> None:
    at_file.publish("generators", "one-0123", folder_of(tmp_path / "one", 1), False)
    manifest = tmp_path / "models" / "generators" / "one-0123" / MANIFEST
    content = json.loads(manifest.read_text())
    content["files"][name] = content["files"].pop("settings.json")
    manifest.write_text(json.dumps(content))
    before = {path for path in tmp_path.rglob("*")}
    assert not at_file.bring("generators", "one-0123", tmp_path / "got")
    assert why in at_file.heard.told[-1]
    assert {path for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: "{", "its manifest is no JSON"),
        (lambda content: json.dumps([]), "its manifest is another's"),
        (lambda content: json.dumps({**content, "key": "two-0123"}), "its manifest is another's"),
        (lambda content: json.dumps({**content, "format": 0}), "its manifest is another's"),
        (lambda content: json.dumps({**content, "files": {"a.json": "../../x"}}), "has no SHA-256 of a.json"),
        (lambda content: json.dumps({**content, "files": {"a.json": "0" * 64}}), "a.json is missing"),
    ],
)
def test_a_manifest_that_is_not_as_it_was(
    change: Callable[[dict[str, Any]], str], why: str, at_file: FileStore, tmp_path: Path
) -> None:
    at_file.publish("generators", "one-0123", folder_of(tmp_path / "one", 1), False)
    manifest = tmp_path / "models" / "generators" / "one-0123" / MANIFEST
    manifest.write_text(change(json.loads(manifest.read_text())))
    assert not at_file.bring("generators", "one-0123", tmp_path / "got")
    assert why in at_file.heard.told[-1]
    at_file.publish("generators", "one-0123", tmp_path / "one", True)
    assert at_file.bring("generators", "one-0123", tmp_path / "got")


def test_only_safetensors_and_json_are_published(at_file: FileStore, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "one", 1)
    np.save(folder / "images.npy", np.zeros(3))
    at_file.publish("generators", "one-0123", folder, False)
    assert "it holds images.npy, and only safetensors and JSON are shared" in at_file.heard.told[-1]
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "wanted.json").write_text("{}")  # of a generator that is never trained
    at_file.publish("generators", "two-0123", tmp_path / "two", False)
    assert not (tmp_path / "models").exists()


def test_files_without_their_manifest_are_not_there(
    at_file: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(*arguments: object) -> None:
        raise KeyboardInterrupt

    folder = folder_of(tmp_path / "one", 1)
    with monkeypatch.context() as patch:
        patch.setattr(type(at_file._there), "pipe_file", cut)
        with pytest.raises(KeyboardInterrupt):
            at_file.publish("generators", "one-0123", folder, False)
    assert len(list((tmp_path / "models" / "generators" / "one-0123").iterdir())) == 2
    assert not at_file.bring("generators", "one-0123", tmp_path / "got")
    at_file.publish("generators", "one-0123", folder, False)
    assert at_file.bring("generators", "one-0123", tmp_path / "got")


def test_a_store_that_goes_away_later_is_told_and_the_run_goes_on(
    run: Callable[..., Any], fresh: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    def away(*arguments: object) -> None:
        raise OSError("the bucket is away")

    address = f"file://{tmp_path}/models"
    cache = fresh()
    monkeypatch.setattr(FileStore, "_has", away)
    _, summary, told = run(**GUIDED, model_store=address)
    assert summary["status"] == "finished"
    assert sum(f"model_store {address}: the bucket is away; what may be there is trained here" in t for t in told) == 2
    monkeypatch.setattr(FileStore, "_put", away)
    shutil.rmtree(cache)
    _, summary, told = run(**GUIDED, model_store=address)
    assert summary["status"] == "finished"
    for kept in ("the generator is kept in", "the clients' models are kept in"):
        assert sum(f"model_store {address}: the bucket is away; {kept}" in text for text in told) == 1
    content = small_recipe() | {"generator": {**TINY_GENERATOR, "train_steps": 5}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
    said = call("pretrain", "small.yaml", "--model_store", address)
    assert said.returncode == 2
    assert said.stderr.splitlines()[-1] == f"fl-ray: model_store {address}: the bucket is away"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_store": "file://{here}/a_file/models"},
            "model_store file://.*a_file/models: .*Not a directory.*name an",
        ),
        ({"model_store": "nowhere://models"}, "model_store nowhere://models: Protocol not known: nowhere"),
        ({"model_store": "mlflow", "tracking__uri": CLOSED}, f"model_store mlflow .{CLOSED}.: .*start the server"),
    ],
)
def test_a_store_that_is_away_is_refused_at_the_start(
    settings: dict[str, str], message: str, small: Small, tmp_path: Path, fresh: Callable[[], Path], call: Call
) -> None:
    cache = fresh()
    (tmp_path / "a_file").write_text("")
    named = {name: value.format(here=tmp_path) for name, value in settings.items()}
    with pytest.raises(OutputError, match=message):
        check(small(**ONE_SHOT, **named))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small_recipe() | {"generator": TINY_GENERATOR}))
    words = [word for name, value in named.items() for word in (f"--{name.replace('__', '.')}", value)]
    said = call("pretrain", "small.yaml", *words)
    assert said.returncode == 2
    assert said.stderr.splitlines()[-1].startswith("fl-ray: model_store ")
    assert not list(cache.iterdir())


def test_what_is_no_store_is_refused(small: Small) -> None:
    with pytest.raises(SettingError, match="model_store is a/folder, but it must be mlflow, or an address"):
        small(model_store="a/folder")


def test_a_registry_whose_experiment_is_deleted_is_refused(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/store.db"
    store = open_store(small(model_store="mlflow", tracking__uri=uri))
    store.reach()
    store.reach()  # what is there already is no error
    client = quiet_client(uri)
    client.delete_experiment(client.get_experiment_by_name(EXPERIMENT).experiment_id)
    with pytest.raises(SettingError, match=f"its experiment {EXPERIMENT} is deleted; restore it"):
        store.reach()


def test_where_models_are_shared_makes_no_other_results(small: Small) -> None:
    assert result_settings(small(model_store="mlflow")) == result_settings(small())
