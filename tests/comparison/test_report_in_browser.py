"""A person's way through the page in a real browser: chromium from the system, playwright from the extra `dev`."""

import json
import re
import shutil

import pytest
from run_folders import changed, make_run, save_grid

from unlearn_runner.comparison.comparison import Wanted, compare
from unlearn_runner.comparison.report import report
from unlearn_runner.comparison.runs import read_runs

METHODS = {
    "siss": (0.02, 0.95, 60.0),
    "naive_deletion": (0.06, 0.97, 40.0),
    "a_method_with_quite_a_long_name_for_a_phone": (0.3, 0.90, 80.0),
    "neg_grad": (0.04, 0.20, 30.0),
}


def chromium_path():
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    return next(filter(None, found), None)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
    )
    if chromium_path() is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=chromium_path(), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for place, (method, (forget, keep, seconds)) in enumerate(METHODS.items()):
        for seed in (0, 1, 2):
            metrics = {
                "base/forget_rate": 0.5, "oracle/forget_rate": 0.0, "base/retain_accuracy": 0.96,
                "oracle/retain_accuracy": 0.97, "eval/forget_rate": forget + 0.01 * seed,
                "eval/retain_accuracy": keep + 0.01 * (seed - 1), "eval/fid_retain": 1 - keep,
                "cost/seconds": seconds + seed, "eval/is_retain": 8.0 + place,
            }  # fmt: skip
            lines = [
                {"step": n, "seconds": 0.5 * n, "images": 8 * n, "lambda/value": forget, "loss/retain": (1 + place) / n}
                for n in range(1, 41)
            ]
            looks = [{"step": n, "eval/forget_rate": 0.5 * forget + 0.4 / n} for n in range(5, 41, 5)]
            folder = make_run(root, method, seed, metrics, lines=lines + looks)
            save_grid(folder, "before", 40)
            save_grid(folder, "oracle", 60)
            save_grid(folder, "after", 90 + 30 * place)
    make_run(root / "other", "ddpm_sampled", 0, {"eval/forget_rate": 0.7}, provenance=changed(sampler="ddpm"))
    make_run(root, "siss", 9, {}, status="diverged")
    wanted = Wanted(metrics=[], short=False, sort=None, baseline="siss", test="t")
    text, _ = report(compare(read_runs([root]), wanted), wanted)
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(params=[1280, 390])
def page(request, browser, page_file):
    """The page from disk, without a network; what it asks for or complains of fails the test."""
    context = browser.new_context(viewport={"width": request.param, "height": 800}, offline=True)
    opened = context.new_page()
    complaints, asked = [], []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda call: asked.append(call.url))
    opened.goto(page_file.as_uri())
    yield opened
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    context.close()


def shown(page):
    return page.locator("article:not([hidden])")


def order_of(page):
    rows = shown(page).locator(".summary tbody tr:not(.reference) th")
    return [row.replace("\u200b", "") for row in rows.all_inner_texts()]


def test_nothing_is_cut_off_or_wider_than_the_screen(page):
    for _ in range(2):
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        outside = page.evaluate(
            """() => [...document.querySelectorAll("article:not([hidden]) *")].filter((node) => {
                 if (node.closest(".scroll, svg, .chips, wbr, script")) return false;
                 const box = node.getBoundingClientRect();
                 return box.width && (box.right > innerWidth + 1 || box.left < -1);
               }).map((node) => node.outerHTML.slice(0, 80))"""
        )
        assert outside == []
        names = shown(page).locator(".scatter text")
        boxes = [names.nth(place).bounding_box() for place in range(names.count())]
        frame = shown(page).locator(".scatter").bounding_box()
        for box in boxes:
            assert box["x"] >= frame["x"] - 1
            assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
        named = shown(page).locator(".scatter text.name")
        boxes = [named.nth(place).bounding_box() for place in range(named.count())]
        assert len(boxes) >= 3
        for place, a in enumerate(boxes):
            for b in boxes[:place]:
                apart = a["x"] + a["width"] <= b["x"] + 1 or b["x"] + b["width"] <= a["x"] + 1
                assert apart or a["y"] + a["height"] <= b["y"] + 4 or b["y"] + b["height"] <= a["y"] + 4
        page.set_viewport_size({"width": 700, "height": 800})  # the plots are drawn again
        page.wait_for_timeout(200)


def test_headings_sort_by_keyboard_and_say_so(page):
    heads = shown(page).locator(".summary thead th")
    names = [name.split()[0] for name in heads.all_inner_texts()]
    assert order_of(page)[0] == "siss", "the best at forgetting is on top"
    accuracy = heads.nth(names.index("retain_accuracy"))
    accuracy.locator("button").focus()
    page.keyboard.press("Enter")
    assert accuracy.get_attribute("aria-sort") == "descending"
    assert order_of(page) == ["naive_deletion", "siss", "a_method_with_quite_a_long_name_for_a_phone", "neg_grad"]
    page.keyboard.press("Space")
    assert accuracy.get_attribute("aria-sort") == "ascending"
    assert order_of(page)[0] == "neg_grad"
    seconds = heads.nth(names.index("cost/seconds"))
    seconds.locator("button").press("Enter")
    assert (accuracy.get_attribute("aria-sort"), seconds.get_attribute("aria-sort")) == ("none", "ascending")
    assert order_of(page)[0] == "neg_grad"
    references = shown(page).locator(".summary tbody tr").all_inner_texts()[:2]
    assert [row.split()[0] for row in references] == ["base", "oracle"]


