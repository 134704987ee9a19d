"""report.html: one page without network, whose numbers are those of the bundle."""

import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from movdc.compiler.bubbles import bubbles
from movdc.compiler.report import render
from movdc.runtime.bundle import Bundle, Manifest
from movdc.runtime.rates import Rates
from movdc.runtime.simulate import Simulator, calls_of

pytestmark = pytest.mark.slow
RATES = Rates(350e6, 6e10, 0.002)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Bundle.read(bundle).manifest


class _Page(html.parser.HTMLParser):
    """What a page refers to, and whether its tags match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.rows += tag == "tr"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass


def test_the_bundle_has_its_report(bundle: Path, manifest: Manifest) -> None:
    text = (bundle / "report.html").read_text()
    assert "report.html" in {file.path for file in manifest.files}
    page = _Page()
    page.feed(text)
    assert not page.open
    assert not page.links
    assert "http" not in text
    assert page.rows > len(manifest.partitions)
    assert all(one.name in text for one in manifest.partitions)


def test_a_measured_run_is_laid_beside_what_is_predicted(manifest: Manifest) -> None:
    measured = Simulator.of(manifest, RATES, mode="sequential").run(calls_of(manifest))
    text = render(manifest, RATES, manifest.budget_bytes, measured)
    assert text.count("measured: loads above") == len(manifest.stages)
    assert render(manifest, RATES, manifest.budget_bytes, measured) == text


def test_bubbles_say_what_would_remove_them(manifest: Manifest) -> None:
    slow = Rates(2e6, 6e10)
    named = {one.name: one for one in manifest.partitions}
    stage = next(one for one in manifest.stages if one.name == "denoiser")
    variant = stage.variants["plain"]
    budget_bytes = variant.residency[1].needs_bytes
    found = bubbles(stage, variant, named, manifest.slab_bytes, slow, budget_bytes)
    each = [one for one in found if one.when == "each call"]
    assert each
    assert all(re.search(r"keep it loaded: [\d.]+ MB more, \d", one.remedy) for one in each)
    assert any("loader was busy" in one.why for one in each)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
def test_a_browser_shows_it_without_errors_and_sorts_its_tables(bundle: Path, tmp_path: Path) -> None:
    probe = """<script>
    const heads = document.querySelectorAll("th"), errors = [];
    window.addEventListener("error", event => errors.push(event.message));
    const names = () => [...document.querySelectorAll("table")].at(-1).tBodies[0].innerText;
    const head = [...document.querySelectorAll("table")].at(-1).querySelector("th:nth-child(2)");
    head.click(); const up = names(); head.click();
    document.title = `errors ${errors.length} sorted ${up !== names()} wide ${document.body.scrollWidth <= innerWidth}`;
    </script>"""
    page = tmp_path / "page.html"
    page.write_text((bundle / "report.html").read_text().replace("</body>", probe + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,844", f"--user-data-dir={tmp_path}/u"]
    done = subprocess.run(
        [str(CHROMIUM), *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "<title>errors 0 sorted true wide true</title>" in done.stdout, done.stderr[-500:]
