"""``fl-ray pretrain`` and ``generate``: found again, over a kill, with a manifest that holds, for any number."""

from __future__ import annotations

import csv
import hashlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fl_ray.config import RunConfig
from fl_ray.errors import SettingError
from fl_ray.image_export import export_images
from fl_ray.progress import Progress
from fl_ray.synthesis import Synthesis
from generators.cache import TRAINED_FILE
from tests.conftest import TINY_GENERATOR, Call
from tests.fl_ray.own import Heard
from tests.generators.tiny_pipelines import text_pipeline
from tests.synthesis import synthesis_of

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    content = {
        "name": "small",
        "data": {"name": "digits", "clients": 6, "max_samples": 600, "public_fraction": 0.2},
        "generator": {**TINY_GENERATOR, "cache": str(tmp_path / "cache")},
        "runtime": {"backend": "in_process"},
        "tracking": {"enabled": False},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def trained(said: str) -> Path:
    return Path(next(line for line in said.splitlines() if line.startswith("weights: ")).removeprefix("weights: "))


def test_pretrain_trains_once_and_says_where(recipe: Path, call: Call) -> None:
    first = call("pretrain", "small.yaml")
    assert first.returncode == 0, first.stderr
    assert "diffusion, trained in" in first.stdout
    assert (trained(first.stdout) / "unet").is_dir()
    again = call("pretrain", "small.yaml", "--generator.steps", "5")  # sampling alone
    assert "found, trained before" in again.stdout
    assert trained(again.stdout) == trained(first.stdout)


def test_pretrain_goes_on_after_a_kill(recipe: Path, tmp_path: Path, call: Call) -> None:
    words = ["pretrain", "small.yaml", "--generator.train_steps", "100"]
    often = "import generators.training as t; t.CHECKPOINT_EVERY_S = 0.0\n"
    code = f"{often}from fl_ray.cli import main; raise SystemExit(main({words}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("cache/**/training.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (draft,) = tmp_path.glob("cache/**/.weights.part")
    assert not (draft / "unet").exists()
    resumed = call(*words)
    assert "pre-training the generator" in resumed.stderr
    assert "from the checkpoint of a training that was interrupted" in resumed.stderr
    cut = trained(resumed.stdout)
    whole = trained(call(*words, "--generator.cache", str(tmp_path / "other")).stdout)
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(cut)) for path in cut.rglob("*") if path.is_file())
    alike = [name for name in names if name != TRAINED_FILE]  # which has the seconds that it took
    assert all((whole / name).read_bytes() == (cut / name).read_bytes() for name in alike)


