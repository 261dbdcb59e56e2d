"""The report: what it keeps of a long run, and what a real browser makes of it."""

import json
import os
import re
import shutil

import numpy as np
import pytest

from configs import qwen3_32b, tiny
from qwen3next_jax.evaluation.report import Curve, Map, Report, Run, _layer_labels, main

LAYERS, STEPS = 6, 60


def write_run(workdir, *, steps=range(1, STEPS + 1), mode="w", **config):
    """A work directory whose metrics are functions of the step."""
    workdir.mkdir(exist_ok=True)
    with (workdir / "metrics.jsonl").open(mode) as file:
        for step in steps:
            line = {
                "step": step, "loss": loss(step), "ce": loss(step) - 0.5, "tokens": 100 * step,
                "grad_norm": "nan" if step == 7 else 1.0 + (step == 33) * 99,
                "tokens_per_second": 0 if step == 1 else 5000 + step, "data_wait": 0.25,
                "seconds/step": 3.0, "seconds/data": 1.0,
                "layers/load_max": [load(layer, step) for layer in range(LAYERS)],
                "layers/sink": [None, None, None, 0.5, None, 0.25],
            }  # fmt: skip
            file.write(json.dumps(line) + "\n")
            if step % 20 == 0:
                cells = [
                    {"task": "needle", "length": length, "depth": depth, "score": 512 / length}
                    for length in (512, 1024, 2048)
                    for depth in (0.0, 0.5)
                ]
                scores = {"eval_ce": loss(step), "eval_long_context_cells": cells}
                file.write(json.dumps({"step": step, **scores}) + "\n")
    model = {
        **tiny.get_config().model.to_dict(),
        "num_hidden_layers": LAYERS - 1,
        "full_attention_interval": 4,
    }
    given = {"model": model, "train": {"num_steps": 80}, **config}
    (workdir / "config.json").write_text(json.dumps(given))
    sample = {"step": 20, "prompt": "if ", "text": "a < b:\n</script><b>&amp;"}
    (workdir / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (workdir / "environment.jsonl").write_text('{"step": 0, "devices": "2 x abacus"}\n')
    return workdir


def loss(step):
    return 8.0 / step + 2


def load(layer, step):
    return 1.0 + 0.1 * layer + step / 100


def page(path):
    """What the page was given to draw."""
    text = path.read_text().split('id="data">')[1].split("</script>")[0]
    return json.loads(text)


def parts(data, kind):
    return [p for section in data["sections"] for p in section["parts"] if p["kind"] == kind]


def test_a_hundred_thousand_steps_keep_every_extreme_in_few_points():
    rng = np.random.default_rng(0)
    values = rng.standard_normal(100_000).cumsum()
    values[31_415] += 1e4
    curve = Curve()
    for step, value in enumerate(values.tolist(), start=1):
        curve.add(step, value)
    points = curve.points()
    assert len(points) <= 1601
    steps, kept = map(np.array, zip(*points, strict=True))
    np.testing.assert_array_equal(values[steps - 1], kept)  # each where it was
    assert steps[-1] == 100_000
    # Eight hundred spans at most and four hundred at least: none is longer than 256 steps.
    for start in range(0, 100_000, 2048):
        inside = (steps > start) & (steps <= start + 2048 + 256)
        span = values[start + 256 : start + 2048]
        assert kept[inside].max() >= span.max()
        assert kept[inside].min() <= span.min()
    assert 1e4 - 1e3 < kept.max() == values.max()


def test_maps_hold_the_means_of_their_spans():
    rng = np.random.default_rng(1)
    values = rng.uniform(size=(3, 5000))
    heat = Map()
    for step in range(5000):
        heat.add(step, [values[0, step], None, "nan" if step % 2 else values[2, step]])
    first, means = heat.columns()
    assert 64 <= len(first) <= 128
    ends = [*first[1:], 5000]
    want = [values[0, a:b].mean() for a, b in zip(first, ends, strict=True)]
    np.testing.assert_allclose(means[0], want)
    want = [values[2, a:b:2].mean() for a, b in zip(first, ends, strict=True)]  # spans are even
    np.testing.assert_allclose(means[2], want)
    assert np.isnan(means[1]).all()


def test_a_page_written_as_the_run_goes_is_the_page_of_the_whole(tmp_path):
    workdir = write_run(tmp_path / "run", steps=range(1, 30))
    report = Report([workdir], tmp_path / "a.html")
    report.write()
    write_run(workdir, steps=range(30, 50), mode="a")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "lo')  # under way
    report.write()
    Report([workdir], tmp_path / "b.html").write()
    a, b = page(tmp_path / "a.html"), page(tmp_path / "b.html")
    assert a["sections"] == b["sections"]
    assert a["summary"]["rows"][0]["cells"][1] == "49 of 80"

    write_run(workdir, steps=range(1, 20))  # cut back to a checkpoint
    report.write()
    assert page(tmp_path / "a.html")["summary"]["rows"][0]["cells"][1] == "19 of 80"


def test_seconds_add_up_and_what_is_not_finite_is_told(tmp_path):
    Report([write_run(tmp_path / "run")], tmp_path / "a.html").write()
    data = page(tmp_path / "a.html")
    assert data["runs"][0]["seconds"] == [["step", 180.0], ["data", 60.0]]
    norm = next(p for p in parts(data, "chart") if p["title"] == "Gradient norm")
    assert "1 values are not finite" in norm["note"]
    assert norm["series"][0]["y"][32 - 1] == 100  # step 33, as step 7 is left out


def test_several_runs_lie_over_one_another_and_differences_come_first(tmp_path, capsys):
    for name, rate in (("one", 0.1), ("two", 0.2)):
        write_run(tmp_path / name, optimizer={"learning_rate": rate})
    main([str(tmp_path / "one"), str(tmp_path / "two"), f"--output={tmp_path / 'both.html'}"])
    assert capsys.readouterr().out.strip() == str(tmp_path / "both.html")
    data = page(tmp_path / "both.html")
    labels = {p["title"]: [s["label"] for s in p["series"]] for p in parts(data, "chart")}
    assert labels["Gradient norm"] == ["one", "two"]
    assert labels["Training loss"] == ["one: loss", "one: ce", "two: loss", "two: ce"]
    config = next(p for p in parts(data, "table") if p["title"] == "Config")
    assert config["rows"][0] == {
        "cells": ["optimizer.learning_rate", "0.1", "0.2"],
        "differs": True,
    }
    assert not any(row["differs"] for row in config["rows"][1:])
    assert len(parts(data, "heat")) == 4


def test_what_is_no_run_is_named_and_what_is_no_file(tmp_path):
    message = re.escape(f"{tmp_path}/metrics.jsonl does not exist; expected a work dir")
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path)])
    with pytest.raises(SystemExit, match="is a directory; name a file inside it"):
        main([str(tmp_path), f"--output={tmp_path}"])


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("metrics.jsonl", "\0\0\0\n"),
        ("metrics.jsonl", '{"step": 81, "loss": null}\n'),
        ("metrics.jsonl", '{"step": 81, "loss": "much"}\n'),
        ("samples.jsonl", "{\n"),
    ],
)
def test_a_damaged_line_is_named(file, line, tmp_path):
    workdir = write_run(tmp_path / "run")
    with (workdir / file).open("a") as lines:
        lines.write(line)
    with pytest.raises(SystemExit, match=rf"run/{file} has a damaged line, b'.*Remove the line"):
        main([str(workdir)])


