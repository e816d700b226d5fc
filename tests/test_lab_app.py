"""lab/app.py: its pictures are the scripts' own, and a real browser shows and paints them.

What needs gradio, and what needs Chromium and selenium as well, is skipped where they are missing.
"""

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import error_of, noise_folder
from PIL import Image
from test_lab_released import resnet_state

import common
import cut
import cyclegan
import pix2pixsc
import spade
import swapae
from lab import app

SHARED = ["--size", "32", "--batch", "2", "--workers", "0", "--device", "cpu", "--steps", "1"]
CUT = ["--load", "36", "--ngf", "4", "--ndf", "4", "--blocks", "2", "--patches", "16"]
SPADE = ["--load", "36", "--ngf", "4", "--ndf", "4", "--hidden", "6", "--labels", "4", "--z", "4",
         "--doublings", "4", "--init", "glorot",  # as released, one step paints grey
         "--input", "encoder", "--d-layers", "2", "--vgg", "random", "--vgg-layers", "1"]
SWAPAE = ["--downs", "2", "--texture", "16", "--widths", "0.125", "0.0625", "0.015625", "0.0625",
          "--patch", "8", "--crops", "3", "--vgg", "random", "--seed", "7"]
VALUES = {"x": None, "value": None, "exemplar": None, "exemplar_map": None, "way": None,
          "seed": 0, "styles": 1, "axis": 1, "alpha": 1.0}

needs_gradio = pytest.mark.skipif(app.gr is None, reason="gradio is not installed")


def answer(path, **values):
    """What the page answers for these values of its parts."""
    return app.answer(path, **VALUES | values)[0]


