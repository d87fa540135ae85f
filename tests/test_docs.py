"""The tutorial's code runs, and the reference that is made from the code names all of it."""

import dataclasses
import importlib.util
import re
from pathlib import Path

from fl_ray.config import RunConfig
from fl_ray.registry import REGISTRY
from tests.conftest import Call

ROOT = Path(__file__).parent.parent
TUTORIAL = (ROOT / "docs" / "pages" / "index.md").read_text(encoding="utf-8")


def test_the_tutorials_own_model_and_method_run(tmp_path: Path, call: Call) -> None:
    for code in re.findall(r"```python\n(.*?)```", TUTORIAL, re.DOTALL):
        name = re.match(r"# (\w+\.py)", code)[1]
        (tmp_path / name).write_text(code, encoding="utf-8")
    commands = re.findall(r"^fl-ray run (\S+) (.*(?:mine|lazy):.*)$", TUTORIAL, re.MULTILINE)
    assert len(commands) == 2
    for number, (recipe, words) in enumerate(commands):
        small = ["--runtime.backend", "in_process", "--rounds", "2", "--tracking.enabled", "false"]
        done = call("run", str(ROOT / recipe), *words.split(), *small, "--output", f"out{number}")
        assert done.returncode == 0, done.stderr


def test_the_reference_names_every_setting_and_component() -> None:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs" / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    sections = reference.recipe_sections(None)
    for field in dataclasses.fields(RunConfig):
        assert f"| `{field.name}` |" in sections
    assert "Folder of the files; default $FL_RAY_DATA" in sections
    made = reference.components(None)
    for entries in REGISTRY.values():
        for name in entries:
            assert f"### {name}\n" in made
    assert "M, steps of noise editing" in made
    assert "| `server.train` | `full` | the `full` model, or its `head` alone" in made
    assert re.search(r"\| `trials` \| `10` \| how many", reference.study_keys(None))


def test_every_page_is_in_the_navigation_and_every_mark_is_known() -> None:
    navigation = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs" / "pages").rglob("*.md"):
        assert page.relative_to(ROOT / "docs" / "pages").as_posix() in navigation
        for mark in re.findall(r"<!-- make: (\w+)", page.read_text(encoding="utf-8")):
            assert f'"{mark}"' in (ROOT / "docs" / "reference.py").read_text(encoding="utf-8")
