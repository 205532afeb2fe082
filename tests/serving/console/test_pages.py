"""The console in a real browser, over a real server: what is seen, what can be done with keys alone, on a desk and on a phone."""

import json
import re
import signal
import urllib.error
import urllib.request

import pytest

import browser
from cli_support import started
from services import CanNotBeHad
from shortlist.serving.console.app import PAGES
from shortlist.store.published import Place

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is needed: pip install 'shortlist[dev]'")
pytest.importorskip("nicegui", reason="the console needs NiceGUI: pip install 'shortlist[console]'")

PHONE = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True}
DESK = {"viewport": {"width": 1100, "height": 760}, "color_scheme": "light"}
WAIT_MS = 20_000


class Running:
    """A process of the command line that says at which address it is."""

    def __init__(self, *arguments):
        self.process = started(*arguments)
        line = self.process.stdout.readline()
        found = re.search(r"at (http://127\.0\.0\.1:\d+)", line)
        assert found, line + self.process.stderr.read()
        self.address = found[1]

    def call(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(self.address + path, data=data, headers=headers, method=method)
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.load(response)

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def server(run, calibrated, tmp_path_factory):
    """A server of a place with two versions, of which the newer one is calibrated."""
    folder = tmp_path_factory.mktemp("served")
    place = Place(folder / "place")
    place.publish(run, note="first")
    place.publish(calibrated, note="calibrated")
    running = Running("serve", place.folder, "--port", 0, "--admin")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def console(server):
    running = Running("console", "--server", server.address, "--port", 0)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def chromium():
    try:
        path = browser.chromium()
    except CanNotBeHad as error:
        pytest.skip(str(error))
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def opened(chromium, console):
    """Opens pages and notes what their consoles complain of."""
    contexts, complaints = [], []

    def open_(path, kind=DESK):
        context = chromium.new_context(**kind)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda said: complaints.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda asked: (
                complaints.append(asked.url)
                if console.address not in asked.url and asked.url.startswith("http")
                else None
            ),
        )
        page.goto(console.address + path)
        page.get_by_role("heading", level=1, name=PAGES[path]).wait_for()
        return page

    open_.complaints = complaints
    yield open_
    for context in contexts:
        context.close()


SEEN = {
    "/": "waiting",
    "/budget": "Chains that the allocator chooses from",
    "/request": "A real request",
    "/data": "Systems alone",
    "/snapshots": "answers; its place holds 2",
    "/experiments": "runs no experiments",
}
"""Words that each page shows once the server has answered."""


@pytest.mark.parametrize("kind", [DESK, PHONE], ids=["desk", "phone"])
def test_pages_load_fit_and_complain_of_nothing(opened, kind, server):
    for n in range(8):
        server.call(f"/v1/recommend/user-{n}")
    for path, words in SEEN.items():
        page = opened(path, kind)
        page.get_by_text(words).first.wait_for()
        assert page.title() == f"{PAGES[path]} · Shortlist"
        assert page.locator(".problem:visible").count() == 0
        width, room = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert width <= room, path
        assert page.locator("[aria-current=page]").inner_text() == PAGES[path]
    assert opened.complaints == []  # nor was anything asked of another host


def test_traffic_shows_what_was_asked(opened, server):
    page = opened("/")
    for n in range(20):
        server.call(f"/v1/recommend/user-{n}")
    page.get_by_role("rowheader", name="retrieval").wait_for()
    page.get_by_role("rowheader", name="/v1/recommend/{user}").wait_for()
    page.wait_for_function("parseFloat(document.querySelector('.tiles dd').textContent) > 0")
    assert page.get_by_role("img", name=re.compile("p50 .* ms, p99")).count() == 1


def budget_becomes(page, server, ms, within=1e-6):
    """Whether the server's budget does so, soon."""
    for _ in range(200):
        if abs(server.call("/v1/admin/budget")["budget"]["ms"] - ms) <= within:
            return True
        page.wait_for_timeout(50)
    return False


def test_the_slider_moves_the_served_budget_and_the_button_brings_it_back(opened, server):
    page = opened("/budget")
    slider = page.get_by_role("slider", name="Budget per request")
    slider.wait_for()
    before = server.call("/v1/admin/budget")
    costs = [chain["ms"] for chain in before["chains"]]
    slider.locator("[tabindex]").first.focus()
    for _ in range(15):
        page.keyboard.press("PageDown")  # ten places of a hundred
        page.wait_for_timeout(150)  # as quick as a hand is
    assert budget_becomes(page, server, min(costs))
    page.get_by_text("set while it runs").wait_for()
    box = slider.bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert budget_becomes(page, server, (min(costs) + max(costs)) / 2, 0.05 * (max(costs) - min(costs)))
    page.get_by_role("button", name="As calibrated").click()
    page.get_by_text("(as calibrated)").wait_for()
    assert server.call("/v1/admin/budget")["budget"] == before["calibrated"]