def test_a_damaged_config_is_named_and_a_score_may_be_not_a_number(tmp_path):
    workdir = write_run(tmp_path / "run")
    cell = {"task": "needle", "length": 512, "depth": 0.5, "score": "nan"}
    with (workdir / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 81, "eval_long_context_cells": [cell]}) + "\n")
    main([str(workdir)])
    (workdir / "config.json").write_text('{"model": ')
    with pytest.raises(SystemExit, match=r"config\.json is no JSON: Expecting value"):
        main([str(workdir)])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        reason = "no browser to open the report in: apt-get install chromium chromium-driver"
        if os.environ.get("REQUIRE_CHROMIUM"):
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for switch in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1500,1000",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.fixture
def opened(browser, tmp_path):
    Report([write_run(tmp_path / "run")], tmp_path / "run" / "report.html").write()
    browser.get(f"file://{tmp_path}/run/report.html")
    return browser


def figure(browser, title):
    return browser.find_element("xpath", f"//figure[figcaption/b[text()='{title}']]")


def move_mouse_away(browser):
    """To the margin: a page that scrolls under the mouse would show what comes to lie there."""
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionBuilder(browser)
    actions.pointer_action.move_to_location(2, 2)
    actions.perform()


def polylines(element):
    """Each curve's corners, [n, 2] in the drawing's units, by its label."""
    return {
        line.get_attribute("data-label"): np.array(
            [[float(x) for x in p.split(",")] for p in line.get_attribute("points").split()]
        )
        for line in element.find_elements("css selector", "polyline")
    }


def test_the_browser_has_nothing_to_complain_about_and_fetches_nothing(opened):
    assert opened.get_log("browser") == []
    fetched = "return performance.getEntriesByType('resource').map(r => r.name)"
    assert [name for name in opened.execute_script(fetched) if not name.startswith("data:")] == []
    assert "run" in opened.title
    sections = [h.text for h in opened.find_elements("css selector", "h2")]
    assert sections == [
        "Loss",
        "Evaluation",
        "Retrieval",
        "Optimization",
        "Throughput",
        "Experts",
        "Layers",
        "Samples",
        "Config",
        "Environment",
    ]
    assert "2 x abacus" in opened.find_element("id", "summary").text


