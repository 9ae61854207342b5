"""The page in a real browser: no error, no request, sorting, filtering, light, dark, phone and print."""

import base64
import io
import json
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from jprune import recall
from jprune.recall.report import headline
from tests.recall import audits

pytestmark = pytest.mark.slow

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver on the path")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    audits.two_scores().to_html(path, images=audits.IMAGES)
    return path.as_uri()


@pytest.fixture
def page(browser, address):
    browser.get_log("browser"), browser.get_log("performance")
    browser.get("about:blank")  # the last test's page has the same address: on a busy machine it is read once more
    browser.get(address)
    return browser


def pairs(page):
    """The first two cells of the visible rows of classes, read at the same time."""
    rows = page.execute_script(
        "return [...document.getElementById('classes').tBodies[0].rows].filter(row => !row.hidden)"
        ".map(row => [row.cells[0].textContent, row.cells[1].textContent])"
    )
    return {tuple(row) for row in rows}


def shown(page, column, table="classes"):
    """The cells of a column in the visible rows, from the top."""
    return page.execute_script(
        "return [...document.getElementById(arguments[0]).tBodies[0].rows].filter(row => !row.hidden)"
        ".map(row => row.cells[arguments[1]].textContent)",
        table,
        column,
    )


def press(page, label, table="classes"):
    header = page.execute_script(
        "return [...document.getElementById(arguments[0]).tHead.rows[0].cells]"
        ".findIndex(header => header.innerText.trim() === arguments[1])",
        table,
        label,
    )
    page.execute_script(
        "document.getElementById(arguments[0]).tHead.rows[0].cells[arguments[1]].querySelector('button').focus()",
        table,
        header,
    )
    page.switch_to.active_element.send_keys("\n")
    return header


def screenshot(page, width, *, scheme="light", media="", mobile=False):
    """The whole page as pixels, and its natural width."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": mobile}
    )
    height, wanted = page.execute_script(
        "return [document.documentElement.scrollHeight, document.documentElement.scrollWidth]"
    )
    clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
    taken = page.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(taken["data"]))).convert("RGB")), wanted


def test_nothing_is_logged_and_nothing_leaves_the_page(page, address):
    press(page, "change")
    time.sleep(0.5)
    assert page.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert address in sent
    assert [url for url in sent if url != address and not url.startswith("data:")] == []


def test_a_class_called_script_is_shown_and_not_run(page):
    assert "<script>alert(1)</script>" in shown(page, 2)
    assert len(page.find_elements("css selector", "script")) == 1
    names = page.execute_script("return [...document.querySelectorAll('#figure-recall text')].map(t => t.textContent)")
    assert set(audits.NAMES) <= set(names)


def test_a_script_that_is_not_the_pages_own_does_not_run(page):
    page.execute_script(
        "const added = document.createElement('div');"
        "added.innerHTML = '<img src=x onerror=\"window.ran = true\">';"
        "document.body.append(added)"
    )
    time.sleep(0.3)
    assert page.execute_script("return window.ran") is None


def test_columns_sort_by_number_and_by_name_from_the_keyboard(page):
    column = press(page, "after %")
    up = [float(cell) for cell in shown(page, column)]
    assert up == sorted(up)
    header = page.find_elements("css selector", "#classes th")[column]
    assert header.get_attribute("aria-sort") == "ascending"
    press(page, "after %")
    assert [float(cell) for cell in shown(page, column)] == sorted(up, reverse=True)
    assert header.get_attribute("aria-sort") == "descending"
    names = shown(page, press(page, "class"))
    assert len(set(names)) == len(audits.NAMES)
    assert names == page.execute_script(
        "return arguments[0].toSorted((a, b) => a.localeCompare(b, undefined, {numeric: true}))", names
    )
    assert header.get_attribute("aria-sort") == "none"


def test_undefined_numbers_sort_last_both_ways(page):
    page.execute_script(
        "const cell = document.querySelector('#tests tbody tr td:nth-child(9)');"
        "cell.dataset.value = ''; cell.textContent = 'n/a'"
    )
    for _ in range(2):
        assert shown(page, press(page, "p", "tests"), "tests")[-1] == "n/a"


def test_the_classes_are_shown_for_one_score_and_ratio_at_a_time(page):
    audit = audits.two_scores()
    assert pairs(page) == {("<i>random", "10")}
    select = page.find_element("css selector", "select[data-table=classes]")
    choices = select.find_elements("tag name", "option")
    assert len(choices) == len(audit.summary) + 1
    choices[0].click()
    assert pairs(page) == {("magnitude", "1")}
    choices[-1].click()
    assert len(shown(page, 0)) == len(audit.classes)


def test_light_and_dark_pages_have_contrasting_colors(page):
    light, _ = screenshot(page, 1100, scheme="light")
    dark, _ = screenshot(page, 1100, scheme="dark")
    assert light[5, 5].min() > 240
    assert dark[5, 5].max() < 40
    for pixels, ink in ((light, light.min(axis=-1) < 90), (dark, dark.max(axis=-1) > 180)):
        assert ink.mean() > 0.01, pixels.shape


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_of_page_and_figures_contrasts_with_the_background(page, scheme):
    """WCAG's contrast of 4.5 for text, whatever its element."""
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    colours = page.execute_script(
        "const paper = getComputedStyle(document.body).backgroundColor;"
        "const texts = 'h1,h2,h3,p,li,dt,dd,td,th,figcaption,caption,footer';"
        "const ink = [...document.querySelectorAll(texts)].map(e => getComputedStyle(e).color);"
        "const drawn = [...document.querySelectorAll('svg text')].map(e => getComputedStyle(e).fill);"
        "return [paper, ...new Set([...ink, ...drawn])]"
    )
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def luminance(colour):
        channels = np.array([int(part) for part in colour.strip("rgb()").split(",")[:3]]) / 255
        linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    paper = luminance(colours[0])
    for colour in colours[1:]:
        high, low = max(luminance(colour), paper), min(luminance(colour), paper)
        assert (high + 0.05) / (low + 0.05) >= 4.5, colour


