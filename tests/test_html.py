"""The page of a report: whole, escaped, alone, the same every time, and readable in a real browser."""

from __future__ import annotations

import hashlib
import html
import math
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from convert.curves import draw_frontier
from convert.gauges import draw_gauge, draw_stages
from convert.html import render
from convert.panels import draw_ranges
from convert.report import Check, Divergence, Interval, LayerNumbers, Report, RuntimeResult, TaskScore, at_least, at_most, holds
from formats.errors import FormatError
from formats.manifest import FileRecord, Manifest

VOID = {"meta", "input", "br", "hr", "img", "link"}
NASTY = "</script><img src=x onerror=alert(1)> & \"quoted\" 'single' {{ 7 * 7 }}"
PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def make_layers(count: int) -> tuple[LayerNumbers, ...]:
    names = [f"model.layers.{i}.{projection}.weight" for i in range(count) for projection in PROJECTIONS]
    return tuple(LayerNumbers(name, "int8-dynamic", 40 + math.sin(i), 0.99, 0.001) for i, name in enumerate(names))


def make_run(name: str, kl_nats: float | None = None) -> RuntimeResult:
    divergence = None if kl_nats is None else Divergence(4096, kl_nats, 0.2, 0.9, 12.5, 12.0)
    return RuntimeResult(name, {"torch": "2.13.0"}, "cpu", 163_000_000, 1_031_000_000, 1.79, 558.0, 12.8, f"{name} says Paris.", divergence)


def make_pair(
    layers: Sequence[LayerNumbers] = make_layers(4), manifest: dict[str, Any] | None = None, **report: Any
) -> tuple[Report, Manifest]:
    """A report and the manifest that it is about, with what a test changes of either."""
    ledger = [
        {"tensor": layer.tensor, "dtype": "BF16", "shape": [8, 8], "module": layer.tensor.removesuffix(".weight"), "decision": "quantize"}
        | {"scheme": layer.scheme, "algorithm": "rtn", "rule": "llama.yaml:9:9 linear", "outputs": []}
        for layer in layers
    ]
    kept = {"tensor": "model.norm.weight", "dtype": "BF16", "shape": [8], "module": "model.norm", "decision": "keep", "why": "a vector"}
    facts: dict[str, Any] = {
        "target": "w8a8",
        "format": "compressed-tensors",
        "source": {
            "origin": "someone/model",
            "commit": "0123abcd",
            "licence": "apache-2.0",
            "files": [{"name": "model.safetensors", "size_bytes": 300_000_000, "digest": "blake3:aa"}],
        },
        "recipe": {"model": "someone/model", "validation": {"reference": "float32"}},
        "calibration": None,
        "versions": {"octavo": "0.1.0"},
        "plan_digest": "ab" * 32,
        "ledger_sha256": "cd" * 32,
        "ledger": (*ledger, {**kept, "rule": "default", "outputs": []}),
        "files": (FileRecord("config.json", 1379, "ef" * 32), FileRecord("model.safetensors", 163_000_000, "01" * 32)),
    }
    about = Manifest(**(facts | (manifest or {})))
    measured: dict[str, Any] = {
        "recipe": "llama-int8",
        "target": "w8a8",
        "manifest_sha256": hashlib.sha256(about.to_bytes()).hexdigest(),
        "checks": (at_most("promises", 0, 0, "broken", "all kept"), at_most("transformers: kl_nats", 0.0358, 0.05, "nats")),
        "layers": tuple(layers),
        "source": make_run("source"),
        "runtimes": (make_run("transformers", 0.0358),),
        "validation": {"text": "Moby-Dick", "reference": "float32", "tokens": 4096, "tokens_sha256": "99" * 32},
        "prompt": "What is the capital of France?",
    }
    return Report(**(measured | report)), about


def make_health(count: int, static: bool = True) -> dict[str, Any]:
    """As :mod:`convert.health` makes it; the down projection of layer 2 is ruined where inputs are static."""

    def one(i: int, name: str) -> dict[str, Any]:
        bad = static and (i, name) == (2, "mlp.down_proj")
        inputs = {"absmax": 3000.0 if bad else 10.0 + i, "typical": 0.05, "outliers": int(bad), "channels": 64, "drift": 1.1}
        inputs |= {"limit": inputs["absmax"], "clipped": 0.0} if static else {}
        rounded = {"after": "rtn", "weight": 0.01, "output": 0.02 + i / 1000, "typical": 0.9 if bad else 0.015}
        if static:
            return {"inputs": inputs, "errors": [rounded]}
        smoothed = {key: inputs[key] for key in ("typical", "outliers", "channels")} | {"absmax": 2.0}
        return {"inputs": inputs, "smoothed": smoothed, "errors": [rounded, {**rounded, "after": "gptq", "output": 0.005}]}

    return {f"model.layers.{i}.{name}": one(i, name) for i in range(count) for name in PROJECTIONS}


