"""The HTML report in a real browser: sorted, filtered, scrolled, and asking the network nothing."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from semanticblur_core.focus.check import Field, FocusOptions, ImageFocus, focus_of_image
from semanticblur_core.focus.fields import picture as coarse_picture
from semanticblur_core.focus.report import HtmlReport

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What a test asks of the page, beside what it writes into `answer`. The page's own script runs
# before it; a refused request of any kind is an event.
_PRELUDE = """
const wrong = [];
addEventListener("error", (event) => wrong.push(String(event.message)), true);
document.addEventListener("securitypolicyviolation", (event) => wrong.push(event.blockedURI));
"""
_HELPERS = """
const names = () => [...document.querySelectorAll("tr.row .name")].map((e) => e.textContent);
const press = (key) => document.querySelector(`th[data-key=${key}] button`).click();
const enter = (id, value, kind) => {
  element(id).value = value;
  element(id).dispatchEvent(new Event(kind));
};
const text = (query) => document.querySelector(query).textContent;
"""


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
def browser() -> str:
    installed = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if installed is None:
        pytest.skip("no Chromium to open the page with")
    return installed


@pytest.fixture(scope="module")
def picture() -> ImageFocus:
    rng = np.random.default_rng(3)
    image = rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)
    return focus_of_image(image, HalfBlurred(), FocusOptions(thumbnails=True), name="x.png")[0]


def write_report(path: Path, picture: ImageFocus, fractions: list[float], **summary: Any) -> None:
    assert picture.scores is not None
    with HtmlReport(path) as page:
        for i, fraction in enumerate(fractions):
            scores = replace(picture.scores, in_focus_fraction=fraction, mean_blur=1 - fraction)
            passed = fraction >= 0.5
            page.add(replace(picture, name=f"photo {i}.jpg", scores=scores, passed=passed))
        page.summary = {"description": "Gates: in_focus_fraction >= 0.5.", "gated": True, **summary}


def asked(browser: str, path: Path, script: str) -> dict[str, Any]:
    """What a script leaves in ``answer`` when it runs in the page, which must not complain."""
    # At the load event, which waits for pictures, and before Chromium prints the page: no step of
    # it takes time, so none can come too late.
    driver = (
        f"addEventListener('load', () => {{ const answer = {{}}; {_HELPERS}"
        f"try {{ {script} }} catch (error) {{ wrong.push(String(error)); }}"
        "const told = document.createElement('pre'); told.id = 'told';"
        "told.textContent = JSON.stringify({answer, wrong}); document.body.append(told); });"
    )
    page = path.read_text(encoding="utf-8")
    # Into a copy: the page itself is as it was written.
    page = page.replace("<title>", f"<script>{_PRELUDE}</script><title>", 1)
    head, end, tail = page.rpartition("</body>")
    copy = path.with_name(f"driven-{path.name}")
    copy.write_text(f"{head}<script>{driver}</script>{end}{tail}", encoding="utf-8")
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"),
            *(f"--user-data-dir={path.parent / 'profile'}", "--dump-dom", copy.as_uri()),
        ],
        capture_output=True,
        check=False,
        timeout=90,
    )
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout.decode("utf-8"), re.DOTALL)
    assert found, done.stderr.decode("utf-8", "replace")[-2000:]
    told = json.loads(html.unescape(found[1]))
    assert told["wrong"] == []
    answer: dict[str, Any] = told["answer"]
    return answer


def test_worst_first_then_as_sorted_and_filtered(
    tmp_path: Path, browser: str, picture: ImageFocus
) -> None:
    path = tmp_path / "report.html"
    write_report(path, picture, [0.9, 0.1, 0.6, 0.3])
    answer = asked(
        browser,
        path,
        """
        answer.first = names();
        answer.counts = text("#counts");
        press("in_focus_fraction");
        answer.turned = [names(), text("th[aria-sort=descending]")];
        press("name");
        answer.named = names();
        enter("show", "failed", "change");
        answer.failed = names();
        enter("show", "all", "change");
        enter("search", "TO 2", "input");
        answer.found = [names(), text("#shown")];
        enter("search", "", "input");
        document.querySelector('.bar[data-key=in_focus_fraction][data-bin="12"]')
          .dispatchEvent(new Event("click"));
        answer.bin = names();
        """,
    )
    assert answer["first"] == ["photo 1.jpg", "photo 3.jpg", "photo 2.jpg", "photo 0.jpg"]
    assert "4 images: 2 passed, 2 failed, 0 unreadable" in answer["counts"]
    assert answer["turned"] == [answer["first"][::-1], "In focus"]
    assert answer["named"] == [f"photo {i}.jpg" for i in range(4)]
    assert answer["failed"] == ["photo 1.jpg", "photo 3.jpg"]
    assert answer["found"] == [["photo 2.jpg"], "1 of 4 shown"]
    assert answer["bin"] == ["photo 2.jpg"]


def test_pictures_show_and_their_tint_can_be_switched_off(
    tmp_path: Path, browser: str, picture: ImageFocus
) -> None:
    path = tmp_path / "report.html"
    write_report(path, picture, [0.5])
    answer = asked(
        browser,
        path,
        """
        const images = [...document.querySelectorAll(".picture img")];
        answer.sizes = images.map((image) => [image.naturalWidth, image.naturalHeight]);
        const tint = () => getComputedStyle(document.querySelector(".overlay")).display;
        answer.before = tint();
        element("overlays").click();
        answer.after = tint();
        """,
    )
    assert answer["sizes"] == [[120, 90], [40, 30]]
    assert (answer["before"], answer["after"]) == ("block", "none")


def test_names_are_text_and_never_markup(tmp_path: Path, browser: str, picture: ImageFocus) -> None:
    path = tmp_path / "report.html"
    name = "</script><img src=x onerror=document.title='hit'>.png"
    with HtmlReport(path) as page:
        page.add(replace(picture, name=name))
        page.add(ImageFocus("broken & torn.png", "broken.png", error="not an <image>"))
    answer = asked(
        browser,
        path,
        "answer.names = names(); answer.title = document.title; answer.body = text('#body');",
    )
    assert answer["names"] == ["broken & torn.png", name]
    assert answer["title"] == "Focus report"
    assert "not an <image>" in answer["body"]


def test_focus_curves_of_stacks_are_drawn(
    tmp_path: Path, browser: str, picture: ImageFocus
) -> None:
    path = tmp_path / "report.html"
    curve = {"index": [0, 1, 2], "score": [0.1, 0.4, 0.2]}
    best = {"index": 1, "name": "photo 1.jpg"}
    stack = {"at": {"T": 3}, "best_plane": best, "peak": 1.2, "curve": curve}
    write_report(path, picture, [0.5, 0.6, 0.7], stacks=[stack])
    answer = asked(
        browser,
        path,
        """
        answer.circles = document.querySelectorAll("figure.stack circle").length;
        answer.best = text("figure.stack circle.best title");
        answer.caption = text("figure.stack figcaption");
        """,
    )
    assert (answer["circles"], answer["best"]) == (3, "plane 1: 0.400")
    assert "T 3; best photo 1.jpg, peak at 1.20" in answer["caption"]


def test_ten_thousand_images_stay_usable(tmp_path: Path, browser: str, picture: ImageFocus) -> None:
    path = tmp_path / "report.html"
    fractions = [(i * 7919 % 10_000) / 10_000 for i in range(10_000)]
    write_report(path, picture, fractions)
    answer = asked(
        browser,
        path,
        """
        answer.count = document.querySelectorAll("tr.row").length;
        answer.first = names()[0];
        window.requestAnimationFrame = (drawing) => drawing();
        element("frame").scrollTop = 1e9;
        element("frame").dispatchEvent(new Event("scroll"));
        answer.last = names().at(-1);
        enter("search", "photo 9999.jpg", "input");
        answer.found = names();
        enter("search", "", "input");
        press("name");
        answer.sorted = [names()[0], names()[1]];
        """,
    )
    assert 0 < answer["count"] < 40
    assert answer["first"] == "photo 0.jpg"
    assert answer["last"] == f"photo {fractions.index(0.9999)}.jpg"
    assert answer["found"] == ["photo 9999.jpg"]
    assert answer["sorted"] == ["photo 0.jpg", "photo 1.jpg"]


def test_the_page_asks_the_network_nothing(tmp_path: Path, picture: ImageFocus) -> None:
    path = tmp_path / "report.html"
    write_report(path, picture, [0.5])
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert re.findall(r"https?://[^\"']*", text) == ["http://www.w3.org/2000/svg"]


def test_an_interrupted_report_is_whole(tmp_path: Path, picture: ImageFocus) -> None:
    path = tmp_path / "report.html"

    def write() -> None:
        with HtmlReport(path) as page:
            page.add(picture)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    text = path.read_text(encoding="utf-8")
    start = text.index('<script id="rows" type="application/json">') + 42
    assert len(json.loads(text[start : text.index("</script>", start)])) == 1


def test_what_is_kept_can_be_shown_alone(tmp_path: Path, browser: str, picture: ImageFocus) -> None:
    fractions = [0.9, 0.1, 0.6, 0.3]
    script = """
        answer.first = names();
        answer.counts = text("#counts");
        answer.choice = !element("kept").hidden && !element("kept").disabled;
        enter("show", "kept", "change");
        answer.kept = names();
        """
    path = tmp_path / "kept.html"
    ranked = {"sort": "in_focus_fraction", "descending": True}
    write_report(path, picture, fractions, kept=[0, 2], **ranked)
    answer = asked(browser, path, script)
    assert answer["first"] == ["photo 0.jpg", "photo 2.jpg", "photo 3.jpg", "photo 1.jpg"]
    assert answer["counts"].endswith("0 unreadable, 2 kept")
    assert (answer["choice"], answer["kept"]) == (True, ["photo 0.jpg", "photo 2.jpg"])
    path = tmp_path / "none.html"
    write_report(path, picture, fractions)
    assert not asked(browser, path, script)["choice"]


def test_fields_are_drawn_over_their_plane(
    tmp_path: Path, browser: str, picture: ImageFocus
) -> None:
    path = tmp_path / "report.html"
    fractions = {(0, 0): 1.0, (0, 120): 0.5, (90, 0): 0.0}
    assert picture.scores is not None
    with HtmlReport(path) as page:
        for (top, left), share in fractions.items():
            scores = replace(picture.scores, in_focus_fraction=share)
            field = replace(
                picture,
                name=f"s.tif[y={top},x={left}]",
                scores=scores,
                passed=share > 0.6,
                field_of_view=Field("s.tif", top, left, 90, 120),
            )
            page.add(field)
            page.add(replace(field, source="other/s.tif"))
        damaged = Field("s.tif", 90, 120, 80, 110)
        name = "s.tif[y=90,x=120]"
        page.add(ImageFocus(name, picture.source, error=f"{name}: damaged", field_of_view=damaged))
        view = np.full((90, 120), 0.5, np.float32)
        plane = {
            **{"name": "s.tif", "source": picture.source, "height": 180, "width": 240},
            **{"n_fields": 3, "n_fields_passed": 1, "n_fields_without_content": 1},
            **{"in_focus_fraction": 0.5, "passed": False, "picture": coarse_picture(view)},
        }
        page.summary = {"gated": True, "planes": [plane]}
    answer = asked(
        browser,
        path,
        """
        const boxes = [...document.querySelectorAll("#planes .field")];
        answer.boxes = boxes.map((b) => ["x", "y", "width", "fill-opacity"].map(
          (name) => Number(b.getAttribute(name))).concat([b.classList.contains("failed")]));
        answer.caption = text("#planes figcaption");
        answer.said = boxes[1].querySelector("title").textContent;
        boxes[0].dispatchEvent(new Event("click"));
        answer.chosen = document.querySelectorAll(".field.chosen").length;
        answer.damaged = getComputedStyle(boxes[3]).fillOpacity;
        answer.tint = [getComputedStyle(boxes[2]).fillOpacity];
        element("overlays").click();
        answer.tint.push(getComputedStyle(boxes[2]).fillOpacity);
        """,
    )
    assert answer["boxes"] == [
        [0, 0, 120, 0, False],
        [120, 0, 120, pytest.approx(0.325), True],
        [0, 90, 120, pytest.approx(0.65), True],
        [120, 90, 110, 0, False],
    ]
    assert answer["caption"].startswith(
        "s.tif: failed, 50.0 % in focus, 1 of 3 fields passed, 1 without content left out"
    )
    assert answer["said"] == "s.tif[y=0,x=120]: 50.0 % in focus"
    assert (answer["chosen"], answer["damaged"], answer["tint"]) == (1, "1", ["0.65", "0"])
