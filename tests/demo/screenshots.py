"""Takes the pictures of docs/demo.md, from a demo of the quickstart's models that runs already.

hf-ilora demo outputs/quickstart/sasrec outputs/quickstart/distilled outputs/quickstart/ilora
python -m tests.demo.screenshots http://127.0.0.1:7860
"""

import sys

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.demo.test_page import CHROMIUM
from tests.paths import PROJECT

PICTURES = PROJECT / "docs" / "demo"


def main(address: str) -> None:
    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 560})
        page.set_default_timeout(120_000)
        page.goto(address)
        search = page.get_by_label("Search titles")
        page.get_by_text("The history is empty.", exact=True).wait_for()
        for title in ("Star Trek VI: The Undiscovered Country", "Star Trek V: The Final Frontier"):
            search.fill(title)
            page.get_by_role("button", name=f"Add {title}").click()
            page.get_by_role("listitem").filter(has_text=title).wait_for()
        page.get_by_text("per answer").last.wait_for()
        search.fill("star tr")
        page.get_by_role("button", name="Add Star Trek").first.wait_for()
        page.screenshot(path=PICTURES / "search.png")
        search.fill("")
        page.get_by_label("Title of a new item").fill("Star Trek: The New Voyage")
        page.get_by_role("button", name="Add the new item").click()
        page.get_by_text("(new)").first.wait_for()
        page.screenshot(path=PICTURES / "models.png", full_page=True)
        browser.close()
    for picture in PICTURES.glob("*.png"):
        with Image.open(picture) as opened:
            few_colours = opened.convert("RGB").quantize(32)
        few_colours.save(picture, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