def test_tab_reaches_the_controls_and_shows_where_it_is(page):
    seen = []
    for _ in range(40):
        page.keyboard.press("Tab")
        style = page.evaluate(
            "() => [document.activeElement.className || document.activeElement.tagName,"
            " getComputedStyle(document.activeElement).outlineStyle]"
        )
        seen.append(style[0])
        assert style[1] != "none", style
    assert "chip" in seen
    assert "pick-x" in seen


def test_all_metrics_are_a_button_away(page):
    cell = shown(page).locator(".summary th", has_text="is_retain")
    assert not cell.is_visible()
    shown(page).locator(".all").click()
    assert cell.is_visible()
    assert shown(page).locator(".all").get_attribute("aria-pressed") == "true"


def test_chips_choose_what_is_drawn(page):
    lines = shown(page).locator(".curve .lines g path[fill=none]")
    assert lines.count() == 4
    shown(page).locator(".chip", has_text="neg_grad").click()
    assert lines.count() == 3
    assert shown(page).locator(".chip", has_text="neg_grad").get_attribute("aria-pressed") == "false"
    shown(page).locator(".none").click()
    assert shown(page).locator(".curve .empty").is_visible()
    shown(page).locator(".every").click()
    assert lines.count() == 4
    assert shown(page).locator(".bars > div").first.locator(".bar").count() == 4


def test_curves_of_any_metric_over_steps_images_and_seconds(page):
    curve = shown(page).locator(".curve")
    curve.locator(".pick-key").select_option("loss/retain")
    last = {}
    for clock in ("steps", "images", "seconds"):
        curve.locator(".pick-clock").select_option(clock)
        assert curve.locator("svg text.axis").all_text_contents() == ["loss/retain", clock]
        last[clock] = curve.locator(".reading").inner_text()
    assert last["steps"].startswith("steps 40:")
    assert last["images"].startswith("images 320:")
    assert last["seconds"].startswith("seconds 20:")
    curve.locator(".log").check()
    assert curve.locator("path[fill=none]").count() >= 4
    assert shown(page).locator(".lambda .pick-key").input_value() == "lambda/value"


def test_a_plot_is_read_by_arrow_keys_and_by_pointer(page):
    curve = shown(page).locator(".curve")
    curve.locator(".pick-key").select_option("loss/retain")
    plot, reading = curve.locator(".lines"), curve.locator(".reading")
    plot.focus()
    page.keyboard.press("ArrowLeft")
    assert reading.inner_text().startswith("steps 39:")
    assert re.search(r"siss\s+0\.0256", reading.inner_text().replace("\u200b", ""))
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert re.match(r"steps (1\d|2\d):", reading.inner_text())


def test_the_front_and_its_hypervolume(page):
    note = shown(page).locator(".volume")
    assert "On the front: siss, naive_deletion." in note.inner_text()
    said = (
        r"Hypervolume of all methods: 0\.\d+ of .* distance to the oracle's 1 and retain_accuracy 0 .*"
        r" 0\.\d+ to 0\.\d+"
    )
    assert re.search(said, note.inner_text())
    before = note.inner_text()
    shown(page).locator(".pick-y").select_option("fid_retain")
    assert note.inner_text() != before
    shown(page).locator(".scatter circle").last.hover()
    assert "forget_rate" in page.locator("#tip").inner_text()


def test_samples_show_what_was_before(page):
    images = shown(page).locator(".grids img")
    assert images.count() == 6
    assert all(page.evaluate("[...document.querySelectorAll('.grids img')].map((image) => image.naturalWidth > 100)"))
    after = images.last.get_attribute("src")
    shown(page).locator(".flip").click()
    assert images.last.get_attribute("src") == images.first.get_attribute("src") != after
    shown(page).locator(".flip").click()
    assert images.last.get_attribute("src") == after


def test_commands_provenance_tests_and_runs_apart_are_there(page):
    command = shown(page).locator(".commands code").first.inner_text()
    assert "--config-path" in command
    shown(page).locator(".copy").first.click()
    page.wait_for_function("() => /^(Copied|Selected)$/.test(document.querySelector('.copy').textContent)")
    shown(page).locator("details").first.locator("summary").click()
    assert "ddim" in shown(page).locator("dl").inner_text()
    assert "Holm" in shown(page).locator("section[id$=tests]").inner_text()
    assert "diverged (siss, seed 9)" in page.locator(".apart").inner_text()


def test_another_table_is_a_choice_away(page):
    page.locator("#which").select_option("t1")
    assert order_of(page) == ["ddpm_sampled"]
    assert json.loads(shown(page).locator(".data").text_content())["methods"][0]["label"] == "ddpm_sampled"
    page.locator("#which").select_option("t0")
    assert len(order_of(page)) == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser, page_file, scheme):
    """WCAG AA: 4.5 to 1 for text; 3 to 1 for the colours of lines and points."""
    opened = browser.new_page(color_scheme=scheme)
    opened.goto(page_file.as_uri())
    ratios = opened.evaluate(
        """() => {
          const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const style = getComputedStyle(document.documentElement);
          const luminance = (name) => {
            probe.fillStyle = style.getPropertyValue(name);
            probe.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...probe.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => value / 255)
              .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ratio = (a, b) => {
            const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
            return (high + 0.05) / (low + 0.05);
          };
          const onBoth = (name) => [ratio(name, "--card"), ratio(name, "--page")];
          const text = ["--ink", "--soft", "--accent"].flatMap(onBoth);
          const lines = [...Array(8).keys()].map((n) => ratio(`--c${n}`, "--card"));
          return { text: [...text, ratio("--best-ink", "--best")], lines };
        }"""
    )
    opened.close()
    assert min(ratios["text"]) >= 4.5, ratios
    assert min(ratios["lines"]) >= 3, ratios
