"""The page in headless Chromium: nothing is fetched, nothing is complained of, and all of it works by mouse and key."""

from __future__ import annotations

import copy
import json

import pytest

from browser import PHONE, embedded
from eckart.report import render
from eckart.report.figures import positions

PARTS = ["overview", "map", "layers", "change"]


def cell(layer: str) -> str:
    return f'#panel-map td[data-layer="{layer}"]'


@pytest.mark.parametrize("part", PARTS)
def test_every_part_loads_without_a_complaint_or_a_request(browser, both, part):
    browser.open(both[0], part=part)
    assert browser.run("return document.querySelectorAll('[role=tabpanel]:not([hidden])').length") == 1
    assert browser.run(f"return document.getElementById('panel-{part}').childElementCount") > 0
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [both[0].as_uri()]


def test_a_complaint_would_be_seen(browser, alone):
    browser.open(alone[0])
    browser.run("console.error('broken')")
    browser.run("fetch('https://example.org/').catch(() => {})")  # which the page's own policy refuses
    complaints = " ".join(browser.complaints())
    assert "broken" in complaints
    assert "Content Security Policy" in complaints


def test_figures_in_the_page_are_those_of_the_json(browser, both):
    page, figures = both
    browser.open(page, part="map")
    assert browser.run("return document.getElementById('figures').textContent") == embedded(page)
    assert json.loads(embedded(page)) == figures
    for choice, item in enumerate(figures["map"]):
        browser.run(
            "const choice = document.getElementById('map-figure'); choice.value = arguments[0];"
            "choice.dispatchEvent(new Event('change'))",
            str(choice),
        )
        shown = browser.run(
            "return [...document.querySelectorAll('#panel-map td[data-layer]')]"
            ".map((td) => [td.dataset.layer, td.dataset.value])"
        )
        assert len(shown) == len(figures["layers"])
        values = {layer["name"]: layer for layer in figures["layers"]}
        for name, value in shown:
            wanted = values[name]
            for key in item["path"]:
                wanted = wanted[key]
            assert float(value) == wanted, (name, item["title"])
    browser.find("#tab-layers").click()
    rows = browser.run("return [...document.querySelectorAll('#layers tbody tr')].map((row) => row.dataset.layer)")
    assert sorted(rows) == sorted(layer["name"] for layer in figures["layers"])
    kept = {layer["name"]: layer["kept"]["20%"] for layer in figures["layers"]}
    assert [kept[name] for name in rows] == sorted(kept.values(), reverse=True)


def test_the_overview_says_what_the_json_says(browser, alone):
    page, figures = alone
    browser.open(page)
    text, advice = browser.text("#panel-overview"), figures["advice"]
    assert advice["command"] in text
    assert f"{100 * advice['kept']:.1f} %" in text
    best = max(figures["kinds"], key=lambda kind: kind["kept"])
    assert f"Start with {best['short']}" in text
    assert browser.run("return document.querySelectorAll('#budgets tbody tr').length") == len(advice["steps"])


def test_clicking_a_cell_shows_its_spectrum(browser, alone):
    page, figures = alone
    browser.open(page, part="map")
    layer = figures["layers"][9]
    browser.find(cell(layer["name"])).click()
    assert browser.text("#chosen") == layer["name"]
    assert browser.run("return document.querySelector('#details .line').getAttribute('d').split('L').length") == len(
        layer["spectrum"]["values"]
    )
    assert layer["name"] in browser.text("#live")
    assert browser.run("return document.querySelector('td.chosen').dataset.layer") == layer["name"]
    assert browser.run("return location.hash").endswith(layer["name"])
    browser.driver.refresh()  # the address keeps what was chosen
    assert browser.text("#chosen") == layer["name"]


def test_hovering_shows_a_spectrum_for_as_long_as_the_pointer_stays(browser, alone):
    from selenium.webdriver import ActionChains

    page, figures = alone
    browser.open(page, part="map")
    chosen, other = figures["layers"][2]["name"], figures["layers"][12]["name"]
    browser.find(cell(chosen)).click()
    ActionChains(browser.driver).move_to_element(browser.find(cell(other))).perform()
    assert browser.text("#chosen") == other
    ActionChains(browser.driver).move_to_element(browser.find("#name")).perform()
    assert browser.text("#chosen") == chosen


