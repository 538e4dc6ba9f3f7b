"""The page about runs: what stands in it, and how a real Chromium shows it; skipped without one."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest

from tests.conftest import tiny_config
from tests.report.folders import run_folder
from wavelet_lm.cli import report as command
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.errors import UserError
from wavelet_lm.models.checkpoint import save_checkpoint
from wavelet_lm.models.registry import build_model
from wavelet_lm.training.running import MARK

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
DRIVER = shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs Chromium and its chromedriver"
)


def typed(*words):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["wavelet-lm report", *map(str, words)])
        command.main()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of a run that ended, with weights, one that died, and one that cannot be looked into."""
    folder = tmp_path_factory.mktemp("logs")
    ended = run_folder(folder / "ended", 40)
    ByteTokenizer().save(ended / "tokenizer")
    save_checkpoint(ended / "best.safetensors", build_model(tiny_config(), 256), {})
    died = run_folder(folder / "died", 13, ends=False, lr=0.02)
    (died / MARK).touch()
    gpt = run_folder(folder / "gpt", 30, model="gpt", heads=2)
    ByteTokenizer().save(gpt / "tokenizer")
    model = build_model(tiny_config(model="gpt", heads=2), 256)
    save_checkpoint(gpt / "best.safetensors", model, {})
    file = folder / "report.html"
    typed(folder, "--out", file)
    return file


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.attributes = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_document_needs_nothing_from_outside_and_no_text_breaks_it(page):
    text = page.read_text(encoding="utf-8")
    tags = Tags(text)
    assert tags.open == []
    assert not {"src", "href", "srcset"} & {name for name, _ in tags.attributes}
    assert "default-src 'none'" in text
    outside = text.replace("http://www.w3.org/2000/svg", "")  # a name, which nobody fetches
    for word in ("http:", "https:", "@import", "url("):
        assert word not in outside.replace("url(#clip", ""), word
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1]
    runs = {run["name"]: run for run in json.loads(data)}
    assert runs["ended"]["curves"]["train"]["loss"][0] == 4.95
    assert runs["ended"]["scope"]["tokens"][:4] == list("The ")
    assert runs["died"]["state"] == "died"
    assert "<pre><b>The </b>&lt;/script&gt;&lt;i&gt;40\ufffd</pre>" in text
    assert "\0" not in text
    assert "&lt;b&gt;begun" in text
    assert "a gpt has no scales" in text
    assert "died: it has saved no weights yet" in text
    rows = re.findall(r'<th scope="row">(\w+)</th><td>([^<]*)</td><td>([^<]*)</td>', text)
    shown = text[text.index("What differs") : text.index("All ")]
    assert {key for key, *_ in rows if f">{key}<" in shown} >= {"lr", "model", "heads"}
    assert ">levels<" not in shown


def test_what_cannot_be_written_is_refused_first(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        typed(tmp_path / "none", "--out", tmp_path / "report.html")
    with pytest.raises(UserError, match="there is no folder"):
        typed(tmp_path, "--out", tmp_path / "none" / "report.html")
    with pytest.raises(UserError, match="one of the two"):
        typed(tmp_path, "--prompt", "a", "--text", "b")
    run = run_folder(tmp_path / "a", 5)
    typed(run, "--no_scopes", "--out", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>a</title>" in text
    assert "Not asked for." in text
    other = run_folder(tmp_path / "b", 5)
    (other / "config.json").write_text("{", encoding="utf-8")
    typed(run, other, "--no_scopes", "--out", tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>a</title>" in text
    with pytest.raises(UserError, match="no run is left"):
        typed(other, "--no_scopes", "--out", tmp_path / "report.html")


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(switch)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def js(driver, script):
    return driver.execute_script(f"return {script}")


@in_a_browser
def test_curves_are_read_by_keys_and_drawn_against_what_is_chosen(page, driver):
    driver.get(page.as_uri())
    from selenium.webdriver.common.keys import Keys

    titles = js(driver, "[...document.querySelectorAll('figcaption')].map((e) => e.textContent)")
    for title in ("Loss", "Validation, bits", "Learning rate", "Norm", "Speed", "Peak memory"):
        assert any(each.startswith(title) for each in titles), title
    assert "Learned lags, tokens: ended" in titles
    assert js(driver, "document.querySelectorAll('.chart .end').length") > 0  # where one died
    chart = driver.find_element("css selector", ".chart svg")
    told = driver.find_element("css selector", ".chart .told")
    chart.send_keys(Keys.END)
    assert told.text.startswith("step 40 ended ")
    chart.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert told.text.startswith("step 1 ")
    assert "died" in told.text
    driver.find_element("css selector", "input[value=tokens]").click()
    chart.send_keys(Keys.END)
    assert told.text.startswith("tokens 10.24 k ")
    driver.find_element("css selector", "input[value=seconds]").click()
    chart.send_keys(Keys.END)
    assert told.text.startswith("20 s ")
    n = js(driver, "document.querySelectorAll('.chart path').length")
    driver.find_elements("css selector", "input[data-run]")[0].click()
    assert js(driver, "document.querySelectorAll('.chart path').length") < n
    driver.find_element("css selector", "input[name=log]").click()
    driver.find_element("css selector", "details[data-scope] summary").click()
    spans = ".scope-tokens span"
    wait = "document.querySelectorAll('{}').length"
    driver.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0], 0))")
    assert js(driver, wait.format(spans)) > 4
    assert not [line for line in driver.get_log("browser") if line["level"] == "SEVERE"]


@in_a_browser
@pytest.mark.parametrize("width", [360, 800, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_width_in_light_and_dark(page, driver, width, scheme):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(page.as_uri())
    driver.execute_script(
        "for (const each of document.querySelectorAll('details')) each.open = true"
    )
    assert js(driver, "document.documentElement.scrollWidth") <= width
    style = "getComputedStyle(document.body)"
    colours = js(driver, f"[{style}.backgroundColor, {style}.color]")
    paper, ink = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert (paper < ink) == (scheme == "dark")
    assert abs(paper - ink) > 3 * 150
