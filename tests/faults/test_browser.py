"""Pages in a real browser (the system's Chromium, headless): MLflow's for a store, and our own report."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.conftest import small_recipe
from tests.serving import free_port, mlflow_page

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[test]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
PHONE = {"width": 390, "height": 844}
LETTERS = """() => [...document.querySelectorAll("figure svg text")].map((text) => {
    const shown = text.getScreenCTM();
    return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(shown.a, shown.b);
})"""  # of the figures, in pixels of the screen


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison's folder, with its runs in a store beside it."""
    folder = tmp_path_factory.mktemp("pages")
    entries = [{"label": "slow", "training.lr": 0.01}, {"label": "fast", "training.lr": 0.2}]
    recipe = small_recipe() | {"name": "paged", "rounds": 4, "tracking": {}, "compare": entries}
    (folder / "paged.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "fl_ray", "compare", "paged.yaml", "--seeds", "0", "1", "--output", "out"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def ui(made: Path) -> Iterator[str]:
    """``fl-ray ui`` on a free port."""
    port = free_port()
    with mlflow_page([sys.executable, "-m", "fl_ray", "ui", "--port", str(port)], port, made) as address:
        yield address


@pytest.fixture
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def visited(browser: object, address: str) -> object:
    """A new page at the address: MLflow's page keeps what it showed before, hidden."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(90_000)
    page.goto(address)
    return page


def test_mlflows_page_lists_the_runs_compares_them_and_opens_our_report(ui: str, made: Path, browser: object) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{made / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("paged").experiment_id
    runs = client.search_runs([experiment])
    assert len(runs) == 4
    place = f"{ui}/#/experiments/{experiment}"
    page = visited(browser, f"{place}/runs")
    for name in ("slow-seed0", "slow-seed1", "fast-seed0", "fast-seed1"):
        page.get_by_text(name, exact=True).first.wait_for()
    ids = ",".join(f'"{run.info.run_id}"' for run in runs)
    page = visited(browser, f'{ui}/#/compare-runs?runs=[{ids}]&experiments=["{experiment}"]')
    page.get_by_text("Comparing 4 Runs").first.wait_for()
    page.locator("svg.main-svg").first.wait_for()  # a chart over the runs
    page.get_by_text("final_accuracy").first.wait_for(state="attached")
    page = visited(browser, f"{place}/runs?compareRunsMode=CHART")
    page.get_by_text("energy_j", exact=True).first.wait_for()
    page.locator(".scatterlayer .trace").nth(3).wait_for(state="attached")  # a metric's lines, one for each run
    page = visited(browser, f"{place}/runs/{runs[0].info.run_id}/model-metrics")
    page.get_by_text("test_accuracy").first.wait_for()
    page.locator("svg.main-svg").first.wait_for()  # a metric's chart
    page = visited(browser, f"{place}/runs/{runs[0].info.run_id}/artifacts")
    page.get_by_text("report.html").first.click()
    frame = page.frame_locator("iframe").first
    frame.locator("h1").first.wait_for()


@pytest.mark.parametrize("width", ["desktop", "phone"])
@pytest.mark.parametrize("which", ["comparison", "run"])
def test_the_report_is_readable_offline_without_an_error(made: Path, browser: object, which: str, width: str) -> None:
    report = made / "out" / ("report.html" if which == "comparison" else "runs/fast/seed0/report.html")
    context = browser.new_context(offline=True, viewport=PHONE if width == "phone" else {"width": 1200, "height": 900})
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
    page.goto(report.as_uri())
    assert said == []
    assert page.locator("h1").inner_text()
    figures = page.locator("figure svg, figure img")
    assert figures.count() >= 1
    for place in range(figures.count()):
        box = figures.nth(place).bounding_box()
        assert box["width"] > 200
        assert box["height"] > 100
    sizes = page.evaluate(LETTERS)
    assert sizes
    assert all(8 <= size <= 20 for size in sizes)  # neither shrunk nor blown up
    # Wide tables and figures scroll in boxes of their own: the page itself does not.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('td')).fontSize) >= 12")
    context.close()
