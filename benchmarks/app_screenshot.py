"""The picture of ``fewstep app`` in the documentation: starts the command, clicks in a browser, saves what is shown.

    python benchmarks/app_screenshot.py runs/demo docs/app.png "a flat owl on pink" "a shiny fox on blue"

Needs prompts for a model that takes them, the extra ``app``, Playwright, and a Chromium in the system's path.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextmanager
def running_app(*arguments: object, start: tuple[str, ...] = ("-m", "fewstep")) -> Iterator[tuple[str, Any]]:
    """The command with these arguments, on a free port: its address, and its process, which ends with the context."""
    command = [sys.executable, *start, "app", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("Open http://"):
                process.terminate()
                raise RuntimeError(f"The app did not start: {line}{process.communicate()[1]}")
            yield line.split()[1], process
        finally:
            process.terminate()


@contextmanager
def browser_page(width: int, height: int) -> Iterator[Any]:
    """A page of a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()


def generate(page: Any, seed: int) -> None:
    """Asks for the images of a seed and waits for them."""
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_role("button", name="Generate").click()
    page.locator(".fewstep-result", has_text=re.compile(rf"seed {seed}$")).last.wait_for(timeout=120_000)
    page.wait_for_timeout(500)  # an animation of Gradio ends


def main(model: str, file: Path, *prompts: str) -> None:
    with running_app(model) as (address, _), browser_page(1300, 780) as page:
        page.goto(address)
        for seed, prompt in zip((3, 2, 1, 0), prompts or 4 * [None], strict=False):
            if prompt is not None:
                page.get_by_label("Prompt").fill(prompt)
            generate(page, seed)
        page.screenshot(path=file)
    with Image.open(file) as image:
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(file, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
