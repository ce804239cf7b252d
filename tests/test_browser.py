"""In a real browser: the widget of notebooks/quickstart.ipynb in JupyterLab, and the pages of the documentation."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

import ksag.zoo

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
ARGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
TOKEN = "ksag-browser-test"
PATIENCE = 600  # seconds for anything, on a slow machine
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # a cell is in the page wherever the page is scrolled to
    "apputils-extension/notification": {"fetchNews": "false"},
}
WINDOW = {"width": 1280, "height": 1100}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser here: none of {', '.join(BROWSERS)} is on the PATH"),
]


@contextlib.contextmanager
def jupyterlab(folder: Path):
    """Yields the address of a server that knows nothing of the user's own Jupyter, and the file that it logs to."""
    home, work, log = folder / "home", folder / "work", folder / "server.log"
    for name, setting in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(setting))
    places = {
        "HOME": home,
        "IPYTHONDIR": home / "ipython",
        "JUPYTER_CONFIG_DIR": home / "config",
        "JUPYTER_DATA_DIR": home / "data",
        "JUPYTER_RUNTIME_DIR": home / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": home / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": home / "workspaces",
        "PYTHONPATH": ROOT,
    }
    options = (
        "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={work}",
        f"--IdentityProvider.token={TOKEN}", "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
    )  # fmt: skip
    environment = {**os.environ, **{name: str(place) for name, place in places.items()}}
    # who gives up on the tests sends this, and then, too, the server has to end
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *options], env=environment, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield wait_for(lambda: address(server, log), "JupyterLab to start"), log
    finally:
        server.terminate()  # it ends its kernels, and a kernel whose server is gone ends itself
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        signal.signal(signal.SIGTERM, before)


def address(server: subprocess.Popen, log: Path) -> str | None:
    assert server.poll() is None, f"JupyterLab ended with {server.returncode}:\n{log.read_text()[-3000:]}"
    found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
    return found[0] if found else None


def wait_for(condition, what: str):
    """The first true value that `condition` has, asked several times a second."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE} s in vain for {what}"
        time.sleep(0.2)
    return value


def copy_of_the_notebook(folder: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    assert "explore" in last.metadata.get("tags", ()), f"the last code cell of {NOTEBOOK.name} is not the one tagged 'explore'"
    for cell in notebook.cells:
        cell.source = re.sub(r"get_sigmas_karras\((24|16),", "get_sigmas_karras(6,", cell.source)  # more is for other tests
    (folder / "work").mkdir()
    nbformat.write(notebook, folder / "work" / NOTEBOOK.name)


@contextlib.contextmanager
def opened_page(folder: Path):
    """Yields a browser's page that shows a copy of the notebook, its kernel idle. On failure, prints what there is to see."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright's Python package is not installed")
    copy_of_the_notebook(folder)
    with (
        jupyterlab(folder) as (url, log),
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=BROWSER, args=ARGS) as browser,
    ):
        page = browser.new_page(viewport=WINDOW)
        page.set_default_timeout(PATIENCE * 1000)
        try:
            page.goto(f"{url}/lab/tree/{NOTEBOOK.name}?token={TOKEN}")
            # before that, JupyterLab would ask which kernel to take
            page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady")
            page.wait_for_function("jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'")
            yield page
        except BaseException:
            print(f"The server's log:\n{log.read_text()[-3000:]}")
            with contextlib.suppress(Exception):  # of a page that is gone, which would hide the first error
                print(f"The page, also in {folder / 'failed.png'}:\n{page.inner_text('body')[-5000:]}")
                page.screenshot(path=folder / "failed.png")
            raise


def run_all_cells(page) -> None:
    run = "jupyterapp.commands.execute('notebook:run-all-cells').then(ran => { window.ran = ran ? 'all' : 'failed' })"
    page.evaluate(f"() => {{ {run} }}")
    assert wait_for(lambda: page.evaluate("window.ran"), "the cells to run") == "all"


class Widget:
    """What a user sees of the widget, and does to it."""

    def __init__(self, page):
        self.page = page

    def text(self, part: str) -> str:
        return self.page.locator(f".ksag-{part}").inner_text()

    def pictures(self, row: str) -> list[bytes]:
        """The bytes behind each <img>, as the browser has them: plain, with SAG, mask."""
        read = "images => Promise.all(images.map(async image => [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())]))"
        return [bytes(data) for data in self.page.locator(f".ksag-{row} img:visible").evaluate_all(read)]

    def press(self, slider: str, key: str) -> None:
        """A key at the slider's handle."""
        self.page.locator(".widget-slider", has_text=slider).locator(".noUi-handle").press(key)

    def choose(self, menu: str, *names: str) -> None:
        self.page.locator(".widget-select-multiple", has_text=menu).locator("select").select_option(list(names))

    def wait_until_shown(self, setting: str) -> None:
        """Until the pictures are those of a setting, and nothing is on its way."""

        def shown() -> bool:
            assert not self.text("error"), self.text("error")
            return setting in self.text("now") and "done" in self.text("status")

        wait_for(shown, f"{setting!r} above the pictures")


