"""The page of the server in a real Chromium, Debian's for example; skipped where there is none."""

import json
import shutil
import time

import httpx2 as httpx
import pytest
import torch

from tests.serving.servers import byte_model, make_service, served, wait_for
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.inference.engine import Engine
from wavelet_lm.serving.options import ServeOptions
from wavelet_lm.serving.page import page

selenium = pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
DRIVER = shutil.which("chromedriver")
in_a_browser = pytest.mark.skipif(
    BROWSER is None or DRIVER is None, reason="needs Chromium and its chromedriver"
)
WIDTHS = (360, 800, 1400)
WORDS = "def f(x):"


@pytest.fixture(scope="module")
def model():
    return byte_model(delta_memory=True)


@pytest.fixture(scope="module")
def url(model):
    with served(make_service(model, ByteTokenizer())) as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for switch in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(switch)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page as somebody uses it."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url
        driver.get(url)
        self.until("document.getElementById('model').textContent === 'RUN'")
        for name, value in (("max_tokens", 12), ("seed", 3)):
            self.js(f"document.getElementById('{name}').value = {value}")

    def js(self, script):
        return self.driver.execute_script(f"return {script}")

    def until(self, condition):
        said = "document.getElementById('alert').textContent"
        wait_for(lambda: self.js(condition) or (self.js(said) and pytest.fail(self.js(said))), 60)

    def ids(self, number):
        return self.js(f"texts[{number}].ids()")

    def written(self, number):
        """The tokens of a text, when it is done."""
        self.until(f"texts.length > {number} && !texts[{number}].stopper")
        return self.ids(number)

    def write(self, words, number=0):
        before = len(self.ids(number))
        area = self.driver.find_elements(By.TAG_NAME, "textarea")[number]
        area.send_keys(words, Keys.CONTROL, Keys.ENTER)
        self.until(f"texts[{number}].tokens.length > {before} && !texts[{number}].stopper")
        return self.ids(number)

    def keys(self, *keys):
        ActionChains(self.driver).send_keys(*keys).perform()

    def press(self, words, number=0):
        found = self.driver.find_elements(By.XPATH, f"//button[normalize-space()='{words}']")
        found[number].click()


@pytest.fixture
def used(chromium, url):
    page = Page(chromium, url)
    yield page
    failures = [line for line in chromium.get_log("browser") if line["level"] == "SEVERE"]
    assert not [line for line in failures if "v1/scope" not in line["message"]]


def engines(model, ids, n=12):
    """What the engine writes after these tokens, alone."""
    engine = Engine(model, ByteTokenizer(), context="stream")
    (done,) = engine.completions([bytes(ids).decode()], n, seed=3)
    return list(done.tokens)


def test_the_document_needs_nothing_from_outside(url):
    answer = httpx.get(url)
    assert answer.text == page()
    assert "scope.css */" not in answer.text
    assert "function drawScope(" in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for word in ("src=", "@import", "url(", "https://"):
        assert word not in answer.text, word


@in_a_browser
def test_what_is_written_is_what_the_model_writes_alone(used, model):
    ids = used.write(WORDS)
    prompt = list(WORDS.encode())
    assert ids == prompt + engines(model, prompt)
    assert used.js("texts[0].own.value") == ""
    # And on, by hand: the typed words follow the tokens that are there.
    more = used.write("é x")
    assert more[: len(ids)] == ids
    assert more[len(ids) : len(ids) + 4] == list("é x".encode())
    assert len(more) == len(ids) + 4 + 12
    assert httpx.get(f"{used.url}/v1/states").json()["data"] == []  # nothing is left behind
    assert used.js("document.querySelector('.text small').textContent").startswith(f"{len(more)} ")
    assert "KiB" in used.js("document.getElementById('health').textContent")