def test_the_map_is_worked_by_keys(browser, alone):
    page, figures = alone
    browser.open(page, part="map")
    names = {(layer["block"], layer["kind"]): layer["name"] for layer in figures["layers"]}
    browser.find("#map-figure").send_keys("")
    assert browser.run("return document.querySelectorAll('#panel-map [role=grid] [tabindex=\"0\"]').length") == 1
    browser.press("TAB")

    def focused() -> str:
        return browser.run("return document.activeElement.dataset.layer")

    assert focused() == names[0, 0]
    browser.press("ARROW_DOWN", "ARROW_RIGHT", "ARROW_RIGHT")
    assert focused() == names[1, 2]
    style = "return getComputedStyle(document.activeElement)"
    assert browser.run(f"{style}.outlineStyle") == "solid"
    assert browser.run("return parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    browser.press("ENTER")
    assert browser.text("#chosen") == names[1, 2]
    browser.press("END", "ARROW_RIGHT")  # there is nothing beyond the last one
    assert focused() == names[1, len(figures["kinds"]) - 1]
    browser.press("ARROW_UP", "ARROW_UP", "HOME", "SPACE")
    assert browser.text("#chosen") == names[0, 0]
    label = browser.run("return document.activeElement.getAttribute('aria-label')")
    assert label.startswith(f"block 0, {figures['kinds'][0]['name']}: ")


def test_tabs_and_charts_are_worked_by_keys(browser, both):
    browser.open(both[0])
    browser.find("#tab-overview").send_keys("")
    for part in PARTS[1:]:
        browser.press("ARROW_RIGHT")
        assert browser.run("return document.querySelector('[aria-selected=true]').id") == f"tab-{part}"
        assert not browser.run(f"return document.getElementById('panel-{part}').hidden")
    browser.run("document.querySelector('#details .chart').focus()")
    browser.press("ARROW_RIGHT", "ARROW_RIGHT")
    tip = browser.text("#details .tip")
    assert tip.startswith("rank 2 · before ")
    assert "after" in tip


def test_before_and_after_shows_both_spectra_and_the_difference(browser, both):
    page, figures = both
    browser.open(page, part="change")
    assert browser.run(
        "return [...document.querySelector('#details .chart').querySelectorAll('.line')]"
        ".map((line) => line.classList[1])"
    ) == ["before", "after", "change"]
    shown = browser.run(
        "return [...document.querySelectorAll('#panel-change td[data-layer]')].map((td) => Number(td.dataset.value))"
    )
    assert shown == [layer["difference"]["relative"] for layer in figures["against"]["layers"]]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_follow_the_system_and_the_switch(browser, alone, theme):
    browser.open(alone[0], theme=theme, part="map")
    brightness = (
        "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
        ".reduce((sum, value) => sum + value) / 3"
    )
    assert (browser.run(brightness) < 64) == (theme == "dark")
    before = browser.run("return document.querySelector('td[data-layer]').style.background")
    browser.find("#theme").click()
    assert (browser.run(brightness) < 64) == (theme == "light")
    assert browser.run("return document.querySelector('td[data-layer]').style.background") != before
    browser.run("localStorage.clear()")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("part", ["overview", "map", "layers", "change"])
def test_text_can_be_told_from_what_is_behind_it(browser, both, theme, part):
    """Contrast of 4.5 as WCAG 2.1 asks for, of every text with a background of its own or its parents'."""
    browser.open(both[0], theme=theme, part=part)
    assert browser.run(CONTRAST) == []


@pytest.mark.parametrize("part", PARTS)
def test_a_phone_scrolls_down_only(browser, both, part):
    browser.open(both[0], PHONE, part=part)
    assert browser.run("return [innerWidth, document.documentElement.scrollWidth]") == [360, 360]


def test_on_a_phone_the_spectrum_comes_and_goes(browser, alone):
    page, figures = alone
    browser.open(page, PHONE, part="map")
    assert not browser.find("#details").is_displayed()
    name = figures["layers"][3]["name"]
    browser.find(cell(name)).click()
    assert browser.find("#details").is_displayed()
    assert browser.text("#chosen") == name
    browser.press("ESCAPE")
    assert not browser.find("#details").is_displayed()
    assert browser.run("return document.activeElement.dataset.layer") == name


def test_a_page_of_210_weights_is_small_and_opens_quickly(browser, both, tmp_path):
    """As many weights and points as the demo model has, before and after."""
    figures = copy.deepcopy(both[1])
    points = positions(576).tolist()
    figures["points"] = {"576": points}
    figures["blocks"] = [{"name": f"model.layers.{i}", "label": str(i)} for i in range(30)]

    def grown(layers):
        made = []
        for block in range(30):
            for layer in layers[:7]:
                name = layer["name"].replace(".0.", f".{block}.")
                layer = copy.deepcopy({**layer, "name": name, "block": block, "shape": [576, 1536]})
                curve = {
                    "values": [float(f"{9 / (i + block):.5g}") for i in points],
                    "energy": [round(1 - 0.9987654 / i, 6) for i in points],
                }
                layer["spectrum"] = curve
                if "difference" in layer:
                    layer["difference"]["spectrum"] = curve
                made.append(layer)
        return made

    figures["layers"] = grown(figures["layers"])
    figures["against"]["layers"] = grown(
        [{**layer, "kind": figures["layers"][i]["kind"]} for i, layer in enumerate(figures["against"]["layers"][:7])]
    )
    page = tmp_path / "large.html"
    page.write_text(render(figures))
    assert page.stat().st_size < 5e6
    milliseconds = []
    for _ in range(3):  # the best of three: what the page costs, whatever else the machine does meanwhile
        browser.open(page, part="map")
        milliseconds.append(browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd"))
        assert browser.run("return document.querySelectorAll('#panel-map td[data-layer]').length") == 210
    assert min(milliseconds) < 2000
    assert browser.complaints() == []


CONTRAST = """
const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + [0.2126, 0.7152, 0.0722][i] * c, 0);
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = parse(getComputedStyle(e).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
return [...document.querySelectorAll("body *")].filter((e) =>
  e.checkVisibility() && !["SCRIPT", "STYLE", "OPTION", "NOSCRIPT"].includes(e.tagName) && !e.closest(".hidden, .skip")
  && [...e.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim())
).map((e) => {
  const style = getComputedStyle(e);
  const [a, b] = [light(parse(e.namespaceURI.endsWith("svg") ? style.fill : style.color)), light(behind(e))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  const name = `${e.tagName}.${e.className.baseVal ?? e.className}`;
  return ratio < 4.5 ? `${name} ${e.textContent.slice(0, 30)} ${ratio.toFixed(2)}` : null;
}).filter(Boolean);
"""