def same(picture, file):
    return np.array_equal(np.asarray(picture), np.asarray(common.open_rgb(file)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of three runs of one step each, on noise, and the folder of the noise."""
    root = tmp_path_factory.mktemp("app")
    noise, maps, rng = noise_folder(root / "noise"), root / "maps", np.random.default_rng(0)
    for split in ("train", "test"):
        for kind, high in (("img", 256), ("label", 4)):
            (maps / f"{split}_{kind}").mkdir(parents=True)
            for i in range(4):
                shape = (32, 32, 3) if kind == "img" else (4, 4)
                noisy = rng.integers(0, high, shape, dtype=np.uint8)
                noisy = noisy if kind == "img" else noisy.repeat(8, 0).repeat(8, 1)
                Image.fromarray(noisy).save(maps / f"{split}_{kind}" / f"{i}.png")
    (maps / "classes.txt").write_text("sky\nsea\n\nrock")
    for script, flags, data in ((cut, CUT, noise), (spade, SPADE, maps), (swapae, SWAPAE, noise)):
        script.main([*SHARED, *flags, "--data", str(data), "--out",
                     str(root / "runs" / script.__name__)])
    return root


def weights(runs, script):
    return str(runs / "runs" / script / "last.pt")


def translated(script, runs, out, *flags):
    """The picture that the script's --translate writes."""
    script.main(["--weights", weights(runs, script.__name__), "--device", "cpu", "--out", str(out),
                 *map(str, flags)])
    return next(out.rglob("*.png"))


# ---- checkpoints ---------------------------------------------------------------------------------


def test_every_script_has_its_row():
    scripts = {f.stem for f in Path(app.__file__).parent.parent.glob("*.py")} - {"common"}
    assert app.METHODS.keys() == scripts
    for name, (loader, *_) in app.METHODS.items():
        assert f"\ndef {loader}(args, device" in Path(f"{name}.py").read_text(encoding="utf-8")


def test_finds_checkpoints_at_any_depth_but_no_encoders_and_discriminators(tmp_path):
    for name in ("a/last.pt", "b/task/last.pt", "c/latest_net_G.pth", "c/latest_net_E.pth",
                 "c/latest_net_D.pth", "c/latest_net_G_A.pth", "b/log.csv", "x.pt.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert [Path(f).relative_to(tmp_path).as_posix() for f in app.checkpoints(tmp_path)] == [
        "a/last.pt", "b/task/last.pt", "c/latest_net_G.pth", "c/latest_net_G_A.pth"]
    assert app.checkpoints(tmp_path / "missing") == []


def test_knows_whose_file_it_is(runs, tmp_path):
    script, args, chance = app.opened(weights(runs, "spade"))
    assert script is spade and args.labels == 4 and args.input == "encoder"
    assert chance["L_KLD"] == 0
    for name, make, blurs in (("cut", cut.ResnetGenerator, True),
                              ("cyclegan", cyclegan.ResnetGenerator, False)):
        path = tmp_path / f"{name}.pth"
        torch.save(resnet_state(make(4, 2, blurs), antialias=blurs), path)
        script, args, chance = app.opened(str(path))
        assert script.__name__ == name and chance is None
        assert app.samples(str(path)) == ([], [])  # toy pictures are not what it was trained on
        picture = answer(str(path), x=str(runs / "noise/testA/0.png"))
        script.main(["--weights", str(path), "--translate", str(runs / "noise/testA/0.png"),
                     "--out", str(tmp_path / name)])
        assert same(picture, tmp_path / name / "0.png")


@pytest.mark.parametrize("content", [b"no weights", None])
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "some.pt"
    if content is None:
        torch.save({"a": torch.zeros(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(common.UserError, match="some.pt: "):
        app.opened(str(path))
    with pytest.raises(common.UserError, match="no such file"):
        app.opened(str(tmp_path / "gone.pt"))


# ---- pictures ------------------------------------------------------------------------------------


def test_translates_as_the_script_does_and_reads_the_weights_once(runs, tmp_path, monkeypatch):
    x, calls, load = str(runs / "noise/testA/1.png"), [], cut.load_generator
    monkeypatch.setattr(cut, "load_generator", lambda *args: calls.append(1) or load(*args))
    app.NETWORKS.clear()
    pictures = [answer(weights(runs, "cut"), x=x) for _ in range(3)]
    assert len(calls) == 1 and cut.load_generator is not load
    assert pictures[0].size == (48, 40)
    assert all(same(p, translated(cut, runs, tmp_path, "--translate", x)) for p in pictures)
    assert answer(weights(runs, "cut")) is None  # no input, no picture


def test_paints_as_the_script_does(runs, tmp_path):
    path, label = weights(runs, "spade"), runs / "maps/test_label/2.png"
    ids, image = np.asarray(Image.open(label)), str(runs / "maps/test_img/0.png")
    value = app.board(ids, app.palette(path))
    for i, (values, flags) in enumerate((({"seed": 3}, ["--seed", 3]),
                                         ({"exemplar": image}, ["--exemplar", image]))):
        file = translated(spade, runs, tmp_path / str(i), "--translate", label, *flags)
        assert same(answer(path, value=value, **values), file)
    assert not same(answer(path, value=value, seed=4), tmp_path / "0/2.png")
    with pytest.raises(common.UserError, match=r"map.png: label ids \[9\] out of range"):
        answer(path, value=app.board(np.where(ids == 2, 9, ids), []))


def test_edits_as_the_script_does(runs, tmp_path, monkeypatch):
    path, folder = weights(runs, "swapae"), runs / "noise/testA"
    x, other, mask = str(folder / "0.png"), str(folder / "1.png"), tmp_path / "mask.png"
    region = np.zeros((40, 48), np.uint8)
    region[:20, 10:] = 1
    Image.fromarray(region * 255).save(mask)
    calls, codes_of = [], swapae.codes_of
    monkeypatch.setattr(swapae, "codes_of", lambda *args: calls.append(1) or codes_of(*args))
    made = [answer(path, x=x, exemplar=other, seed=7, value=app.board(region, []), **values)
            for values in ({"way": "swap", "alpha": 0.5}, {"way": "texture", "axis": 2},
                           {"way": "region", "alpha": -2.0}, {"way": "region", "alpha": 0.0})]
    assert len(calls) == 1  # the codes of the training pictures are kept, too
    for i, flags in enumerate((["--exemplar", other, "--alpha", 0.5], ["--pca", 2],
                               ["--pca", 1, "--mask", mask, "--alpha", -2])):
        flags += ["--data", runs / "noise"]
        assert same(made[i], translated(swapae, runs, tmp_path / str(i), "--translate", x, *flags))
    moved = np.abs(np.asarray(made[2], float) - np.asarray(made[3], float)).sum(2)
    assert moved[:18, 14:].mean() > 2 * moved[26:].mean()  # edges of the region are seen by G


def test_where_a_click_into_cuts_output_finds_itself(runs):
    picture, = app.found(weights(runs, "cut"), str(runs / "noise/testA/0.png"), "[0.7, 0.3]")
    tile = np.asarray(picture)[20:20 + 80, 4:4 + 96].astype(int)  # 48 x 40 pixels, magnified
    red = np.argwhere((tile == [255, 0, 0]).all(2)).mean(0) / tile.shape[:2]
    assert red == pytest.approx([0.35, 0.71], abs=0.06)  # in the middle of a place of 4 pixels


def test_text_and_huge_pictures_are_refused(runs, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("L", (4001, 1000)).save(tmp_path / "huge.png")
    for name, message in (("text.jpg", "not a readable picture"), ("huge.png", "4,000,000")):
        with pytest.raises(common.UserError, match=f"{name}: .*{message}"):
            answer(weights(runs, "cut"), x=str(tmp_path / name))


def test_nothing_is_fetched_for_samples(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "download", lambda *_: pytest.fail("fetched"))
    xs, exemplars = app.samples(weights(runs, "spade"))
    assert [f.parent.name for f in xs + exemplars] == ["test_label"] * 4 + ["test_img"] * 4
    assert [f.parent.name for f in app.samples(weights(runs, "cut"), 4)[0]] == ["testA", "testA",
                                                                               "testB", "testB"]
    state = torch.load(weights(runs, "cut"), weights_only=True)
    state["config"]["data"] = "horse2zebra"  # known, but not here
    torch.save(state, tmp_path / "last.pt")
    assert app.samples(str(tmp_path / "last.pt")) == ([], [])


# ---- label maps ----------------------------------------------------------------------------------


def test_a_map_arrives_as_it_was_sent():
    ids = np.random.default_rng(0).integers(0, 256, (5, 7))
    value = app.board(ids, [[3, "sky", [1, 2, 3, 255]]])
    assert np.array_equal(app.ids_of(value), ids) and app.ids_of(value).dtype == np.uint8
    assert json.loads(value)["palette"] == [[3, "sky", [1, 2, 3, 255]]]
    for wrong in ("", "{}", '{"w": 2, "h": 2, "ids": "AAA="}'):
        with pytest.raises((ValueError, KeyError)):
            app.ids_of(wrong)
    with pytest.raises(common.UserError, match="ids from 0 to 256"):
        app.board([[0, 256]], [])


def test_palette_has_the_names_of_the_classes(runs, tmp_path, monkeypatch):
    colours = app.palette(weights(runs, "spade"))
    assert [c[:2] for c in colours] == [[0, "sky"], [1, "sea"], [2, "class 2"], [3, "rock"]]
    assert len({tuple(c[2]) for c in colours}) == 4  # no two of one colour
    _, args, chance = app.opened(weights(runs, "spade"))
    args.data, args.labels, args.unlabelled = "toy", 7, [255]
    monkeypatch.setattr(app, "opened", lambda _: (spade, args, chance))
    monkeypatch.setattr(spade, "load_networks", lambda *_: None)
    app.NETWORKS.clear()
    names = [name for _, name, _ in app.palette(weights(runs, "spade"))]
    app.NETWORKS.clear()
    assert names == ["sky", "hill", "ground", "grass", "tree", "animal", "water", "unlabelled"]
    args = pix2pixsc.get_args(["--label-kind", "landmarks", "--weights", str(tmp_path / "none")]
                              [:2])
    monkeypatch.setattr(app, "opened", lambda _: (pix2pixsc, args, chance))
    with pytest.raises(common.UserError, match="--label-kind landmarks"):
        app.palette("x.pt")


def test_maps_are_shown_in_the_colours_of_the_palette(runs):
    label, colours = runs / "maps/test_label/0.png", app.palette(weights(runs, "spade"))
    shown, ids = app.shown(label, colours), np.asarray(Image.open(label))
    assert np.array_equal(np.asarray(shown), ids)  # still ids
    assert np.array_equal(np.asarray(shown.convert("RGB")),
                          np.array([c[2][:3] for c in colours])[ids])


def test_curves_and_grids_of_a_run(runs):
    text = app.curves(weights(runs, "cut"))
    assert "<style" not in text and "cut, step 1" in text and "NCE_X" in text
    assert text.count("<img src='data:image/jpeg") == 2 and "dashed, by chance" in text


# ---- the command ---------------------------------------------------------------------------------


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(app, "gr", None)
    assert "needs gradio: pip install -r lab/requirements.txt" in error_of(capsys, app.main)


@needs_gradio
def test_page_has_a_part_for_all_that_is_shown(runs):
    config = app.interface(runs / "runs").get_config_file()
    ids = {part["props"].get("elem_id") for part in config["components"]}
    assert {name for _, names, *_ in app.METHODS.values() for name in names.split()} <= ids
    assert not (Path(app.__file__).with_suffix(".pyi")).exists()  # gradio writes one for subclasses


# ---- the page in a browser -----------------------------------------------------------------------


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
LISTENED = """import runpy, sys
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print("REQUEST", args[1] if event == "socket.connect" else args[0], flush=True)
sys.addaudithook(hook)
sys.argv = ["lab.app", *sys.argv[1:]]
runpy.run_module("lab.app", run_name="__main__")
"""


class Page:
    """A browser at the page of a server, and what they ask of whom."""

    def __init__(self, runs, log):
        from selenium import webdriver

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log, root = log, Path(app.__file__).parent.parent
        self.server = subprocess.Popen(
            [sys.executable, "-c", LISTENED, "--runs", str(runs), "--port", str(port)], cwd=root,
            stdout=open(log, "w"), stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                     "--window-size=1360,1400"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.url = f"http://127.0.0.1:{port}/"
        self.until(lambda: socket.create_connection(("127.0.0.1", port)).close() or True)
        self.driver.get(self.url)

    def close(self):
        self.driver.quit()
        self.server.terminate()
        self.server.wait()

    def until(self, what, seconds=90):
        """The first true value of what(), which may raise until then."""
        end, error = time.monotonic() + seconds, None
        while time.monotonic() < end:
            try:
                if value := what():
                    return value
            except Exception as e:  # not there yet
                error = e
            time.sleep(0.05)
        self.driver.save_screenshot(str(Path(self.log).with_name("page.png")))
        pytest.fail(f"waited in vain ({error}); the page says {self.said()!r}, the server: "
                    f"{Path(self.log).read_text()}; see page.png beside {self.log}")

    def all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector):
        return self.driver.find_element("css selector", selector)

    def said(self):
        return self.one("#message").text

    def output(self):
        """The address of the output; it changes with the picture."""
        return self.one("#out img").get_attribute("src")

    def change(self, act):
        """Do it, wait for another output: its pixels, and the seconds until it was there."""
        before, start = [i.get_attribute("src") for i in self.all("#out img")], time.monotonic()
        act()
        self.until(lambda: self.output() not in before)
        return self.pixels(), time.monotonic() - start

    def pixels(self, selector="#out img"):
        """The pixels (H, W, 3) of the file that the page has loaded."""
        data = self.driver.execute_async_script(
            "const done = arguments[1]; fetch(document.querySelector(arguments[0]).src)"
            ".then(r => r.blob()).then(b => { const f = new FileReader();"
            "f.onload = () => done(f.result); f.readAsDataURL(b); });", selector)
        raw = io.BytesIO(base64.b64decode(data.split(",")[1]))
        return np.asarray(Image.open(raw).convert("RGB")).astype(int)

    def choose(self, name):
        """Choose a network, unless it is; its first picture is there when this returns."""
        if self.one("#network input").get_attribute("value") != name:
            self.change(lambda: self._choose(name))

    def _choose(self, name):
        self.one("#network input").click()
        self.until(lambda: [o for o in self.all("[role=option]") if o.text.strip() == name])
        next(o for o in self.all("[role=option]") if o.text.strip() == name).click()

    def drag(self, *places):
        """From one place of the label map to the next, (across, down) from 0 to 1."""
        from selenium.webdriver import ActionChains

        board = self.one("#board canvas")
        size = np.array([board.size["width"], board.size["height"]])
        chain = ActionChains(self.driver, duration=30)
        for i, place in enumerate(places):
            chain.move_to_element_with_offset(board, *map(int, (np.array(place) - 0.5) * size))
            if i == 0:
                chain.click_and_hold()
        chain.release().perform()

    def map(self):
        """The colours (H, W, 3) of the label map."""
        w, h, rgba = self.driver.execute_script(
            "const c = document.querySelector('#board canvas'); return [c.width, c.height, "
            "[...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]")
        return np.array(rgba).reshape(h, w, 4)[..., :3]

    def press(self, text):
        next(b for b in self.all("#board button") if b.text == text).click()


@pytest.fixture(scope="module")
def browser():
    """Skips where there is no browser to drive."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    pytest.importorskip("selenium", reason="selenium is not installed")
    if CHROMIUM is None or shutil.which("chromedriver") is None:
        pytest.skip("no chromium and chromedriver (Debian: chromium chromium-driver)")


@pytest.fixture(scope="module")
def shown(browser, runs, tmp_path_factory):
    shown = Page(runs / "runs", tmp_path_factory.mktemp("log") / "server.txt")
    try:
        shown.until(shown.output)  # the first test picture is translated without being asked
        yield shown
    finally:
        shown.close()


@pytest.mark.slow
def test_without_runs_the_page_names_a_command(browser, tmp_path):
    empty = Page(tmp_path / "runs", tmp_path / "server.txt")
    try:
        assert "python cut.py" in empty.until(lambda: "runs/" in empty.said() and empty.said())
    finally:
        empty.close()


@pytest.mark.slow
def test_a_picture_is_translated_as_by_the_command(shown, runs, tmp_path):
    shown.choose("cut")
    x = tmp_path / "mine.png"
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 256, (45, 63, 4), dtype=np.uint8)).save(x)  # transparent
    made, _ = shown.change(lambda: shown.one("#x input[type=file]").send_keys(str(x)))
    assert made.shape == (45, 63, 3)
    assert same(made, translated(cut, runs, tmp_path / "out", "--translate", x))


@pytest.mark.slow
def test_a_click_into_the_output_of_cut_draws_the_figure(shown):
    shown.choose("cut")
    shown.one("#out img").click()
    shown.until(lambda: shown.pixels("#match img").shape[1] > 5 * 48)  # five columns


@pytest.mark.slow
def test_a_text_file_named_jpg_gives_one_line(shown, tmp_path):
    shown.choose("cut")
    (tmp_path / "fake.jpg").write_text("not a picture")
    shown.one("#x input[type=file]").send_keys(str(tmp_path / "fake.jpg"))
    line = shown.until(lambda: "fake.jpg" in shown.said() and shown.said())
    assert line.startswith("fake.jpg: not a readable picture") and "\n" not in line
    shown.until(lambda: not shown.all("#out img"))  # no stale answer beside it


@pytest.mark.slow
def test_a_stroke_changes_the_picture_where_it_is(shown, runs):
    shown.choose("spade")
    made, file = shown.pixels(), runs / "maps/test_label/0.png"
    colours = {name: colour[:3] for _, name, colour in app.palette(weights(runs, "spade"))}
    assert np.array_equal(shown.map(), np.asarray(app.shown(
        file, app.palette(weights(runs, "spade"))).convert("RGB")))
    before = shown.map()
    shown.press("rock")
    after, seconds = shown.change(lambda: shown.drag((0.15, 0.2), (0.6, 0.25), (0.6, 0.4)))
    print(f"from stroke to picture: {seconds:.2f} s")
    painted = (shown.map() != before).any(2)
    assert painted[4:12, 4:20].any() and not painted[20:].any() and not painted[:, 26:].any()
    assert np.array_equal(np.unique(shown.map()[painted], axis=0), [colours["rock"]])
    moved = np.abs(after - made).sum(2)
    assert moved[painted].mean() > 3 * moved[20:].mean()
    # edges of strokes over strokes: still no colour, so no id, that was not chosen
    shown.press("sea")
    shown.change(lambda: shown.drag((0.1, 0.1), (0.9, 0.83), (0.2, 0.5)))
    known = {tuple(c) for c in colours.values()}
    assert {tuple(c) for c in shown.map().reshape(-1, 3).tolist()} <= known
    # an area, everything, and back
    now = shown.map()
    shown.press("Fill everything")
    shown.until(lambda: (shown.map() == colours["sea"]).all())
    shown.press("Fill an area")
    shown.press("sky")
    shown.drag((0.5, 0.5))
    assert (shown.map() == colours["sky"]).all()
    shown.press("Undo")
    shown.press("Undo")
    assert np.array_equal(shown.map(), now)
    shown.press("Brush")


@pytest.mark.slow
def test_a_slider_changes_the_style(shown):
    from selenium.webdriver import Keys

    shown.choose("spade")
    made = shown.pixels()
    slider = shown.one("#seed input[type=range]")
    after, _ = shown.change(lambda: slider.send_keys(Keys.ARROW_RIGHT))
    assert (after != made).any()
    shown.change(lambda: slider.send_keys(Keys.ARROW_LEFT))
    assert (shown.pixels() == made).mean() > 0.99  # that style, on the same map


@pytest.mark.slow
def test_test_maps_and_exemplars_are_picked(shown, runs):
    shown.choose("spade")
    colours = app.palette(weights(runs, "spade"))
    shown.change(lambda: shown.all("#Is button.thumbnail-item")[2].click())
    assert np.array_equal(shown.pixels("#I img"), np.asarray(Image.open(
        runs / "maps/test_img/2.png")))
    shown.change(lambda: shown.all("#xs button.thumbnail-item")[3].click())
    assert np.array_equal(shown.map(), np.asarray(app.shown(
        runs / "maps/test_label/3.png", colours).convert("RGB")))
    file = runs / "mine.png"
    Image.fromarray(np.full((20, 24), 3, np.uint8)).save(file)
    own = shown.one("input[data-testid^='Open a label map']")
    shown.change(lambda: own.send_keys(str(file)))
    assert shown.map().shape == (20, 24, 3) and (shown.map() == colours[3][2][:3]).all()


@pytest.mark.slow
def test_codes_are_swapped_and_edited(shown):
    shown.choose("swapae")
    made = shown.pixels()
    edited, _ = shown.change(lambda: next(
        o for o in shown.all("#way label") if o.text == "texture").click())
    assert edited.shape == made.shape and (edited != made).any()


@pytest.mark.slow
def test_the_run_is_shown(shown):
    shown.all("[role=tab]")[1].click()
    shown.until(lambda: len(shown.all("#curves svg")) > 3 and shown.all("#curves img"))


@pytest.mark.slow
def test_no_request_leaves_the_machine(shown):
    """Last: what the browser asked for in all tests above, and whom the server connected to."""
    asked = set()
    for entry in shown.driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.add(message["params"]["request"]["url"])
    asked = {url for url in asked if not url.startswith(("data:", "blob:"))}
    print(*sorted({re.sub(r"\?.*|[0-9a-f]{32,}", "", url) for url in asked}), sep="\n")
    assert len(asked) > 20 and all(url.startswith(shown.url) for url in asked)
    assert "Failed to fetch" in shown.driver.execute_async_script(
        "fetch('https://example.com').then(() => arguments[0](''), e => arguments[0]('' + e))")
    reached = re.findall("REQUEST (.*)", Path(shown.log).read_text())
    assert all("127.0.0.1" in to or "localhost" in to for to in reached), reached
