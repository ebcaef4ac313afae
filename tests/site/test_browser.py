"""The site in a real browser: what a reader sees, with mouse, keyboard and phone.

Chromium comes from the system; ``HANDBOOK_CHROMIUM`` names another. Where there is
none these tests are skipped, except in CI, where that is a failure.
"""

from __future__ import annotations

import functools
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import pytest

from handbook_src.catalogue import components

pytestmark = [pytest.mark.browser, pytest.mark.site]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(html: Path) -> Iterator[str]:
    """The site on the loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(html: Path, without: Callable[[str], NoReturn]) -> Iterator[Any]:
    found = [os.environ.get("HANDBOOK_CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
    path = next((p for p in found if p), None)
    if path is None:
        without("no Chromium on this machine (Debian: apt install chromium)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without("playwright is not installed")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """A page being looked at, with everything that went wrong on it."""

    def __init__(self, browser: Any, address: str, viewport: dict[str, int], theme: str = "light") -> None:
        self.address = address
        self.context = browser.new_context(viewport=viewport, color_scheme="light")
        self.page = self.context.new_page()
        self.page.set_default_timeout(20_000)
        self.page.add_init_script(f"if (!localStorage.mode) {{ localStorage.mode = localStorage.theme = '{theme}' }}")
        self.wrong: list[str] = []
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("request", lambda r: None if r.url.startswith((address, "data:")) else self.wrong.append(r.url))

    def go(self, path: str) -> Any:
        self.page.goto(f"{self.address}/{path}")
        self.page.evaluate("() => window.MathJax?.startup?.promise")
        return self.page


@pytest.fixture
def visit(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    visit = Visit(browser, address, getattr(request, "param", DESKTOP))
    yield visit
    visit.context.close()


def sideways(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


PAGES = ["index", "components", "claims", "glossary", "bibliography", "api/index", "api/functional", "api/layers"]


def formulas_are_rendered(page: Any, name: str) -> None:
    wanted = page.locator("span.math, div.math").count()
    assert page.locator("mjx-container").count() >= wanted > 0, name
    assert page.locator("mjx-merror, mjx-container [data-mjx-error]").count() == 0, name
    red = "els => els.filter(e => getComputedStyle(e).color === 'rgb(255, 0, 0)').map(e => e.outerHTML)"
    unknown = page.locator("mjx-container mjx-mtext").evaluate_all(red)
    assert unknown == [], f"{name}: an unknown macro is printed in red"


def nothing_is_wrong(visit: Visit, name: str) -> None:
    assert sideways(visit.page) <= 0, f"{name} scrolls sideways by {sideways(visit.page)} px"
    assert not visit.wrong, f"{name}: {visit.wrong}"


def test_no_page_errs_loads_from_elsewhere_or_scrolls_sideways(visit: Visit, chapter_names: list[str]) -> None:
    """Each page is loaded once, and laid out at both widths in both themes.

    What runs at its load asks for neither: only the style sheets do.
    """
    for name in [*(f"book/{p}" for p in PAGES), *chapter_names]:
        page = visit.go(f"{name}.html")
        assert page.evaluate("document.documentElement.dataset.theme") == "light"
        if name in chapter_names:
            formulas_are_rendered(page, name)
        for theme, sizes in {"light": (DESKTOP, PHONE), "dark": (PHONE, DESKTOP)}.items():
            page.evaluate("t => { document.documentElement.dataset.theme = t }", theme)
            for size in sizes:
                page.set_viewport_size(size)
                nothing_is_wrong(visit, f"{name}, {theme}, {size['width']} px")


@pytest.mark.parametrize(("theme", "visit"), [("dark", DESKTOP), ("light", PHONE), ("dark", PHONE)], indirect=["visit"])
def test_a_page_comes_up_in_the_chosen_theme_at_any_width(visit: Visit, chapter_names: list[str], theme: str) -> None:
    visit.go("book/index.html").evaluate("t => { localStorage.mode = localStorage.theme = t }", theme)
    for name in ("book/index", "book/components", "book/api/functional", chapter_names[0]):
        page = visit.go(f"{name}.html")
        assert page.evaluate("document.documentElement.dataset.theme") == theme
        nothing_is_wrong(visit, name)


@pytest.mark.parametrize("word", ["SwiGLU", "Swish", "deconvolution", "atrous"])
def test_search_finds_a_component_by_its_synonym(visit: Visit, word: str) -> None:
    page = visit.go(f"search.html?q={word}")
    page.wait_for_selector("#search-results li a")
    assert page.locator("#search-results li a[href*='components.html'], #search-results li a[href*='book/']").count()
    assert not visit.wrong


def test_search_leads_to_the_section_of_a_published_component(visit: Visit) -> None:
    published = [c for c in components() if c.status == "published"]
    if not published:
        pytest.skip("nothing is published yet")
    page = visit.go(f"search.html?q={published[0].title}")
    page.wait_for_selector(f"#search-results li a[href*='{published[0].chapter}.html']")


def test_the_search_dialog_opens_by_keyboard(visit: Visit) -> None:
    page = visit.go("book/index.html")
    page.keyboard.press("Control+k")
    page.keyboard.type("normalisation")
    page.keyboard.press("Enter")
    page.wait_for_url("**/search.html?q=normalisation*")


INK = """() => {
  const image = document.querySelector(".bd-article img[src$='.svg']");
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  return getComputedStyle(image).backgroundColor + " " + getComputedStyle(image).colorScheme;
}"""


def test_the_theme_button_turns_page_and_figures_dark(visit: Visit, chapter_names: list[str]) -> None:
    page = visit.go(f"{chapter_names[0]}.html")
    paper = "getComputedStyle(document.body).backgroundColor"
    figure = page.locator(".bd-article img[src$='.svg']").first
    figure.scroll_into_view_if_needed()
    light, ink_light = page.evaluate(paper), figure.screenshot()
    page.locator("button.theme-switch-button:visible").first.click()
    for _ in range(2):  # the button goes round light, dark and the system's choice
        if page.evaluate("document.documentElement.dataset.theme") != "dark":
            page.locator("button.theme-switch-button:visible").first.click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.evaluate(paper) != light
    assert page.evaluate(INK).startswith("rgba(0, 0, 0, 0)"), "no pale plate behind a figure"
    assert page.evaluate(INK).endswith("dark"), "the figure's ink follows color-scheme"
    page.wait_for_timeout(200)
    assert figure.screenshot() != ink_light


def shown(page: Any) -> int:
    return int(page.locator("tbody tr[id]:not([hidden])").count())


def test_components_are_filtered_by_keyboard(visit: Visit) -> None:
    page = visit.go("book/components.html")
    assert shown(page) == 360
    page.get_by_label("Name, id or synonym").focus()
    page.keyboard.type("swiglu")
    assert page.locator("tr#component-glu").is_visible()
    assert shown(page) < 5
    count = page.locator("output[aria-live=polite]")
    assert count.inner_text() == f"{shown(page)} of 360 components"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SELECT"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Show all
    assert shown(page) == 360
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.type("zzz")
    assert count.inner_text().startswith("None of 360")


@pytest.mark.parametrize("word", ["Swish", "deconvolution", "atrous", "multi head attention", "rms-norm", "R²"])
def test_the_filter_knows_ids_titles_and_synonyms(visit: Visit, word: str) -> None:
    page = visit.go("book/components.html")
    page.get_by_label("Name, id or synonym").fill(word)
    assert 0 < shown(page) < 60


def test_components_are_filtered_by_part_and_status(visit: Visit) -> None:
    page = visit.go("book/components.html")
    page.get_by_label("Part").select_option("normalisation")
    assert shown(page) == 8
    page.get_by_label("Status").select_option("published")
    assert shown(page) == sum(c.part == "normalisation" and c.status == "published" for c in components())
    page.reload()
    assert page.get_by_label("Part").input_value() == "normalisation", "the address keeps the choice"


def test_the_ledger_is_filtered_by_verdict(visit: Visit) -> None:
    page = visit.go("book/claims.html?verdict=open")
    still_open = shown(page)
    page.get_by_label("Verdict").select_option("settled")
    assert shown(page) == 175 - still_open > 0


def test_a_link_to_a_row_shows_it_in_spite_of_the_filter(visit: Visit) -> None:
    page = visit.go("book/components.html?part=attention#component-relu")
    page.wait_for_selector("tr#component-relu:not([hidden])")


def test_without_javascript_the_tables_stand(browser: Any, address: str) -> None:
    context = browser.new_context(java_script_enabled=False, viewport=DESKTOP)
    page = context.new_page()
    page.goto(f"{address}/book/components.html")
    assert page.locator("tbody tr[id]:visible").count() == 360
    assert page.locator(".handbook-filter").count() == 0
    context.close()


def test_tab_reaches_the_skip_link_first_and_focus_is_visible(visit: Visit) -> None:
    page = visit.go("book/index.html")
    page.keyboard.press("Tab")
    first = page.evaluate("document.activeElement.textContent.trim()")
    assert first == "Skip to main content"
    for _ in range(3):
        page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"


@pytest.mark.parametrize("visit", [PHONE], ids=["phone"], indirect=True)
def test_on_a_phone_the_wide_things_scroll_inside_and_the_menu_opens(visit: Visit, chapter_names: list[str]) -> None:
    page = visit.go(f"{chapter_names[0]}.html")
    assert sideways(page) <= 0
    page.locator("button.primary-toggle:visible").first.click()
    page.wait_for_selector(".bd-sidebar-primary >> text=Glossary", state="visible")
    assert not visit.wrong