WIDGET, ITS_LISTS = ".ksag-explore", "select, .widget-readout, .noUi-target, style, .widget-dropdown"
ARTICLE, ITS_BLOCKS = "article > *", "table, .md-typeset__scrollwrap, .md-typeset__table, pre, code, math, script, style"


def overflowing(page, within: str = WIDGET, but: str = ITS_LISTS) -> list[str]:
    """The parts that hold more than they show, or that have a scrollbar; but for those that may, and what is inside of them."""
    find = """(wholes, but) => wholes.flatMap(whole => [whole, ...whole.querySelectorAll('*')])
        .filter(part => !part.closest(but))
        .filter(part => getComputedStyle(part).display !== 'inline')
        .filter(part => part.scrollWidth > part.clientWidth + 1 || part.offsetWidth - part.clientWidth > 12)
        .map(part => `${part.className}: ${part.scrollWidth} in ${part.clientWidth}`)"""
    wholes = page.locator(within)
    assert wholes.count()
    return wholes.evaluate_all(find, but)


def test_the_widget_follows_a_slider_and_says_what_is_wrong(tmp_path):
    with opened_page(tmp_path) as page:
        run_all_cells(page)
        widget = Widget(page)
        start = ksag.zoo.SETTINGS["sag_scale"]
        widget.wait_until_shown(f"sag_scale {start}")
        assert "cond_scale 1.5" in widget.text("now")
        first = widget.pictures("now")
        plain, with_sag, mask = first[:2], first[2:4], first[4:]
        assert len(first) == 6 and all(png.startswith(b"\x89PNG") for png in first) and not widget.pictures("before")
        assert f'"sag_scale": {start}' in widget.text("code")

        widget.press("sag_scale", "ArrowRight")
        moved_to = round(start + 0.1, 6)
        widget.wait_until_shown(f"sag_scale {moved_to}")
        moved = widget.pictures("now")
        assert moved[:2] == plain and moved[2:4] != with_sag and moved[4:] != mask
        assert widget.pictures("before") == first
        assert f'"sag_scale": {moved_to}' in widget.text("code")

        widget.choose("style")
        widget.choose("category", "Objects")
        widget.wait_until_shown("Objects · any style")
        assert widget.text("now").count("Objects, any") == 6 and widget.pictures("before") == moved
        assert "[None, None]" in widget.text("code")

        for scheme in "light", "dark":
            page.evaluate(f"() => jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {scheme.title()}'}})")
            for width in 1400, 420:
                page.set_viewport_size({"width": width, "height": 1100})
                page.evaluate(f"() => jupyterapp.shell.{'collapse' if width < 800 else 'expand'}Left()")
                page.locator(".ksag-now").scroll_into_view_if_needed()
                page.wait_for_timeout(1000)  # what the browser lays out anew
                page.screenshot(path=tmp_path / f"{scheme}-{width}.png")
                assert not overflowing(page), f"{scheme}, {width} pixels wide"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", "parameters", "diffusers"])
def test_a_page_on_a_phone_does_not_scroll_sideways(site, tmp_path, name, scheme):
    """Its tables and code do, inside themselves."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright's Python package is not installed")
    with playwright.sync_playwright() as driver, driver.chromium.launch(executable_path=BROWSER, args=ARGS) as browser:
        page = browser.new_page(viewport={"width": 420, "height": 900}, color_scheme=scheme)
        page.goto((site / f"{name}.html").as_uri())
        assert page.locator("body").get_attribute("data-md-color-scheme") == {"light": "default", "dark": "slate"}[scheme]
        page.screenshot(path=tmp_path / "page.png", full_page=True)  # to look at on failure
        assert page.evaluate("document.documentElement.scrollWidth") <= 420
        assert not overflowing(page, ARTICLE, ITS_BLOCKS)
        scrolls = page.locator("article table").evaluate_all("all => all.some(table => table.scrollWidth > table.clientWidth)")
        assert scrolls or name == "index"  # its one table fits
