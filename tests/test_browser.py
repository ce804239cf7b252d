"""In a real browser: the widget of notebooks/quickstart.ipynb in JupyterLab, and the pages of the documentation."""

import base64
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
from nbconvert import HTMLExporter

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
ARGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
TOKEN = "ksag-browser-test"
PATIENCE = 120  # seconds for anything, on a slow machine
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
    """The cells that the widget needs, at few steps."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if {"setup", "explore"} & set(cell.metadata.get("tags", ()))]
    assert len(notebook.cells) >= 2, f"no cells of {NOTEBOOK.name} are tagged 'setup' and 'explore'"
    for cell in notebook.cells:
        cell.source, cell.outputs = re.sub(r"get_sigmas_karras\(\d+,", "get_sigmas_karras(4,", cell.source), []
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
        self.box = page.locator(".ksag-explore")

    def picture(self) -> bytes:
        """The bytes behind its <img>, as the browser has them."""
        read = "async image => [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())]"
        return bytes(self.box.locator("img.widget-image").evaluate(read))

    def value(self, setting: str) -> float:
        """As the code below the picture has it."""
        return float(re.search(rf'"{setting}": ([\d.]+)', self.box.locator(".jp-RenderedMarkdown").inner_text())[1])

    def press(self, slider: str, key: str) -> None:
        """A key at the slider's handle."""
        self.box.locator(".widget-slider", has_text=slider).locator(".noUi-handle").press(key)

    def choose(self, menu: str, name: str) -> None:
        self.box.locator(".widget-dropdown", has_text=menu).locator("select").select_option(name)

    def wait_until_sampled(self, code: str, before: bytes = b"") -> bytes:
        """The picture, as soon as it is another than before, a text is part of the code below it, and nothing is under way."""

        def sampled() -> bool:
            assert not self.box.locator("[data-mime-type*=stderr]").count(), self.box.inner_text()
            done = re.fullmatch(r"[\d.]+ s", self.box.locator(".widget-hprogress").inner_text().strip())
            current = code in self.box.locator(".jp-RenderedMarkdown").inner_text()
            return bool(done) and current and self.picture() != before

        wait_for(sampled, f"samples for {code!r}")
        return self.picture()


WIDGET, ITS_LISTS = ".ksag-explore", "select, .widget-readout, .noUi-target, .widget-dropdown, pre"
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


def test_the_widget_follows_its_controls_and_the_saved_notebook_shows_its_last_picture(tmp_path):
    with opened_page(tmp_path) as page:
        run_all_cells(page)
        widget = Widget(page)
        first = widget.wait_until_sampled('"cond_scale": 1.5')
        scale = widget.value("pag_scale")
        widget.press("pag_scale", "ArrowRight")
        wait_for(lambda: widget.value("pag_scale") > scale, "the slider's new value")
        moved = widget.wait_until_sampled(f'"pag_scale": {widget.value("pag_scale")}', before=first)
        widget.choose("category", "Objects")
        widget.choose("style", "any")
        last = widget.wait_until_sampled("['Objects', 'Objects'], [None, None]", before=moved)
        assert first != last and all(png.startswith(b"\x89PNG") for png in (first, moved, last))
        assert page.locator(".jp-Notebook img:visible").count() == 1  # the picture for pages without a kernel is hidden

        for scheme in "light", "dark":
            page.evaluate(f"() => jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {scheme.title()}'}})")
            for width in 1400, 420:
                page.set_viewport_size({"width": width, "height": 1100})
                page.evaluate(f"() => jupyterapp.shell.{'collapse' if width < 800 else 'expand'}Left()")
                widget.box.scroll_into_view_if_needed()
                page.wait_for_timeout(1000)  # for the new layout
                page.screenshot(path=tmp_path / f"{scheme}-{width}.png")
                assert not overflowing(page), f"{scheme}, {width} pixels wide"

        page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
        saved = tmp_path / "work" / NOTEBOOK.name
        shown = f'src="data:image/png;base64,{base64.b64encode(last).decode()}"'
        wait_for(lambda: shown in html_page(saved), "the saved notebook to show the last picture")
        assert html_page(saved).count("<img") == 1


def html_page(notebook: Path) -> str:
    page, _ = HTMLExporter().from_filename(str(notebook))
    return re.sub(r"(?<=base64,)[^\"]+", lambda data: re.sub(r"\s", "", data[0]), page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", "parameters", "where-to-put"])
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
        assert scrolls or name != "where-to-put"  # the only one of them with a table too wide for a phone
