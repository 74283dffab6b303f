"""The HTML report in a real browser: sorted, filtered, scrolled, and asking the network nothing."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semanticblur_core.focus.check import FocusOptions, ImageFocus, focus_of_image
from semanticblur_core.focus.report import HtmlReport

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class HalfBlurred:
    """Calls the left half of any image blurred."""

    name = "half"

    def detect(self, image: Any, **_: Any) -> Any:
        blur = np.zeros(image.shape[:2], np.float32)
        blur[:, : image.shape[1] // 2] = 1
        return blur

    def iter_planes(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    installed = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    with playwright.sync_playwright() as running:
        try:
            opened = running.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium to open: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def picture() -> ImageFocus:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
    return focus_of_image(image, HalfBlurred(), FocusOptions(thumbnails=True), name="x.png")[0]


def write_report(path: Path, picture: ImageFocus, fractions: list[float], **summary: Any) -> None:
    assert picture.scores is not None
    with HtmlReport(path) as html:
        for i, fraction in enumerate(fractions):
            scores = replace(picture.scores, in_focus_fraction=fraction, mean_blur=1 - fraction)
            passed = fraction >= 0.5
            html.add(replace(picture, name=f"photo {i}.jpg", scores=scores, passed=passed))
        html.summary = {"description": "Gates: in_focus_fraction >= 0.5.", "gated": True, **summary}


def names(page: Any) -> list[str]:
    found: list[str] = page.locator("tr.row .name").all_inner_texts()
    return found


def opened(browser: Any, path: Path) -> tuple[Any, list[str]]:
    """The page, and every address or error it asked for; its own file alone is allowed."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    wrong: list[str] = []
    page.on("request", lambda r: wrong.append(r.url) if r.url.startswith("http") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
    page.goto(path.as_uri())
    return page, wrong


def test_worst_first_then_as_sorted_and_filtered(
    tmp_path: Path, browser: Any, picture: ImageFocus
) -> None:
    path = tmp_path / "report.html"
    write_report(path, picture, [0.9, 0.1, 0.6, 0.3])
    page, wrong = opened(browser, path)
    assert names(page) == ["photo 1.jpg", "photo 3.jpg", "photo 2.jpg", "photo 0.jpg"]
    assert "4 images: 2 passed, 2 failed, 0 unreadable" in page.locator("#counts").inner_text()
    page.get_by_role("button", name="In focus").click()
    assert names(page)[0] == "photo 0.jpg"
    assert page.locator("th[data-key=in_focus_fraction]").get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="Name").click()
    assert names(page) == [f"photo {i}.jpg" for i in range(4)]
    page.select_option("#show", "failed")
    assert names(page) == ["photo 1.jpg", "photo 3.jpg"]
    page.select_option("#show", "all")
    page.fill("#search", "TO 2")
    assert names(page) == ["photo 2.jpg"]
    assert page.locator("#shown").inner_text() == "1 of 4 shown"
    page.fill("#search", "")
    page.locator('.bar[data-key=in_focus_fraction][data-bin="12"]').click()
    assert names(page) == ["photo 2.jpg"]
    assert wrong == []


def test_pictures_show_and_their_tint_can_be_switched_off(
    tmp_path: Path, browser: Any, picture: ImageFocus
) -> None:
    path = tmp_path / "report.html"
    write_report(path, picture, [0.5])
    page, wrong = opened(browser, path)
    sizes = page.evaluate(
        "[...document.querySelectorAll('.picture img')].map(i => [i.naturalWidth, i.naturalHeight])"
    )
    assert sizes == [[120, 90], [40, 30]]
    assert page.locator(".overlay").first.is_visible()
    page.uncheck("#overlays")
    assert not page.locator(".overlay").first.is_visible()
    assert wrong == []


def test_names_are_text_and_never_markup(tmp_path: Path, browser: Any, picture: ImageFocus) -> None:
    path = tmp_path / "report.html"
    name = "</script><img src=x onerror=document.title='hit'>.png"
    with HtmlReport(path) as html:
        html.add(replace(picture, name=name))
        html.add(ImageFocus("broken & torn.png", "broken.png", error="not an <image>"))
    page, wrong = opened(browser, path)
    assert names(page) == ["broken & torn.png", name]
    assert page.title() == "Focus report"
    assert "not an <image>" in page.locator("#body").inner_text()
    assert wrong == []


def test_focus_curves_of_stacks_are_drawn(
    tmp_path: Path, browser: Any, picture: ImageFocus
) -> None:
    path = tmp_path / "report.html"
    curve = {"index": [0, 1, 2], "score": [0.1, 0.4, 0.2]}
    best = {"index": 1, "name": "photo 1.jpg"}
    stack = {"at": {"T": 3}, "best_plane": best, "peak": 1.2, "curve": curve}
    write_report(path, picture, [0.5, 0.6, 0.7], stacks=[stack])
    page, wrong = opened(browser, path)
    assert page.locator("figure.stack circle").count() == 3
    assert page.locator("figure.stack circle.best title").inner_html() == "plane 1: 0.400"
    assert "T 3; best photo 1.jpg, peak at 1.20" in page.locator("figure.stack").inner_text()
    assert wrong == []


def test_ten_thousand_images_stay_usable(tmp_path: Path, browser: Any, picture: ImageFocus) -> None:
    path = tmp_path / "report.html"
    fractions = [(i * 7919 % 10_000) / 10_000 for i in range(10_000)]
    write_report(path, picture, fractions)
    page, wrong = opened(browser, path)
    assert page.locator("tr.row").count() < 40
    assert names(page)[0] == "photo 0.jpg"
    page.evaluate("document.getElementById('frame').scrollTop = 1e9")
    page.locator("tr.row", has_text=f"photo {fractions.index(0.9999)}.jpg").wait_for()
    page.fill("#search", "photo 9999.jpg")
    assert names(page) == ["photo 9999.jpg"]
    took_ms = page.evaluate(
        "(() => { const t = performance.now(); state.down = !state.down; choose();"
        " return performance.now() - t; })()"
    )
    # A person waits less than this for a sort on any machine; it is a few hundredths of a second.
    assert took_ms < 2000
    assert wrong == []


def test_an_interrupted_report_is_whole(tmp_path: Path, picture: ImageFocus) -> None:
    path = tmp_path / "report.html"

    def write() -> None:
        with HtmlReport(path) as html:
            html.add(picture)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    text = path.read_text(encoding="utf-8")
    start = text.index('<script id="rows" type="application/json">') + 42
    assert len(json.loads(text[start : text.index("</script>", start)])) == 1