def test_curves_have_their_points_where_their_values_are(opened):
    lines = polylines(figure(opened, "Training loss"))
    assert lines.keys() == {"loss", "ce"}
    assert all(len(points) == STEPS for points in lines.values())
    x, y = lines["loss"].T
    assert np.ptp(np.diff(x)) < 0.2  # steps are evenly spaced; coordinates have one decimal
    # The scale is logarithmic; two values say how it lies.
    logs = np.log(loss(np.arange(1, STEPS + 1)))
    slope = (y[-1] - y[0]) / (logs[-1] - logs[0])
    np.testing.assert_allclose(y, y[0] + slope * (logs - logs[0]), atol=0.11)
    assert len(polylines(figure(opened, "Gradient norm"))["grad_norm"]) == STEPS - 1
    assert len(polylines(figure(opened, "Tokens per second"))["tokens_per_second"]) == STEPS - 1
    assert len(polylines(figure(opened, "Held-out cross-entropy"))["eval_ce"]) == 3


def test_scales_and_curves_can_be_switched(opened):
    chart = figure(opened, "Training loss")
    chart.find_element("css selector", "figcaption button").click()
    x, y = polylines(chart)["loss"].T
    values = loss(np.arange(1, STEPS + 1))
    want = y[0] + (y[-1] - y[0]) * (values - values[0]) / (values[-1] - values[0])
    np.testing.assert_allclose(y, want, atol=0.11)
    chart.find_element("css selector", ".legend button").click()
    assert polylines(chart).keys() == {"ce"}
    opened.find_element("css selector", "nav input").click()  # logarithmic steps
    x, _ = polylines(figure(opened, "Gradient norm"))["grad_norm"].T
    logs = np.log([step for step in range(1, STEPS + 1) if step != 7])
    np.testing.assert_allclose(x, x[0] + (x[-1] - x[0]) * logs / logs[-1], atol=0.11)
    assert opened.get_log("browser") == []


def test_values_are_read_by_mouse_and_by_keys(opened):
    from selenium.webdriver import ActionChains, Keys

    drawing = figure(opened, "Training loss").find_element("css selector", "svg[role=img]")
    ActionChains(opened).move_to_element(drawing).perform()
    tip = opened.find_element("id", "tip").text.split()
    step = int(tip[1])
    assert 25 <= step <= 35  # the middle of the chart
    assert tip[2:] == [f"{loss(step):.4g}", "loss", f"{loss(step) - 0.5:.4g}", "ce"]
    move_mouse_away(opened)
    drawing = figure(opened, "Gradient norm").find_element("css selector", "svg[role=img]")
    drawing.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert opened.find_element("id", "tip").text.split() == ["step", "2", "1", "grad_norm"]
    assert "Last values: grad_norm: 1 at step 60" in drawing.get_attribute("aria-label")


def test_heat_maps_have_their_cells(opened):
    heat = figure(opened, "Busiest expert over the mean load, by layer")
    canvas = heat.find_element("css selector", "canvas")
    pixels = opened.execute_script(
        "const c = arguments[0]; return {w: c.width, h: c.height, "
        "p: Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)}",
        canvas,
    )
    assert (pixels["h"], pixels["w"]) == (LAYERS, STEPS)
    cells = np.array(pixels["p"]).reshape(LAYERS, STEPS, 4)
    assert (cells[..., 3] == 255).all()
    # Brighter is more, to the eye and on paper: brightness orders the cells as the values do.
    brightness = cells[..., :3] @ [0.299, 0.587, 0.114]
    steps = np.arange(1, STEPS + 1)
    values = np.array([load(layer, steps) for layer in range(LAYERS)])
    order = np.argsort(values, axis=None)
    assert np.diff(brightness.flatten()[order]).min() > -1.5  # colors are whole numbers
    assert brightness.max() - brightness.min() > 150
    labels = [x.text for x in heat.find_elements("css selector", ".labels span")]
    assert labels == ["0 delta", "1 delta", "2 delta", "3 attention", "4 delta", "MTP"]
    # Layers without the thing are not in its map.
    sink = figure(opened, "layers/sink")
    assert sink.find_element("css selector", "canvas").get_attribute("height") == "2"

    from selenium.webdriver import Keys

    move_mouse_away(opened)
    canvas.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    tip = opened.find_element("id", "tip").text.splitlines()
    assert tip == ["layer 1 delta", "step 2", f"{load(1, 2):.4g}"]


def test_retrieval_scores_and_samples_are_there_as_they_are(opened):
    rows = figure(opened, "needle").find_elements("css selector", "tbody tr")
    assert [row.text.split() for row in rows] == [
        ["0%", "1.00", "0.50", "0.25"],
        ["50%", "1.00", "0.50", "0.25"],
    ]
    assert opened.find_element("css selector", "pre").text == "if a < b:\n</script><b>&amp;"


def test_a_run_of_layers_without_config_is_still_shown(browser, tmp_path):
    workdir = write_run(tmp_path / "run")
    for name in ("config.json", "samples.jsonl", "environment.jsonl"):
        (workdir / name).unlink()
    Report([workdir], tmp_path / "a.html").write()
    browser.get(f"file://{tmp_path}/a.html")
    assert browser.get_log("browser") == []
    run = Run(workdir)
    run.read()
    assert run.step == STEPS
    assert len(browser.find_elements("css selector", "canvas")) == 2


def test_layers_of_a_dense_model_are_all_attention():
    config = qwen3_32b.get_config().to_dict()
    assert _layer_labels(config, 2) == ["0 attention", "1 attention"]
