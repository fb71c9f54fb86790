"""The page in headless Chromium, used by keyboard and mouse, and found by labels and roles as a screen reader does."""

import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.demo import shelf
from tests.processes import kill_with_children
from tests.recipe_runs import ENVIRONMENT

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SOAP = re.compile(r"Lavender soap")


@contextmanager
def served(command: list[str], **settings):
    """Start a server, wait until it prints its address, and yield the address."""
    process = subprocess.Popen(
        command,
        env=os.environ | ENVIRONMENT | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **settings,
    )
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if found := re.search(r"Open (http://\S+)", line):
                break
        else:
            pytest.fail(f"the server ended: {''.join(printed)}")
        threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop the server
        yield found[1]
    finally:
        kill_with_children(process)
        process.wait()


@pytest.fixture
def models(tmp_path, encoder):
    """Folders of a SASRec and an iLoRA of one shelf."""
    shelf.sasrec().save_pretrained(tmp_path / "sasrec")
    shelf.ilora(tmp_path).save_pretrained(tmp_path / "ilora")
    return [str(tmp_path / name) for name in ("sasrec", "ilora")]


@pytest.mark.slow
def test_a_visitor_builds_a_history_reads_two_models_and_adds_an_item(models, encoder):
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    from playwright.sync_api import expect, sync_playwright

    hf_ilora = str(Path(sys.executable).with_name("hf-ilora"))
    command = [hf_ilora, "demo", *models, "--title_encoder", encoder, "--title", f"Soaps {shelf.SCRIPT}"]
    with served(command) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        expect.set_options(timeout=60_000)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        asked, broken = set(), []
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        page.on("pageerror", lambda error: broken.append(error))
        assert urlsplit(address).hostname == "127.0.0.1"
        page.goto(address)
        sasrec, ilora = (page.get_by_role("region", name=name, exact=True) for name in ("sasrec", "ilora"))
        status, search = page.get_by_role("status"), page.get_by_label("Search titles")
        expect(sasrec.get_by_text("the most popular items")).to_be_visible()

        # The keyboard alone: type, read what is offered, take the first with Enter, and continue typing.
        search.focus()
        page.keyboard.type("soap one")
        matches = page.get_by_role("group", name="Matching titles")
        expect(matches.get_by_role("button")).to_have_text(["Add Lavender soap one"])
        expect(status.first).to_have_text("1 title is offered")
        page.keyboard.press("Enter")
        expect(page.get_by_role("listitem")).to_have_text(["Lavender soap one"])
        expect(status.first).to_contain_text("Added Lavender soap one")
        expect(search).to_be_focused()
        expect(search).to_have_value("")
        page.keyboard.type("lavender broken")
        expect(matches.get_by_role("button")).to_have_text([f"Add {shelf.SCRIPT}"])
        page.keyboard.press("Tab")
        expect(matches.get_by_role("button")).to_be_focused()
        page.keyboard.press("Enter")
        expect(page.get_by_role("listitem")).to_have_text(["Lavender soap one", shelf.SCRIPT])

        # The answers of two models, each with its time, and the gates of one.
        for region in (sasrec, ilora):
            rows = region.get_by_role("table", name="Recommended next").get_by_role("row")
            expect(rows.nth(1)).to_contain_text(SOAP)
            expect(rows.nth(1)).to_contain_text(re.compile(r"near .* \(cosine \d\.\d\d\)"))
            expect(region.get_by_text(re.compile(r"^\d+\.\d ms per answer$"))).to_be_visible()
        gates = ilora.get_by_role("table", name="Weights of the experts").get_by_role("row")
        weights = [float(text) for text in re.findall(r"([\d.]+)%", " ".join(gates.all_inner_texts()))]
        assert len(weights) == 3 and abs(sum(weights) - 100) < 0.2
        expect(sasrec.get_by_role("table")).to_have_count(1)

        # A new item by its title.
        page.get_by_label("Title of a new item").fill("Lavender soap <b>five</b>")
        page.get_by_role("button", name="Add the new item").click()
        expect(status.first).to_contain_text("Added the new item Lavender soap <b>five</b>")
        new = sasrec.get_by_role("row").filter(has_text="Lavender soap <b>five</b> (new)")
        expect(new.get_by_role("cell").first).to_have_text(re.compile("^[123]$"))
        expect(ilora.get_by_text("takes no new items without training")).to_be_visible()

        page.get_by_role("button", name="Remove the newest title").click()
        expect(page.get_by_role("listitem")).to_have_text(["Lavender soap one"])
        page.get_by_role("button", name="Start again").click()
        expect(page.get_by_text("The history is empty.", exact=True)).to_be_visible()

        # Titles are text, and nothing came from elsewhere.
        assert page.evaluate("window.broken") is None and broken == []
        assert asked == {"127.0.0.1"}
        # Another visitor starts anew.
        other = browser.new_page()
        other.goto(address)
        expect(other.get_by_text("The history is empty.", exact=True)).to_be_visible()
        other.get_by_label("Search titles").fill("five")
        expect(other.get_by_role("status").first).to_have_text("0 titles are offered")
        browser.close()


@pytest.mark.slow
def test_the_folder_of_a_space_serves_itself(models, tmp_path, run_recipe):
    run_recipe("serve_demo", models=models[0], new_items=False, space_dir=tmp_path / "space")
    program = "import runpy, hf_ilora; print(hf_ilora.__file__); runpy.run_path('app.py', run_name='__main__')"
    with served([sys.executable, "-c", program], cwd=tmp_path / "space") as address:
        config = httpx2.get(f"{address}config").json()
    assert "Search titles" in [component["props"].get("label") for component in config["components"]]