@in_a_browser
def test_a_token_shows_its_alternatives_and_what_they_would_lead_to(used, model):
    ids = used.write(WORDS)
    n = len(WORDS)
    span = used.driver.find_elements(By.CSS_SELECTOR, ".tokens span")[n + 2]
    ActionChains(used.driver).move_to_element(span).perform()
    used.until("!document.getElementById('tip').hidden")
    told = used.js(f"texts[0].tokens[{n + 2}]")
    with torch.no_grad():
        logits, _ = model(torch.tensor([ids[: n + 2]]))
    log_probs = logits[0, -1].log_softmax(-1)
    assert told["logprob"] == pytest.approx(log_probs[ids[n + 2]].item(), abs=1e-4)
    entropy = -(log_probs.exp() * log_probs).sum().item()
    assert told["entropy"] == pytest.approx(entropy, abs=1e-4)
    best = log_probs.topk(8).indices.tolist()
    assert [other["id"] for other in told["top"]] == best
    shown = used.js("document.querySelectorAll('#tip li').length")
    assert shown == 8
    used.driver.find_elements(By.CSS_SELECTOR, "#tip li button")[1].click()
    assert used.written(1)[: n + 3] == [*ids[: n + 2], best[1]]
    assert len(used.written(1)) == n + 3 + 12
    assert used.ids(0) == ids


@in_a_browser
def test_everything_can_be_done_by_keyboard(used):
    ids = used.write(WORDS)
    used.js("texts[0].view.focus()")
    used.keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 11, "f")
    fork = used.written(1)
    assert fork[:12] == ids[:12]
    assert len(fork) == 24
    assert used.ids(0) == ids
    used.js("texts[1].view.focus()")
    used.keys(Keys.HOME, *[Keys.ARROW_RIGHT] * 4, Keys.DELETE)
    assert used.ids(1) == ids[:5]
    used.keys(Keys.ARROW_LEFT, Keys.ENTER)  # to the buttons of the token
    assert used.js("document.getElementById('tip').contains(document.activeElement)")
    used.keys(Keys.ESCAPE)
    assert used.js("document.activeElement === texts[1].view")
    order = []
    used.js("document.getElementById('write-all').focus()")
    for _ in range(12):
        order.append(used.js("document.activeElement.tagName + document.activeElement.className"))
        used.keys(Keys.TAB)
    assert {"BUTTON", "SUMMARY", "DIVtokens", "TEXTAREA", "BUTTONmain"} <= set(order)


@in_a_browser
def test_escape_stops_and_frees_the_stream(used):
    used.js("document.getElementById('max_tokens').value = 4000")
    area = used.driver.find_element(By.TAG_NAME, "textarea")
    area.send_keys("a", Keys.CONTROL, Keys.ENTER)
    used.until("texts[0].tokens.length > 5")
    area.send_keys(Keys.ESCAPE)
    used.until("!texts[0].stopper")
    wait_for(lambda: httpx.get(f"{used.url}/health").json()["streams"] == 0)
    n = len(used.ids(0))
    time.sleep(0.2)
    assert n == len(used.ids(0)) < 4000


@in_a_browser
def test_states_are_saved_opened_downloaded_and_uploaded(used, tmp_path):
    ids = used.write(WORDS)
    used.press("Save")
    alert = used.driver.switch_to.alert
    alert.send_keys("tale")
    alert.accept()
    used.until("document.querySelector('#states tbody').textContent.includes('tale')")
    used.press("Open")
    used.until("texts.length === 2")
    assert used.js("texts[1].base.tail") == bytes(ids).decode(errors="replace")
    used.press("Write", 1)
    used.until("texts[1].tokens.length === 12 && !texts[1].stopper")
    used.press("Write", 0)
    used.until(f"texts[0].tokens.length === {len(ids) + 12} && !texts[0].stopper")
    assert used.ids(0)[len(ids) :] == used.ids(1)  # as if nothing had been saved
    file = tmp_path / "copy.state"
    file.write_bytes(httpx.get(f"{used.url}/v1/states/tale/file").content)
    used.driver.find_element(By.ID, "upload").send_keys(str(file))
    used.until("document.querySelector('#states tbody').textContent.includes('copy')")
    for name in ("tale", "copy"):
        used.driver.find_element(By.XPATH, f"//tr[td='{name}']//button[.='Delete']").click()
        used.until(f"!document.querySelector('#states tbody').textContent.includes('{name}')")
    assert httpx.get(f"{used.url}/v1/states").json()["data"] == []
    used.until("document.querySelector('#states tbody').textContent.includes('none saved')")