def test_a_phone_need_not_scroll_sideways(page):
    _, wanted = screenshot(page, 360, mobile=True)
    assert wanted == 360


def test_a_phone_need_not_scroll_sideways_for_long_names(browser, tmp_path):
    labels, names = np.repeat([0, 1], 20), ["class " * 9 + "x", "unbreakable" * 9]
    compared = {f"a quantization scheme with a very long name, {n} bits": 1 - labels for n in (4, 8)}
    recall.audit(labels, labels, compare=compared, class_names=names).to_html(tmp_path / "report.html", title=names[1])
    browser.get((tmp_path / "report.html").as_uri())
    _, wanted = screenshot(browser, 360, mobile=True)
    assert wanted == 360


def test_print_is_light_and_fits_the_paper_on_any_screen(page):
    pixels, wanted = screenshot(page, 718, scheme="dark", media="print")
    assert pixels[2, 2].min() > 240
    assert wanted == 718
    hidden = page.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert base64.b64decode(hidden["data"]).startswith(b"%PDF")


def boxes(page, selector):
    """Where elements are on the page: left, top, right and bottom, in pixels."""
    return page.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect())"
        ".map(b => [b.left, b.top, b.right, b.bottom])",
        selector,
    )


@pytest.mark.parametrize(("width", "media"), [(390, ""), (1280, ""), (718, "print")])
def test_the_meaning_of_every_column_is_readable_without_a_pointer(page, width, media):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media})
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    )
    unexplained = page.execute_script(
        "return [...document.querySelectorAll('table')].flatMap(table => {"
        "  let legend = table.closest('figure, section, div') ?? table;"
        "  while (legend && !legend.matches('.legend')) legend = legend.nextElementSibling;"
        "  const explained = legend && legend.getBoundingClientRect().height > 0"
        "    ? [...legend.querySelectorAll('strong')].map(e => e.innerText) : [];"
        "  return [...table.tHead.rows[0].cells].filter(cell => cell.getBoundingClientRect().width > 0)"
        "    .map(cell => cell.innerText.trim()).filter(label => !explained.includes(label))"
        "    .map(label => [table.id, label]); })"
    )
    count = len(page.find_elements("css selector", "p.legend"))
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert count == len(page.find_elements("css selector", "table"))
    assert unexplained == []


def test_the_class_table_opens_on_what_the_headline_is_about_with_the_change_in_sight_on_a_phone(page):
    audit = audits.two_scores()
    score, ratio = headline.subject(audit)
    assert pairs(page) == {(score, f"{ratio:g}")}
    assert score in headline.headline(audit).split(":")[0]
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 900, "deviceScaleFactor": 1, "mobile": True}
    )
    change = page.execute_script(
        "return [...document.querySelectorAll('#classes th')].find(th => th.innerText.trim() === 'change')"
        ".getBoundingClientRect().right"
    )
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert 0 < change <= 390


def test_no_axis_of_recalls_goes_beyond_1_and_no_point_outside_its_axes(page):
    ticks = page.execute_script("return [...document.querySelectorAll('#figure-recall text')].map(t => t.textContent)")
    numbers = [float(text) for text in ticks if text.replace(".", "", 1).isdigit() and "." in text]
    assert numbers
    assert max(numbers) <= 1
    for n, panel in enumerate(boxes(page, "[id^=recall-axes_] > g:first-of-type"), 1):
        points = boxes(page, f"#recall-axes_{n} > [id*=line2d] use")
        assert points
        for left, top, right, bottom in points:
            middle = (top + bottom) / 2
            assert panel[0] - 8 <= (left + right) / 2 <= panel[2] + 8
            assert panel[1] - 1 <= middle <= panel[3] + 1


def test_no_legend_covers_a_panel(page):
    panels, legends = boxes(page, "[id*=-axes_] > g:first-of-type"), boxes(page, "[id*=-legend_]")
    assert panels
    assert len(legends) >= 5
    for left, top, right, bottom in legends:
        for box in panels:
            assert left >= box[2] - 1 or right <= box[0] + 1 or top >= box[3] - 1 or bottom <= box[1] + 1


def test_no_two_labels_of_an_axis_overlap(browser, tmp_path):
    for make in (audits.one_model, audits.two_scores):
        path = tmp_path / "report.html"
        make().to_html(path)
        browser.get(path.as_uri())
        overlapping = browser.execute_script(
            "const inside = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;"
            "return [...document.querySelectorAll('g[id*=\"matplotlib.axis\"]')].flatMap(axis => {"
            "  const texts = [...axis.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);"
            "  return texts.flatMap(([one, a], n) => texts.slice(n + 1).filter(([, b]) => inside(a, b))"
            "    .map(([other]) => [axis.id, one, other])); })"
        )
        assert overlapping == []


def test_a_page_of_one_set_of_models_has_no_filter_and_no_column_of_the_only_score(browser, tmp_path):
    audits.one_model().to_html(tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    assert browser.find_elements("css selector", "select") == []
    assert shown(browser, 2)[0] == "0"
    visible = browser.execute_script(
        "return [...document.querySelectorAll('th')].filter(h => h.getBoundingClientRect().width > 0)"
        ".map(h => h.innerText.trim())"
    )
    assert "score" not in visible
    assert "change" in visible