def test_ctrl_c_in_pretraining_is_an_interrupt(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fl_ray", "pretrain", "small.yaml", "--generator.train_steps", "100000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    deadline = time.monotonic() + 240
    while "pre-training the generator" not in (line := process.stderr.readline()) and time.monotonic() < deadline:
        assert process.poll() is None, line
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors


def test_generate_writes_images_and_where_they_come_from(recipe: Path, tmp_path: Path, call: Call) -> None:
    words = ("generate", "small.yaml", "--sampling_seed", "3")
    found = call(*words, "--per_class", "7", "--output", "images")
    assert found.returncode == 0, found.stderr
    assert "images: 70 in images" in found.stdout
    rows = rows_of(tmp_path / "images")
    assert len({row["file"] for row in rows}) == 70
    assert {row["class"] for row in rows} == {str(digit) for digit in range(10)}
    for row in rows:
        content = (tmp_path / "images" / row["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        assert row["file"] == f"{row['class']}/{int(row['index']):06d}.png"
        assert (row["seed"], row["prompt"]) == ("3", "")
    provenance = json.loads((tmp_path / "images" / "provenance.json").read_text())
    assert provenance["weights_sha256"] == rows[0]["weights"]
    assert provenance["training"]["key"] == rows[0]["generator_key"]
    assert provenance["sampling"]["key"] == rows[0]["sampling_key"]
    assert provenance["generator"] == "diffusion"
    (manifest,) = tmp_path.glob(f"cache/generators/diffusion-{rows[0]['generator_key']}/images-*/manifest.json")
    assert manifest.parent.name == f"images-{rows[0]['sampling_key']}"
    content = json.loads(manifest.read_text())
    assert content["training"]["settings"]["train_steps"] == 30
    assert content["sampling"]["settings"]["steps"] == 3
    assert {"torch", "diffusers"} <= set(content["versions"])
    fewer = call(*words, "--per_class", "2", "--output", "fewer")
    assert fewer.returncode == 0
    for row in rows_of(tmp_path / "fewer"):
        assert (tmp_path / "fewer" / row["file"]).read_bytes() == (tmp_path / "images" / row["file"]).read_bytes()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    used = call(*words, "--per_class", "2", "--output", "used")
    assert used.returncode == 2
    assert "in use" in used.stderr


def test_generate_goes_on_in_its_own_folder(recipe: Path, tmp_path: Path, call: Call) -> None:
    """After an interrupt, or with a greater number; never among other images."""
    words = ("generate", "small.yaml", "--output", "images", "--per_class")
    assert call(*words, "7").returncode == 0
    manifest, shown = tmp_path / "images" / "manifest.csv", tmp_path / "images" / "3" / "000006.png"
    whole, picture = manifest.read_bytes(), shown.read_bytes()
    manifest.write_bytes(whole[:300])
    shown.write_bytes(picture[:20])
    assert call(*words, "7").returncode == 0
    assert (manifest.read_bytes(), shown.read_bytes()) == (whole, picture)
    assert call(*words, "11").returncode == 0  # one more than the blocks of 5 have
    assert len(rows_of(tmp_path / "images")) == 110
    for more, said in (
        (("11", "--sampling_seed", "4"), r"images: it holds other images \(another seed"),
        (("11", "--generator.steps", "2"), r"it holds other images \(another sampling"),
        (("11", "--generator.train_steps", "10000000"), r"it holds other images \(another training"),  # none of them
        (("8",), "it was begun with 11 images of each class, more than --per_class 8"),
    ):
        found = call(*words, *more)
        assert found.returncode == 2
        assert re.search(said, found.stderr), found.stderr
    assert len(rows_of(tmp_path / "images")) == 110


def test_generate_nothing_trains_nothing(recipe: Path, tmp_path: Path, call: Call) -> None:
    found = call("generate", "small.yaml", "--per_class", "0", "--output", "none")
    assert found.returncode == 0, found.stderr
    assert rows_of(tmp_path / "none") == []
    assert not (tmp_path / "cache").exists()


def test_a_refused_generate_leaves_no_folder_that_refuses_the_next(recipe: Path, tmp_path: Path, call: Call) -> None:
    """What is wrong is only told by the pipeline when images are made."""
    settings = ("--generator", f"{{name: text_to_image, model: {text_pipeline(tmp_path / 'tiny')}, steps: 2}}")
    words = ("generate", "small.yaml", *settings, "--per_class", "1", "--output", "images")
    refused = call(*words, "--generator.size", "33")
    assert refused.returncode == 2
    assert "size is 33" in refused.stderr
    assert not (tmp_path / "images").exists()
    assert call(*words, "--generator.size", "16").returncode == 0
    unknown = call(*words, "--generator.class_names", "{hamster: x}", "--output", "other")  # with weights that are kept
    assert unknown.returncode == 2
    assert "class_names: the data have no class hamster" in unknown.stderr
    choice = call(*words, "--generator.scheduler", "euler", "--output", "other")
    assert choice.returncode == 2
    assert "typing" not in choice.stderr
    assert "'ddim', 'ddpm', 'dpmpp'" in choice.stderr


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("generate", "small.yaml", "--per_class", "-1"), "--per_class is -1"),
        (("generate", "small.yaml", "--per_class", "1", "--sampling_seed", "-1"), "--sampling_seed is -1"),
        (("pretrain", "small.yaml", "--generator.widths", "[8, 8, 8, 8, 8]"), "not divisible"),
        (("pretrain", "plain.yaml"), "plain.yaml has no generator"),
        (("pretrain", "small.yaml", "--generator.name", "dit"), "generator.*model"),
        (("generate", "small.yaml", "--per_class", "1", "--generator.guidance", "0"), "diffusion knows no classes"),
        (
            (
                "generate",
                "small.yaml",
                "--generator.name",
                "text_to_image",
                "--per_class",
                "1",
                "--generator.model",
                "a",
            ),
            "generator text_to_image: model is a: there is no folder",
        ),
    ],
)
def test_bad_input_is_one_clear_message(
    recipe: Path, tmp_path: Path, call: Call, words: tuple[str, ...], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "plain.yaml").write_text("data: {name: digits}\nruntime: {backend: in_process}\n")
    found = call(*words, "--output", "out") if words[0] == "generate" else call(*words)
    assert found.returncode == 2, found.stderr
    assert re.search(match, found.stderr), found.stderr
    assert found.stderr.splitlines()[-1].startswith("fl-ray: ")
    assert not (tmp_path / "out").exists()


