"""A browser that tells on every error, dialog and request."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apportion.report import ReportData

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """Debian's Chromium without a window."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install apportion[dev]"
    )
    executable = shutil.which("chromium") or CHROMIUM
    if not Path(executable).exists():
        pytest.skip("chromium is not installed: apt install chromium")
    arguments = [
        "--no-sandbox",
        "--headless=new",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=arguments)
        yield running
        running.close()


@pytest.fixture
def open_report(browser: object, tmp_path: Path) -> Iterator[Callable]:
    """Open a report from the disk; the test fails on any console error, dialog or request for another file."""
    from apportion.report import write_report

    context = browser.new_context(viewport={"width": 1400, "height": 900})
    troubles: list[str] = []

    def opened(data: ReportData, address: str = "") -> object:
        path = write_report(tmp_path / "report.html", data)
        page = context.new_page()
        page.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))

        def dismissed(dialog: object) -> None:
            troubles.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        page.on("dialog", dismissed)
        page.on(
            "request", lambda request: None if request.url.startswith(path.as_uri()) else troubles.append(request.url)
        )
        page.goto(path.as_uri() + address)
        page.wait_for_selector("html[data-ready]", state="attached")
        return page

    opened.troubles = troubles
    yield opened
    context.close()
    assert not troubles, troubles