@in_a_browser
def test_the_scales_are_of_the_text_on_the_page(used):
    ids = used.write(WORDS)
    assert used.js("texts[0].tokens[3].logprob") is None  # what is typed has no figures yet
    used.press("Scales")
    used.until("!document.getElementById('scales').hidden")
    asked = {"tokens": ids}
    picture = httpx.post(f"{used.url}/v1/scope", content=json.dumps(asked), timeout=60).json()
    assert picture["ids"] == ids
    assert used.js("document.querySelectorAll('.scope-tokens span').length") == len(ids)
    pen = "document.querySelector('.scope-strip canvas').getContext('2d')"
    drawn = used.js(f"[...{pen}.getImageData(0, 0, {len(ids)}, 3).data]")
    assert len(set(zip(*[iter(drawn)] * 4, strict=True))) > 10  # many colours
    assert used.js("texts[0].tokens[3].logprob") == pytest.approx(
        -picture["bits"][3] * 0.6931, rel=1e-3
    )
    used.js("document.querySelector('.scope-tokens').focus()")
    used.keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert "is token 2 of" in used.js("document.querySelector('.scope-detail').textContent")


@in_a_browser
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_width_in_light_and_dark(used, width, scheme):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    used.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    used.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    try:
        used.write("a")
        used.js("texts[0].fork(2)")
        used.written(1)
        used.press("Scales")
        used.until("!document.getElementById('scales').hidden")
        used.js(
            "document.getElementById('how').open = document.getElementById('states').open = true"
        )
        used.js("texts[0].view.focus()")  # or the mouse, being elsewhere, closes it
        used.js("texts[0].select(1)")
        assert used.js("document.documentElement.scrollWidth") <= width
        box = used.js("document.getElementById('tip').getBoundingClientRect().toJSON()")
        assert 0 <= box["left"] < box["right"] <= width
        style = "getComputedStyle(document.body)"
        colours = used.js(f"[{style}.backgroundColor, {style}.color]")
        paper, ink = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
        assert (paper < ink) == (scheme == "dark")
        assert abs(paper - ink) > 3 * 150
    finally:
        used.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        used.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@in_a_browser
def test_a_key_is_asked_for_and_used(chromium):
    service = make_service(byte_model(), ByteTokenizer())
    with served(service, key="sesame") as url:
        used = Page(chromium, url)
        used.driver.find_element(By.TAG_NAME, "textarea").send_keys("ab", Keys.CONTROL, Keys.ENTER)
        said = "document.getElementById('alert').textContent"
        wait_for(lambda: "API key is missing" in used.js(said))
        assert used.js("texts[0].own.value") == "ab"  # nothing that was typed is lost
        key = used.driver.find_element(By.ID, "key")  # which the page has brought to view
        key.send_keys("sesame")
        assert used.write("")[:2] == list(b"ab")


@in_a_browser
def test_what_the_server_refuses_is_said_on_the_page(chromium):
    gpt = byte_model(model="gpt", heads=2, head_hidden=0)
    with served(make_service(gpt, ByteTokenizer(), ServeOptions(max_tokens=20))) as url:
        used = Page(chromium, url)
        used.write("ab")
        used.press("Scales")
        wait_for(
            lambda: "a gpt has no scales" in used.js("document.getElementById('alert').textContent")
        )
        used.js("document.getElementById('max_tokens').value = 21")
        used.press("Write")
        wait_for(
            lambda: "max_tokens is 21" in used.js("document.getElementById('alert').textContent")
        )
        assert not used.js("texts[0].stopper")