def flat(
    small: Callable[..., RunConfig], block_size: int, tmp_path: Path, progress: Progress | None = None
) -> Synthesis:
    """A generator that costs nothing, two classes of 4 x 4 pixels."""
    config = small(
        data__name="tests.fl_ray.own:stripes",
        generator={"name": "tests.generators.own:FlatGenerator", "block_size": block_size, "cache": str(tmp_path)},
    )
    return synthesis_of(config, progress=progress)


def test_memory_does_not_grow_with_the_number_of_images(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Six thousand images against two hundred, first from the pool and then from the cache.

    Of two such the smaller one: other threads of the test session may allocate meanwhile, by chance.
    """
    synthesis = flat(small, 50, tmp_path / "cache")
    peaks: list[int] = []
    for per_class, seed in ((100, 0), (3000, 0), (3000, 0), (3000, 1), (3000, 1)):
        folder = tmp_path / str(len(peaks))
        folder.mkdir()
        tracemalloc.start()
        assert export_images(synthesis, per_class, seed, folder) == 2 * per_class
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    few, *many = peaks
    for made_or_found in (many[::2], many[1::2]):
        assert min(made_or_found) < few + 300_000  # 6,000 rows of the manifest alone are a megabyte
    assert len(rows_of(tmp_path / "1")) == 6000
    assert (tmp_path / "1" / "bright" / "002999.png").exists()


def test_a_million_images_of_a_class_begin_at_once(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    synthesis = flat(small, 100, tmp_path)
    start = time.monotonic()
    stream = synthesis.stream(np.full(2, 1_000_000), 0)
    next(stream)
    assert time.monotonic() - start < 120  # to see that none of 20,000 blocks is there; making them takes far longer
    stream.close()
    tracemalloc.start(10)
    stream = synthesis.stream(np.full(2, 1_000_000), 0)
    for _ in range(3):
        next(stream)
    taken = tracemalloc.take_snapshot()
    tracemalloc.stop()
    stream.close()
    # What this call holds, not what Ray's or MLflow's threads of the test session happen to allocate meanwhile.
    held = taken.filter_traces([tracemalloc.Filter(True, inspect.getfile(Synthesis), all_frames=True)])
    assert 0 < sum(trace.size for trace in held.traces) < 500_000


def test_class_names_that_no_folder_may_have(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    synthesis = flat(small, 2, tmp_path / "cache")
    synthesis.trained.prepare()
    synthesis.data.source.classes[:] = ["../up", "a/b%"]
    (tmp_path / "out").mkdir()
    export_images(synthesis, 1, 0, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "%2E.%2Fup",
        "a%2Fb%25",
        "manifest.csv",
        "provenance.json",
    }
    assert not (tmp_path / "up").exists()


def test_prompts_stand_in_the_manifest(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Text-to-image by the way that a run takes: no public images, other size and channels."""
    generator = {
        "name": "text_to_image",
        "model": str(text_pipeline(tmp_path / "model")),
        "prompts": ["a {class}", "the {class}"],
        "steps": 2,
        "block_size": 4,
        "class_names": {"dark": "night"},
    }
    config = small(data__name="tests.fl_ray.own:stripes", data__public_fraction=0.0, generator=generator)
    synthesis = synthesis_of(config)
    (tmp_path / "out").mkdir()
    export_images(synthesis, 2, 5, tmp_path / "out")
    prompts = {row["file"]: row["prompt"] for row in rows_of(tmp_path / "out")}
    assert prompts == {
        "dark/000000.png": "a night",
        "dark/000001.png": "the night",
        "bright/000000.png": "a bright",
        "bright/000001.png": "the bright",
    }
    with Image.open(tmp_path / "out" / "dark" / "000000.png") as image:
        assert (image.size, image.mode) == ((4, 4), "L")


def test_a_damaged_block_is_made_again_with_a_word(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    before, _ = flat(small, 5, tmp_path).images(np.array([5, 5]), 0)
    file = next(tmp_path.rglob("block_000000.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    heard = Heard()
    again = flat(small, 5, tmp_path, heard)
    after, _ = again.images(np.array([5, 5]), 0)
    assert (before == after).all()
    assert again.report()["images_made"] == 5
    assert heard.told == [f"{file} is damaged, so its images are made again"]


def test_what_a_sampler_refuses_is_a_setting(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = small(
        data__name="tests.fl_ray.own:stripes",
        generator={"name": "tests.generators.own:RaisingGenerator", "label": 1, "cache": str(tmp_path)},
    )
    synthesis = synthesis_of(config)
    with pytest.raises(SettingError, match=r"^generator tests\.generators\.own:RaisingGenerator: class 1 has run dry$"):
        synthesis.images(np.array([0, 1]), 0)
