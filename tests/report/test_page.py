"""The report's page in a real browser: no error, nothing fetched, hostile text as text, sortable,
readable on a narrow screen and in the dark."""

import html
import json
import re
import shutil
import subprocess

import pytest

from rankwise.report.suite import load
from rankwise.report.write import write_report
from results import HOSTILE, record, write

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

# Looks at the page from inside, as a reader would, and leaves what it saw in the document.
PROBE = """
<script>
const seen = {}, table = document.querySelector("table.sorts"), name = r => r.cells[0].textContent;
const order = () => [...table.tBodies[0].rows].map(name);
seen.asWritten = order();
const click = column => table.tHead.rows[0].cells[column].firstChild.click();
click(1); seen.largestFirst = order(); click(1); seen.smallestFirst = order();
seen.sort = table.tHead.rows[0].cells[1].ariaSort;
click(0); seen.byName = order();
seen.scripts = document.scripts.length; seen.images = document.images.length;
seen.title = document.title;
seen.fetched = performance.getEntriesByType("resource").map(e => e.name);
seen.outside = [...document.querySelectorAll("[src], link, [*|href]")].map(e =>
  e.getAttribute("src") || e.getAttribute("href") || "").filter(v => v && !v.startsWith("#"));
const root = document.documentElement, tick = document.querySelector("svg text");
seen.wide = root.scrollWidth > root.clientWidth;
seen.paper = getComputedStyle(document.body).backgroundColor;
seen.ink = getComputedStyle(document.body).color;
seen.svgInk = getComputedStyle(tick).fill;
seen.svgTexts = [...document.querySelectorAll("svg text")].map(t => t.textContent);
seen.ids = [...document.querySelectorAll("svg [id]")].map(e => e.id);
const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen);
document.body.append(out);
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    records = []
    for task in ("a", "<b>b</b>"):
        for seed in (0, 1):
            records += [
                record("lora", task, seed, 0.80 + seed / 100, parameters=2000),
                record(HOSTILE, task, seed, 0.83, kind="X", parameters=1000, claim="choosing"),
                record("third", task, seed, 0.79, kind="X", ranks=(1, 2, 3, 4), claim="choosing"),
            ]
            records[-1]["lora_parameters"] = 3000
    folder = write(tmp_path_factory.mktemp("page"), records)
    (folder / "cells" / "half.json").write_text('{"<img src=x>')
    files = write_report(load([folder]), folder / "report", "rankwise report <i>x</i>")
    assert [file.name for file in files] == [
        "report.md",
        "report.html",
        "differences.png",
        "parameters.png",
    ]
    return folder / "report" / "report.html"


def look(page, tmp_path, *flags):
    """What the probe saw, and what the browser's console said."""
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome on this machine")
    probed = tmp_path / "probed.html"
    text = page.read_text(encoding="utf-8")
    probed.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    line = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    line += ["--disable-background-networking", "--enable-logging=stderr", "--dump-dom"]
    line += [f"--user-data-dir={tmp_path / 'profile'}", *flags, probed.as_uri()]
    found = subprocess.run(line, capture_output=True, text=True, timeout=120)
    seen = re.search(r'<pre id="seen">(.*?)</pre>', found.stdout, re.DOTALL)
    assert seen, found.stderr[-2000:]
    console = [line for line in found.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(seen[1])), console


def test_in_a_browser(page, tmp_path):
    seen, console = look(page, tmp_path, "--blink-settings=preferredColorScheme=1")
    assert console == []
    assert seen["fetched"] == [] and seen["outside"] == []
    assert seen["scripts"] == 2 and seen["images"] == 0  # the page's own, and the probe
    assert seen["title"].startswith("tiny: 3 methods on ")
    label = HOSTILE
    assert seen["asWritten"] == ["lora", label, "third"]
    assert seen["largestFirst"] == ["third", "lora", label]
    assert seen["smallestFirst"] == [label, "lora", "third"] and seen["sort"] == "ascending"
    assert seen["byName"] == [label, "lora", "third"]
    assert label[:31] + "…" in seen["svgTexts"] and "<b>b</b>, accuracy" in seen["svgTexts"]
    assert len(set(seen["ids"])) == len(seen["ids"])
    assert seen["svgInk"] == seen["ink"]

    dark, console = look(page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert console == [] and dark["svgInk"] == dark["ink"]
    assert dark["paper"] != seen["paper"] and dark["ink"] != seen["ink"]

    narrow, _ = look(page, tmp_path, "--window-size=500,900")
    assert not narrow["wide"]  # tables scroll inside, the page does not


def test_no_colour_of_a_drawing_is_fixed(page):
    """Whatever the page does not decide would be lost in the dark."""
    drawings = re.findall(r"<svg.*?</svg>", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawing)) == set()
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", drawing)


def test_the_same_results_give_the_same_page(page):
    folder = page.parent.parent
    first = page.read_text(encoding="utf-8")
    write_report(load([folder]), folder / "again", "rankwise report <i>x</i>")
    assert (folder / "again" / "report.html").read_text(encoding="utf-8") == first