def focused(page):
    """Name of what has the focus, and whether that can be seen."""
    return page.evaluate(
        """() => { const found = document.activeElement, seen = [found, found.closest('.q-field')].filter(e => e);
        const outlined = seen.some(e => getComputedStyle(e).outlineStyle !== 'none' && getComputedStyle(e).outlineWidth !== '0px');
        return [found.getAttribute('aria-label') || found.innerText.trim() || found.tagName, outlined] }"""
    )


def test_keys_alone_lead_through_a_request(opened):
    page = opened("/")
    names = []
    for _ in range(1 + len(PAGES)):
        page.keyboard.press("Tab")
        name, seen = focused(page)
        names.append(name)
        assert seen, name
    assert names == ["Skip to the page", *PAGES.values()]
    for _ in range(3):
        page.keyboard.press("Shift+Tab")
    assert focused(page)[0] == "Request"
    page.keyboard.press("Enter")
    page.get_by_role("heading", level=1, name="Request").wait_for()
    page.get_by_role("button", name="Ask").wait_for()
    page.keyboard.press("Tab")
    assert focused(page)[0] == "Skip to the page"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert focused(page) == ["User", True]
    page.keyboard.type("user-3")
    page.keyboard.press("Enter")
    page.get_by_role("table", name="The page, with each stage's score").wait_for()
    assert page.get_by_text("Item number").count() >= 5
    page.get_by_role("button", name="Why these items").focus()
    page.keyboard.press("Enter")
    page.get_by_text("Found by counts at place").first.wait_for()


def test_a_request_that_is_refused_says_why(opened):
    page = opened("/request")
    page.get_by_role("spinbutton", name="Items").fill("9000")
    page.get_by_role("button", name="Ask").click()
    page.get_by_text("9,000").or_(page.get_by_text("9000")).first.wait_for()
    assert page.locator(".problem:visible").count() == 1
    assert opened.complaints == []


def test_a_snapshot_is_served_and_taken_back(opened, server):
    page = opened("/snapshots")
    before = server.call("/v1/admin/snapshots")
    other = next(v["version"] for v in before["versions"] if v["version"] != before["current"])
    page.get_by_role("button", name=f"Serve snapshot {other}").click()
    page.get_by_role("button", name="No").click()
    assert server.call("/v1/admin/snapshots")["serving"] == before["serving"]
    page.get_by_role("button", name="Roll back").click()
    page.get_by_role("button", name="Yes").click()
    page.get_by_text(f"Snapshot {other} is served").wait_for()
    assert server.call("/v1/admin/snapshots")["serving"] == other
    page.goto(page.url.replace("snapshots", "budget"))
    page.get_by_text("not calibrated").wait_for()
    page.goto(page.url.replace("budget", "snapshots"))
    page.get_by_role("button", name=f"Serve snapshot {before['serving']}").click()
    page.get_by_role("button", name="Yes").click()
    page.get_by_text(f"Snapshot {before['serving']} is served").wait_for()
    assert server.call("/v1/admin/snapshots")["serving"] == before["serving"]


def test_a_server_that_hangs_leaves_one_sentence_and_comes_back(opened, server):
    pages = [opened(path) for path in ("/", "/snapshots")]
    server.process.send_signal(signal.SIGSTOP)
    try:
        for page in pages:
            page.get_by_text(re.compile("did not answer .* within")).wait_for()
            assert page.locator(".tiles:visible, table:visible, button:visible").count() == 0
    finally:
        server.process.send_signal(signal.SIGCONT)
    for page in pages:
        page.locator(".problem:visible").wait_for(state="hidden")
        page.locator(".tiles:visible, li:visible").first.wait_for()


def test_other_host_names_are_refused(console):
    request = urllib.request.Request(console.address, headers={"host": "rebound.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 400


def test_it_stops_when_told(server):
    running = Running("console", "--server", server.address, "--port", 0)
    running.process.send_signal(signal.SIGTERM)
    _, err = running.process.communicate(timeout=20)
    assert running.process.returncode == 0, err
    assert "Traceback" not in err