class Page(HTMLParser):
    """Holds the text and the attributes of a page; a tag that is closed out of order, or never, is a failed assertion."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.pieces.append(data)


def test_says_verdict_sizes_and_distance() -> None:
    text = Page(render(*make_pair())).text
    assert "✓ passed : all 2 checks" in text
    assert "The weights take 163 MB on disk, the files of the source 300 MB. On 4,096 held-out tokens" in text
    assert "is 0.0358 nats a token; the limit is 0.05." in text
    assert "someone/model@0123abcd" in text
    assert "28 int8-dynamic, 1 kept" in text


def test_says_failed_in_words_and_names_what() -> None:
    checks = (at_most("transformers: kl_nats", 0.050004, 0.05, "nats"), at_most("promises", 0, 0, "broken"))
    text = Page(render(*make_pair(checks=checks))).text
    assert "✗ failed : 1 of 2 checks failed (transformers: kl_nats)" in text
    assert "0.050004 nats ≤ 0.05 ✗ failed" in text, "a failed value must not be rounded to its limit"


def test_shows_the_interval_beside_the_value() -> None:
    run = make_run("transformers", 0.0358)
    assert run.divergence is not None
    interval = Interval(0.0341, 0.0376)
    checks = (at_most("transformers: kl_nats", 0.0358, 0.05, "nats", "", interval),)
    runs = (replace(run, divergence=replace(run.divergence, kl_interval=interval)),)
    text = Page(render(*make_pair(checks=checks, runtimes=runs))).text
    assert "0.0358 nats [0.0341, 0.0376] at 95 % ≤ 0.05 ✓ passed" in text
    assert "is 0.0358 nats a token [0.0341, 0.0376] at 95 %; the limit is 0.05." in text


def test_where_a_text_parts_from_the_source_is_marked_at_the_word() -> None:
    source = replace(make_run("source"), continuation="The whale was white.", passages=("and the sea was calm",))
    same = replace(make_run("transformers", 0.01), continuation="The whale was white.", passages=("and the seal was calm",))
    short = replace(make_run("vllm (cpu; 2 threads)", 0.01), continuation="The whale", passages=("or not",))
    page = render(*make_pair(source=source, runtimes=(same, short), passages=("It was night",)))
    text = page[page.index("What it says") : page.index("The ledger")]
    assert '<h3>transformers <span class="note">the same</span></h3><pre>The whale was white.</pre>' in text
    assert "<h3>vllm</h3><pre>The whale<mark> (ends here)</mark></pre>" in text
    assert "<pre>and the <mark>seal was calm</mark></pre>" in text
    assert "<pre><mark>or not</mark></pre>" in text
    source, same = replace(source, passages=(" and the sea",)), replace(same, passages=(" and the seal",))
    page = render(*make_pair(source=source, runtimes=(same,), passages=(" It was night",)))
    assert "<pre>and the sea</pre>" in page, "the word goes on after the prompt's, and is shown alone"
    assert "<pre>and the <mark>seal</mark></pre>" in page
    assert '<pre class="prompt">It was night</pre>' in page
    assert "It was night" in text


def test_a_gauge_has_value_interval_and_limit_in_their_order() -> None:
    def places(check: Check) -> list[float]:
        drawn = str(draw_gauge(check))
        dot, limit = re.findall(r'cx="([\d.]+)"', drawn), re.findall(r'd="M([\d.]+) 1V19"', drawn)
        start, width = re.findall(r'<rect x="([\d.]+)" y="6" width="([\d.]+)"', drawn)[0]
        return [float(start), float(dot[0]), float(start) + float(width), float(limit[0])]

    low, value, high, limit = places(at_most("a: kl_nats", 0.03, 0.05, "nats", "", Interval(0.02, 0.04)))
    assert 4 < low < value < high < limit < 196
    low, value, high, limit = places(at_least("a: top1", 0.8, 0.9, "share", "", Interval(0.7, 0.85)))
    assert 4 < low < value < high < limit < 196
    assert draw_gauge(at_most("a: kl_nats", math.nan, 0.05, "nats")) == ""
    assert "gauge" in draw_gauge(at_most("a: kl_nats", 0.0, 0.0, "nats")), "all in one place"


def test_errors_are_mapped_after_each_algorithm() -> None:
    health = make_health(4, static=False)
    health["model.layers.3.mlp.down_proj"]["errors"].pop()  # which gptq left alone
    stages = draw_stages(health)
    assert [stage.after for stage in stages] == ["rtn", "gptq"]
    tones = [re.findall(r'width="(\d+)" height="10" class="tone(\d)"', str(stage.svg)) for stage in stages]
    assert all(sum(int(width) for width, _ in drawn) == 4 * len(PROJECTIONS) * 10 for drawn in tones)
    last_row = [tone for width, tone in tones[1] for _ in range(int(width) // 10)][-4:]
    assert last_row[3] > last_row[0], "what an algorithm left alone is as it was"
    assert draw_stages({"lm_head": health["model.layers.0.mlp.down_proj"]}) == []


def test_ranges_of_one_input_are_one_panel() -> None:
    health = make_health(4)
    for i in range(4):
        health[f"model.layers.{i}.mlp.up_proj"]["inputs"] = {**health[f"model.layers.{i}.mlp.up_proj"]["inputs"], "absmax": 77.0}
    drawn = draw_ranges(health)
    assert [panel.kinds for panel in drawn] == ["q_proj, k_proj, v_proj, o_proj, gate_proj", "up_proj", "down_proj"]
    assert (drawn[2].largest, drawn[2].layer, drawn[2].outliers) == (3000.0, 2, 1)


def test_recovery_stands_beside_both_scores() -> None:
    before = TaskScore("hellaswag", "hellaswag", "acc_norm", True, 0.43, 200, 0, Interval(0.36, 0.5))
    after = replace(before, score=0.42, recovery=0.42 / 0.43, recovery_interval=Interval(0.95, 1.01))
    runs = (replace(make_run("transformers", 0.01), tasks=(after,)),)
    text = Page(render(*make_pair(source=replace(make_run("source"), tasks=(before,)), runtimes=runs))).text
    assert (
        "hellaswag acc_norm, 200 documents, 0 shots 0.43 [0.36, 0.5] at 95 % 0.42 [0.36, 0.5] at 95 % 97.7 % [95.0, 101.0] at 95 %" in text
    )


def test_refuses_a_report_of_other_bytes() -> None:
    report, manifest = make_pair()
    with pytest.raises(FormatError, match="another manifest"):
        render(report, replace(manifest, format="onnx"))


def test_escapes_whatever_comes_from_outside() -> None:
    layers = (LayerNumbers(f"model.layers.0.{NASTY}.weight", NASTY, 30.0, 0.5, 0.0), *make_layers(1))
    run = replace(make_run(NASTY, 0.01), versions={NASTY: NASTY}, device=NASTY, continuation=NASTY)
    source = {"origin": NASTY, "commit": NASTY, "licence": NASTY, "files": [{"name": NASTY, "size_bytes": 1, "digest": NASTY}]}
    report, manifest = make_pair(
        layers,
        manifest={"source": source, "recipe": {NASTY: NASTY}, "format": NASTY},
        recipe=NASTY,
        target=NASTY,
        prompt=NASTY,
        runtimes=(run,),
        validation={NASTY: NASTY, "reference": "float32"},
        checks=(holds(NASTY, False, NASTY),),
    )
    page = Page(render(report, manifest))
    assert page.text.count(NASTY) >= 15
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1


def test_needs_nothing_but_itself() -> None:
    written = render(*make_pair())
    page = Page(written)
    assert not [tag for tag, _ in page.tags if tag in ("link", "img", "iframe", "object", "embed", "base")]
    assert not [attrs for _, attrs in page.tags if any(key in attrs for key in ("src", "srcset", "action"))]
    assert all((attrs[key] or "").startswith("#") for _, attrs in page.tags for key in ("href", "xlink:href") if key in attrs)
    assert "@import" not in written
    assert re.findall(r"url\((?!#)", written) == []
    policy = next(attrs["content"] or "" for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")


def test_same_report_same_bytes_and_matplotlib_left_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    first = render(*make_pair())
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"axes.grid": True, "font.size": 20.0, "svg.hashsalt": "other"}):
        assert render(*make_pair()) == first


def test_structure_is_one_that_assistive_tools_can_follow() -> None:
    page = Page(render(*make_pair()))
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2")] == ["h1"] + ["h2"] * 6
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)), "drawings must not share the names of their parts"
    used = {(attrs["xlink:href"] or "")[1:] for tag, attrs in page.tags if tag == "use"}
    assert used
    assert used <= set(ids)


@pytest.mark.parametrize("palette", [0, 1], ids=["light", "dark"])
def test_contrast_is_wcag_aa(palette: int) -> None:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    colours = dict(re.findall(r"--(\w+): #(\w{6});", re.findall(r":root \{(.*?)\}", render(*make_pair()), re.DOTALL)[palette]))
    for name in ("text", "muted", "accent", "pass", "fail"):
        for ground in ("page", "card"):
            dark, light = sorted([luminance(colours[name]), luminance(colours[ground])])
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, ground)


def test_health_names_what_static_scales_ruin() -> None:
    page = Page(render(*make_pair(health=make_health(4))))
    assert "Static activations ruin model.layers.2.mlp.down_proj (output off by 90%, largest input 3,000, median 0.05): keep" in page.text
    assert page.text.count("✗ ruined") == 1
    assert "90% ✗ 2" not in page.text, "the heat map's row has its own place"
    assert [attrs["class"] for tag, attrs in page.tags if tag == "td" and "shade" in (attrs.get("class") or "")].count("shade8") == 1
    assert [tag for tag, _ in page.tags if tag == "h2"] == ["h2"] * 7
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")


def test_health_shows_before_and_after_each_algorithm() -> None:
    text = Page(render(*make_pair(health=make_health(1, static=False)))).text
    assert "10 → 2" in text
    assert "2.00% → 0.50%" in text
    assert "rtn → gptq" in text
    assert "ruin" not in text


def test_everything_kept() -> None:
    page = Page(render(*make_pair(())))
    assert "No tensor is quantized" in page.text
    assert [attrs["class"] for tag, attrs in page.tags if tag == "svg"] == ["gauge"]


def test_weights_that_could_not_be_compared() -> None:
    checks = (at_most("numbers", math.inf, 1, "ratio", "killed by signal 9"),)
    text = Page(render(*make_pair(layers=make_layers(1), checks=checks))).text
    assert "infinite ratio" in text
    report, manifest = make_pair()
    assert "could not be compared" in Page(render(replace(report, layers=()), manifest)).text


def test_no_runtime_ran() -> None:
    checks = (holds("vllm: loads and runs", False, "it was killed by signal 9"),)
    text = Page(render(*make_pair(runtimes=(), checks=checks))).text
    assert "no runtime returned logits" in text
    assert "vllm: loads and runs no yes ✗ failed it was killed by signal 9" in text


def test_numbers_that_are_none() -> None:
    checks = (
        at_most("a: kl_nats", math.nan, 0.05, "nats"),
        at_most("b: perplexity_ratio", math.inf, 1.05, "ratio"),
        at_most("new", -math.inf, 0, ""),
    )
    layers = (
        *make_layers(1),
        LayerNumbers("model.layers.9.q.weight", "int8", math.nan, math.nan, math.nan),
        LayerNumbers("model.layers.8.q.weight", "int8", 999.0, 0.0, 0.0),
    )
    text = Page(render(*make_pair(layers, checks=checks, runtimes=(make_run("a", math.nan), make_run("b", 0.01))))).text
    assert "not a number nats ≤ 0.05" in text
    assert "infinite ratio ≤ 1.05" in text
    assert "new minus infinite ≤ 0" in text
    assert "in a, is not a number; the limit is 0.05." in text, "the worst runtime speaks for all"
    assert "Without any error, and not drawn: 1 tensor." in text
    assert "Without a finite measure, and not drawn: 1 tensor." in text
    assert "model.layers.9.q.weight int8 not a number not a number not a number" in text


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (["model.layers.0.mlp.up_proj.weight"], ["up_proj"]),
        (["transformer.h.3.attn.c_attn.weight", "lm_head.weight", "head"], ["c_attn", "outside the layers"]),
        (["model.layers.3.mlp.experts.0.w1.weight", "model.layers.3.mlp.experts.1.w1.weight"], ["w1"]),
        (["0.weight", "...", "", "7", "a.99999999999999999999.weight"], ["other", "outside the layers"]),
        ([f"layers.0.kind{i}.weight" for i in range(40)], [f"kind{i}" for i in range(12)] + ["all other kinds"]),
    ],
)
def test_kinds_are_read_from_any_names(names: list[str], kinds: list[str]) -> None:
    layers = [LayerNumbers(name, "int8", 30.0 + i, 0.5, 0.0) for i, name in enumerate(names)]
    page = render(*make_pair(layers))
    Page(page)
    assert re.findall(r"<figcaption><span><strong>(.*?)</strong>", page) == kinds


def test_page_of_a_huge_mixture_of_experts_stays_small() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.{k}_proj.weight" for i in range(300) for j in range(8) for k in ("up", "gate", "down")]
    report, manifest = make_pair()
    layers = tuple(LayerNumbers(name, "int8", 30.0 + i % 17, 0.5, 0.0) for i, name in enumerate(names))
    assert len(render(replace(report, layers=layers), manifest)) < 200_000
    seen = make_health(1, static=False)["model.layers.0.mlp.down_proj"]
    page = render(replace(report, health={name.removesuffix(".weight"): seen for name in names}), manifest)
    assert len(page) < 2_000_000
    assert "The 1,000 layers with the most error, of 7,200" in page


def chromium(folder: Path, *options: str) -> str:
    """Runs a headless browser that talks to nobody, and returns what it wrote."""
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("chromium is not on PATH, so no browser can lay the page out; on Debian: apt-get install chromium")
    quiet = ["no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-quic", "hide-scrollbars"]
    switches = [f"--{name}" for name in ("headless", "no-sandbox", "disable-gpu", *quiet)]
    command = [program, *switches, f"--user-data-dir={folder / 'profile'}", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_browser_lays_it_out_on_a_phone_and_a_desk(tmp_path: Path) -> None:
    long = LayerNumbers("model.layers.0." + "very_long_name" * 12 + ".weight", "int8-dynamic", 12.0, 0.5, 0.1)
    checks = (holds("vllm: loads and runs", False, "x" * 600), *make_pair()[0].checks)
    page = render(*make_pair((long, *make_layers(30)), checks=checks, prompt="y" * 900, health=make_health(30)))
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    for width, height in ((390, 844), (1280, 900)):
        picture = tmp_path / f"{width}.png"
        chromium(tmp_path, f"--window-size={width},{height}", f"--screenshot={picture}", (tmp_path / "page.html").as_uri())
        assert struct.unpack(">II", picture.read_bytes()[16:24]) == (width, height)
    # A frame is as narrow as it is told, where a window has a least width. The page's own policy holds inside it.
    frames = "".join(f'<iframe width="{width}" height="800" srcdoc="{html.escape(page)}"></iframe>' for width in (360, 1280))
    measure = """onload = () => { document.body.dataset.found = [...document.querySelectorAll("iframe")].map(frame => {
        const page = frame.contentDocument, root = page.documentElement, box = page.getElementById("filter");
        page.querySelectorAll("details").forEach(part => { part.open = true; });
        box.value = "LAYERS.7. down"; box.dispatchEvent(new Event("input"));
        const rows = [...page.querySelectorAll("#ledger tbody tr")].filter(row => !row.hidden);
        const table = page.querySelector("#health table"), [first, second] = table.querySelectorAll("button");
        const top = () => table.tBodies[0].rows[0].cells[0].textContent;
        second.click();
        const largest = top();
        second.click();
        const fits = [...rows[0].cells].every(cell => cell.getBoundingClientRect().right <= root.clientWidth);
        return [root.clientWidth, root.scrollWidth, fits, rows.length, page.getElementById("count").textContent, largest, top()].join(" ");
    }).join("; "); }"""
    (tmp_path / "frames.html").write_text(f"<!doctype html><body>{frames}<script>{measure}</script>", encoding="utf-8")
    written = chromium(tmp_path, "--dump-dom", (tmp_path / "frames.html").as_uri())
    found = re.search(r'data-found="([^"]*)"', written)
    assert found
    sides = "model.layers.2.mlp.down_proj model.layers.0.self_attn.q_proj"
    assert found[1] == f"360 360 true 1 1 of 212 tensors {sides}; 1280 1280 true 1 1 of 212 tensors {sides}"


LADDER = {
    "budget": {"kl_nats": 0.01},
    "taken": "mixed",
    "rungs": [
        {
            "name": name,
            "kl_nats": kl,
            "perplexity_ratio": 1.01,
            "weight_bytes": size,
            "kept_share": 0.1,
            "kept_groups": kept,
            "passed": passed,
        }
        | {"failed": [] if passed else ["transformers: kl_nats"], "pilot": 2048 if name == "gptq" else 0}
        for name, kl, size, kept, passed in (
            ("rtn", None, 160_000_000, 0, False),
            ("gptq", 0.015, 160_000_000, 0, False),
            ("mixed", 0.0093, 168_000_000, 7, True),
        )
    ],
    "groups": [
        {"modules": [NASTY], "scheme": "int8-dynamic", "alone_nats": 0.004, "extra_bytes": 884_736, "kept": True},
        {"modules": ["model.layers.0.mlp.down_proj"], "scheme": "int8-dynamic", "alone_nats": 0.001, "extra_bytes": 884_736, "kept": False},
    ],
    "curves": {name: [[160_000_000, 0.015], [170_000_000, 0.01], [268_000_000, 0.001]] for name in ("frontier", "random order")},
    "measured": "2,048 tokens a group",
}


def test_how_a_budget_was_met_is_told_and_drawn() -> None:
    page = render(*make_pair(ladder=LADDER))
    section = page[page.index("How the budget was met") : page.index("Size and speed")]
    assert "kl_nats at most 0.01" in section
    assert 'Taken: <strong class="name">mixed</strong>' in section
    assert "mixed, 7 groups kept" in section
    assert "not measured" in section, "the rung that did not run"
    assert section.count("pilot, calibrated on 2,048 tokens") == 1
    assert "more than the noise" not in section
    doubtful = {**LADDER, "rungs": [{**rung, "certain": False} for rung in LADDER["rungs"]]}
    assert render(*make_pair(ladder=doubtful)).count("by no more than the noise of the text") == 1, "of what passed"
    assert section.count("<svg ") == 2, "the frontier, and what each group loses"
    assert "stay in 16 bit. 2,048 tokens a group.</figcaption>" in section
    assert "var(--accent)" in section
    assert NASTY not in page
    assert render(*make_pair(ladder=LADDER)) == page
    assert "How the budget was met" not in render(*make_pair())
    assert "<svg " in render(*make_pair(ladder={**LADDER, "curves": {}, "groups": []})), "no rung was mixed"


def test_a_budget_that_no_rung_met_is_not_called_met() -> None:
    missed = {**LADDER, "taken": "gptq", "rungs": [rung for rung in LADDER["rungs"] if not rung["passed"]], "groups": [], "curves": {}}
    page = render(*make_pair(ladder=missed))
    assert "How close the budget came" in page
    assert "How the budget was met" not in page
    assert "what single groups" not in page, "there are no lines"


def test_names_of_rungs_lie_beside_their_points_and_not_over_another() -> None:
    close = [{**LADDER["rungs"][1], "name": name, "kl_nats": kl, "weight_bytes": size} for name, kl, size in (
        ("a", 0.0121, 160_000_000), ("b", 0.012, 160_000_000), ("c", 0.0119, 160_000_000), ("d", 0.0121, 260_000_000)
    )]  # fmt: skip
    drawn = str(draw_frontier({**LADDER, "rungs": close}))
    found = dict(re.findall(r'y="([\d.]+)" transform[^>]*>([abcd])</text>', drawn)[i][::-1] for i in range(4))
    heights = [float(found[name]) for name in "abc"]
    assert min(heights[1] - heights[0], heights[2] - heights[1]) > 9, "in points, downwards"
    assert "text-anchor: end" in next(text for text in drawn.split("<text") if text.endswith(">d</text>") or ">d</text>" in text)


def test_layers_stand_in_the_order_of_the_model() -> None:
    health = make_health(11, static=False)
    page = render(*make_pair(health=dict(sorted(health.items()))))
    names = re.findall(r'data-value="(model\.layers\.\d+\.mlp\.gate_proj)"', page)
    assert names == [f"model.layers.{i}.mlp.gate_proj" for i in range(11)]
