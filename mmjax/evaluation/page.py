"""`report.html`: a report as one self-contained page, to look at, send and print.

Pictures and curves are inside the file; it asks the network for nothing and reads well without
its few lines of script, which only let an attention map be seen large.
"""

import base64
import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from mmjax.errors import InputError
from mmjax.evaluation.curves import draw_curves, read_curves
from mmjax.evaluation.report import (
    Report,
    format_value,
    picture_path,
    sources,
    write_atomically,
)

PICTURE_SIZE = 224  # pixels of the longer side inside the page; more only makes the file heavy
FUNCTION_WORDS = frozenset(
    ("a", "an", "the", "is", "are", "was", "there", "of", "in", "on", "at", "and", "to", "with")
)


def write_page(
    report: Report, report_folder: Path, logs: Mapping[str, Path], output_file: Path
) -> Path:
    """Draws the page and returns its path. Sections without examples or logs do not appear.

    Args:
      report: what `read_report` gives.
      report_folder: the folder that the examples' pictures are relative to.
      logs: name on the page -> a `metrics.jsonl` of train.py.
      output_file: the page to write.

    Raises:
      InputError: a picture or a log is absent, or a log has a line that is no JSON object.
    """
    folder, examples = Path(report_folder), report["examples"]
    contents = {
        "retrieval": ("Finding pictures", _retrieval(examples.get("retrieval", []), folder)),
        "answers": ("Answering questions", _answers(examples.get("vqa", []), folder)),
        "matching": ("Telling true from false", _matching(examples.get("matching", []), folder)),
        "attention": ("Where words look", _attention(examples.get("attention", []), folder)),
        "curves": ("Learning", "".join(_curves(name, path) for name, path in logs.items())),
        "metrics": ("All metrics", _table(report["metrics"], report["units"])),
    }
    shown = {anchor: content for anchor, content in contents.items() if content[1]}
    page = _PAGE.substitute(
        title=html.escape(folder.resolve().name),
        style=_STYLE,
        script=_SCRIPT,
        sources=_sources(sources(report)),
        cards=_cards(report["metrics"]),
        links="".join(f'<a href="#{anchor}">{title}</a>' for anchor, (title, _) in shown.items()),
        sections="".join(
            f'<section id="{anchor}"><h2>{title}</h2>{body}</section>'
            for anchor, (title, body) in shown.items()
        ),
    )
    return write_atomically(Path(output_file), page)


# What was scored, and how well.


def _sources(scored: Sequence[dict[str, Any]]) -> str:
    items = (
        f"<li><code>{html.escape(source['checkpoint'])}</code> at step {source['step']:,}"
        "<details><summary>configuration</summary>"
        f"<pre>{html.escape(json.dumps(source['config'], indent=2))}</pre></details></li>"
        for source in scored
    )
    return f'<ul class="sources">{"".join(items)}</ul>'


def _cards(metrics: Mapping[str, float]) -> str:
    """The headline numbers, each beside what one gets without looking at the picture."""
    cards = []
    gallery = metrics.get("retrieval/gallery_size")
    # Every picture has as many captions as any other, so chance is one in the pictures both ways.
    chance = 100 / gallery if gallery else None
    for direction, label in (
        ("text_to_image", "A caption finds its picture"),
        ("image_to_text", "A picture finds its caption"),
    ):
        value = metrics.get(f"retrieval/{direction}/R@1")
        reranked = metrics.get(f"retrieval/reranked/{direction}/R@1")
        if value is None:
            continue
        notes = [f"first of {gallery:,.0f} (R@1)" if gallery else "R@1"]
        if chance:
            notes.append(f"chance {chance:.2g} %, so {value / chance:,.0f} × chance")
        if reranked is not None:
            notes.append(f"re-ranked by the matching head {format_value(reranked, 'percent')}")
        cards.append(_card(label, format_value(value, "percent"), value, chance, notes))
    auc = metrics.get("itm/roc_auc")
    if auc is not None:
        notes = ["area under the ROC curve", "chance 0.500"]
        label = "True captions told from false"
        cards.append(_card(label, format_value(auc, "fraction"), 100 * auc, 50, notes))
    accuracy = metrics.get("vqa/accuracy")
    if accuracy is not None:
        blind = metrics.get("vqa/question_only_accuracy")
        notes = ["VQA accuracy"]
        if blind is not None:
            notes.append(f"from the question alone {format_value(blind, 'percent')}")
            notes.append(f"{accuracy - blind:+.1f} points by looking")
        label = "Questions answered"
        cards.append(_card(label, format_value(accuracy, "percent"), accuracy, blind, notes))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(
    label: str, value: str, percent: float, baseline: float | None, notes: Sequence[str]
) -> str:
    number, _, unit = value.partition(" ")
    tick = "" if baseline is None else f'<i style="left:{baseline:.2f}%"></i>'
    lines = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f'<div class="card"><h3>{label}</h3><p class="number">{number}<small>{unit}</small></p>'
        f'<div class="gauge" aria-hidden="true"><b style="width:{percent:.2f}%"></b>{tick}</div>'
        f"<ul>{lines}</ul></div>"
    )


def _table(metrics: Mapping[str, float], units: Mapping[str, str]) -> str:
    groups: dict[str, list[str]] = {}
    for name in metrics:
        groups.setdefault(name.partition("/")[0], []).append(name)
    bodies = []
    for group, names in groups.items():
        rows = []
        for name in names:
            number = format_value(metrics[name], units[name]).removesuffix(" %")
            unit = html.escape(units[name])
            rows.append(
                f'<tr><th scope="row"><code>{html.escape(name)}</code></th>'
                f'<td class="value">{number}</td><td>{unit}</td></tr>'
            )
        title = f'<tr><th colspan="3" scope="rowgroup">{html.escape(group)}</th></tr>'
        bodies.append(f"<tbody>{title}{''.join(rows)}</tbody>")
    if not bodies:
        return ""
    head = '<th scope="col">name</th><th scope="col" class="value">value</th><th>unit</th>'
    return f"<table><thead><tr>{head}</tr></thead>{''.join(bodies)}</table>"


# Examples.


def _retrieval(examples: Sequence[dict[str, Any]], folder: Path) -> str:
    if not examples:
        return ""
    articles = []
    for example in examples:
        figures = []
        for place, found in enumerate(example["retrieved"], start=1):
            score = f"{found['score']:.3f}"
            if found["is_match"]:
                alt, text = f"place {place}, the caption's own picture", f"<b>✓ own</b> {score}"
            else:
                alt, text = f"place {place}, another picture", score
            kind = "match" if found["is_match"] else "other"
            figures.append(_figure(kind, _image(folder, found["picture"], alt), text))
        if not any(found["is_match"] for found in example["retrieved"]):
            own = _image(folder, example["picture"], "the caption's own picture")
            figures.append(_figure("match apart", own, f"<b>own</b>, rank {example['rank']:,}"))
        badge = _badge(example["rank"] <= len(example["retrieved"]), f"rank {example['rank']:,}")
        articles.append(
            f'<article class="search"><div><p class="quote">{html.escape(example["caption"])}</p>'
            f'{badge}</div><div class="row">{"".join(figures)}</div></article>'
        )
    return (
        "<p>The pictures that each caption scores highest, best first. The caption's own picture "
        "has a frame and a tick; where it is not among them, it stands apart.</p>"
        + "".join(articles)
    )


def _answers(examples: Sequence[dict[str, Any]], folder: Path) -> str:
    if not examples:
        return ""
    articles = []
    for example in examples:
        picture = _image(folder, example["picture"], "the picture asked about")
        accepted = {a: s for a, s in example["answers"].items() if s > 0}
        rows = "".join(_bar(p["answer"], p["confidence"], accepted) for p in example["predicted"])
        lines = [f"accepted: {', '.join(accepted) or 'none'}"]
        for blind in example.get("question_only", []):
            confidence = f"{100 * blind['confidence']:.0f} %"
            lines.append(f"from the question alone: {blind['answer']} ({confidence})")
        notes = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        kind = html.escape(example["question_type"])
        badge = _badge(example["correct"], "right" if example["correct"] else "wrong")
        articles.append(
            f'<article class="beside">{picture}<div><header>'
            f'<p class="quote">{html.escape(example["question"])}</p>'
            f"{badge}</header>"
            f'<table class="bars"><caption>{kind} question; answers with confidence</caption>'
            f"{rows}</table><ul>{notes}</ul></div></article>"
        )
    has_baseline = any(example.get("question_only") for example in examples)
    baseline = " and what a model that never sees the picture says" if has_baseline else ""
    return (
        f"<p>The likeliest answers with the model's confidence{baseline}. "
        "A tick stands beside accepted answers.</p>"
        f'<div class="grid">{"".join(articles)}</div>'
    )


def _bar(answer: str, confidence: float, accepted: Mapping[str, float]) -> str:
    right = answer in accepted
    name = f"<b>{html.escape(answer)} ✓</b>" if right else html.escape(answer)
    return (
        f'<tr><th scope="row">{name}</th><td class="gauge"><b class="{"good" if right else "dim"}" '
        f'style="width:{100 * confidence:.1f}%"></b></td>'
        f'<td class="value">{100 * confidence:.0f} %</td></tr>'
    )


def _matching(examples: Sequence[dict[str, Any]], folder: Path) -> str:
    if not examples:
        return ""
    articles = []
    for example in examples:
        picture = _image(folder, example["picture"], "the picture beside the caption")
        percent = 100 * example["probability"]
        right = (percent >= 50) == example["is_match"]
        badge = _badge(right, "right" if right else "wrong")
        truth = "it is" if example["is_match"] else "it is not"
        articles.append(
            f'<article class="beside small">{picture}<div><header>'
            f'<p class="quote">{html.escape(example["caption"])}</p>{badge}</header>'
            f'<div class="gauge" aria-hidden="true"><b class="{"good" if right else "bad"}" '
            f'style="width:{percent:.1f}%"></b><i style="left:50%"></i></div>'
            f"<ul><li>true with probability {percent:.0f} %; in fact {truth}</li></ul>"
            "</div></article>"
        )
    return (
        "<p>The probability that the caption is true of the picture, by the matching head.</p>"
        f'<div class="grid">{"".join(articles)}</div>'
    )


def _attention(examples: Sequence[dict[str, Any]], folder: Path) -> str:
    articles = []
    for example in examples:
        picture = _open(folder, example["picture"])
        shown = [
            (token, np.asarray(weights, np.float32))
            for token, weights in zip(example["tokens"], example["maps"], strict=True)
            if re.search(r"^[^\W_]", token.removeprefix("##"))
            and token.lower() not in FUNCTION_WORDS
        ]
        strip = "".join(
            f'<figure tabindex="0"><img src="{_embed(_overlay(picture, weights))}" '
            f'alt="attention of “{html.escape(token)}”">'
            f"<figcaption>{html.escape(token)}</figcaption></figure>"
            for token, weights in shown
        )
        articles.append(
            f'<article class="attention">'
            f'<figure class="large"><img src="{_embed(picture)}" alt="the picture">'
            f"<figcaption>the picture</figcaption></figure>"
            f'<div><p class="quote">{html.escape(example["caption"])}</p>'
            f'<div class="strip">{strip}</div></div></article>'
        )
    if not articles:
        return ""
    return (
        "<p>How each word's attention is spread over the picture: warm where it is strong, dark "
        "where it is weak, each word on its own scale. "
        '<span class="script">Point at a word, or tab to it, to see it large.</span></p>'
        + "".join(articles)
    )


# Pictures.


def _figure(kind: str, image: str, text: str) -> str:
    return f'<figure class="{kind}">{image}<figcaption>{text}</figcaption></figure>'


def _badge(good: bool, text: str) -> str:
    kind, mark = ("good", "✓") if good else ("bad", "✗")
    return f'<span class="badge {kind}">{mark} {text}</span>'


def _image(folder: Path, picture: str, alt: str) -> str:
    return f'<img src="{_embed(_open(folder, picture))}" alt="{html.escape(alt)}">'


def _open(folder: Path, picture: str) -> Image.Image:
    path = picture_path(folder, picture)
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except OSError as error:
        raise InputError(f"{path}: this picture cannot be decoded ({error})") from error
    scale = PICTURE_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BILINEAR)


def _embed(image: Image.Image) -> str:
    """The picture as a data URI, as JPEG, which is a tenth of PNG for photographs."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _overlay(picture: Image.Image, weights: Float[np.ndarray, "rows columns"]) -> Image.Image:
    """The picture darkened where `weights` are small and warmed where they are large."""
    heat = Image.fromarray(weights / max(float(weights.max()), 1e-12))
    smooth = np.asarray(heat.resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)[..., None]
    levels = np.array([0.0, 0.35, 0.7, 1.0])
    colours = np.array([[12, 10, 40], [88, 24, 110], [225, 90, 50], [255, 225, 110]])
    colour = np.stack([np.interp(smooth[..., 0], levels, c) for c in colours.T], axis=-1)
    opacity = 0.75 - 0.5 * smooth  # what is attended to keeps its own colours
    mixed = (1 - opacity) * np.asarray(picture) + opacity * colour
    return Image.fromarray(mixed.round().astype(np.uint8))


# Curves.


def _title(measure: str) -> str:
    """`a_b/loss` as `a b loss`, `retrieval/a_b/R@1` as `retrieval · a b · R@1`."""
    objective = measure.removesuffix("/loss")
    return objective.replace("_", " ").replace("/", " · ") + " loss" * (objective != measure)


def _curves(name: str, path: Path) -> str:
    panels = []
    for measure, splits in read_curves(path).items():
        title = "total loss" if measure == "loss" else _title(measure)
        told = []
        for split, points in splits.items():
            last = max(points)
            told.append(f"{split} {points[last]:.4g} at step {last:,}")
        label = html.escape(f"{name}, {title}: {'; '.join(told)}")
        svg = draw_curves(splits, label=label, salt=f"{name}/{measure}")
        panels.append(
            f"<figure>{svg}<figcaption><b>{html.escape(title)}</b> "
            f"{html.escape('; '.join(told))}</figcaption></figure>"
        )
    return f'<h3>{html.escape(name)}</h3><div class="panels">{"".join(panels)}</div>'


_STYLE = """
:root { color-scheme: light dark;
  --page: #faf9f6; --paper: #ffffff; --ink: #1c1e21; --muted: #5b616b; --line: #e0ddd6;
  --accent: #2b5c8a; --second: #b35c1e; --good: #1b7046; --bad: #a93526; --dim: #a3a8b0; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131518; --paper: #1b1e22; --ink: #e9e7e2; --muted: #a1a7b1; --line: #31353c;
  --accent: #7db0e2; --second: #e39a5c; --good: #67c493; --bad: #f08b7b; --dim: #6a707a; } }
@media print { :root { color-scheme: light;
  --page: #fff; --paper: #fff; --ink: #000; --muted: #444; --line: #ccc;
  --accent: #2b5c8a; --second: #b35c1e; --good: #1b7046; --bad: #a93526; --dim: #999; }
  nav, .script { display: none !important; } * { print-color-adjust: exact; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 72rem; padding: 2.5rem 1.5rem 5rem; background: var(--page);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
h1, h2, .quote { font-family: Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif; }
h1 { font-size: 2.4rem; line-height: 1.1; margin: 0 0 .75rem; }
h2 { font-size: 1.6rem; margin: 3.5rem 0 .25rem; }
h3 { font-size: .95rem; margin: 1.5rem 0 .5rem; }
p, ul { margin: 0 0 1rem; } section > p { color: var(--muted); max-width: 44rem; }
h2, h3, section > p { break-after: avoid; }
ul { list-style: none; padding: 0; }
code, pre { font: .85em/1.5 ui-monospace, Menlo, Consolas, monospace; }
code { overflow-wrap: anywhere; } pre { overflow-x: auto; margin: .5rem 0; }
figure, article { margin: 0; break-inside: avoid; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 3px; border-radius: 4px; }
.above { color: var(--muted); letter-spacing: .08em; text-transform: uppercase; font-size: .75rem;
  margin: 0 0 .25rem; }
.sources { color: var(--muted); } .sources details { display: inline-block; margin-left: 1rem;
  vertical-align: top; } .sources details[open] { display: block; margin: 0; }
summary { cursor: pointer; font-size: .85rem; }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; border-block: 1px solid var(--line);
  padding: .6rem 0; font-size: .9rem; } nav a { color: var(--accent); text-decoration: none; }
nav a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: 1rem;
  margin: 1.5rem 0; }
.card, article { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  padding: 1rem 1.15rem; }
.card h3 { margin: 0; font-weight: 500; color: var(--muted); }
.number { font-size: 2.5rem; line-height: 1.2; margin: .1rem 0 .5rem; font-weight: 600; }
.number small { font-size: .5em; font-weight: 400; margin-left: .2em; color: var(--muted); }
.card ul, article ul { margin: .6rem 0 0; font-size: .82rem; color: var(--muted); }
.gauge { position: relative; height: .5rem; border-radius: 4px; background: var(--line); }
.gauge b { display: block; height: 100%; border-radius: 4px; background: var(--accent); }
.gauge i { position: absolute; top: -.2rem; bottom: -.2rem; width: 2px; background: var(--ink); }
.gauge .good { background: var(--good); } .gauge .bad { background: var(--bad); }
.gauge .dim { background: var(--dim); }
article { margin-top: 1rem; }
article header { display: flex; gap: 1rem; justify-content: space-between;
  align-items: baseline; margin-bottom: .6rem; }
.quote { margin: 0; font-size: 1.1rem; line-height: 1.35; overflow-wrap: anywhere; }
.badge { flex: none; font-size: .8rem; font-weight: 600; padding: .1rem .55rem; border-radius: 1rem;
  border: 1.5px solid; } .badge.good { color: var(--good); }
.badge.bad { color: var(--bad); border-style: dashed; }
figcaption { font-size: .8rem; color: var(--muted); margin-top: .35rem; overflow-wrap: anywhere; }
.search { display: grid; grid-template-columns: 12rem 1fr; gap: 1.5rem; }
.search .badge { display: inline-block; margin-top: .6rem; }
.row { display: grid; grid-template-columns: repeat(6, 1fr); gap: .9rem; }
.match img { outline: 3px solid var(--good); outline-offset: 2px; }
.match b { color: var(--good); }
.apart { border-left: 1px dashed var(--dim); padding-left: .9rem; }
.apart img { outline-style: dashed; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr));
  gap: 1rem; } .grid article { margin: 0; }
.beside { display: grid; grid-template-columns: 8rem 1fr; gap: 1.15rem; align-items: start; }
.beside.small { grid-template-columns: 6rem 1fr; }
.bars { font-size: .85rem; } .bars caption { text-align: left; color: var(--muted);
  font-size: .8rem; padding-bottom: .2rem; }
.bars { table-layout: fixed; } .bars th { width: 36%; overflow-wrap: anywhere; }
.bars td.gauge { display: table-cell; background: none; height: auto; }
.bars td.gauge b { height: .6rem; min-width: 1px; }
.bars td.value { width: 3.6rem; } .bars th, .bars td { border: 0; padding: .12rem .6rem .12rem 0; }
.attention { display: grid; grid-template-columns: 13rem 1fr; gap: 1.5rem; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(7rem, 1fr)); gap: .75rem;
  margin-top: .9rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
  gap: 1.5rem; } svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; }
table { border-collapse: collapse; width: 100%; } #metrics table { max-width: 44rem; }
th, td { text-align: left; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line);
  font-weight: 400; } thead th, th[scope=rowgroup] { font-weight: 600; font-size: .85rem; }
th[scope=rowgroup] { padding-top: 1.25rem; } td { color: var(--muted); font-size: .85rem; }
td.value, th.value { text-align: right; white-space: nowrap; } td.value { color: var(--ink); }
@media (max-width: 52rem) { .search { grid-template-columns: 1fr; gap: .9rem; } }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.9rem; }
  .cards { grid-template-columns: 1fr 1fr; gap: .6rem; } .card { padding: .8rem; }
  .number { font-size: 1.9rem; } .row { grid-template-columns: repeat(3, 1fr); }
  .beside { grid-template-columns: 5.5rem 1fr; } .attention { grid-template-columns: 1fr; }
  .large { max-width: 14rem; }
  .strip { grid-template-columns: repeat(auto-fill, minmax(5rem, 1fr)); } }
"""

_SCRIPT = """
for (const article of document.querySelectorAll(".attention")) {
  const [image, words] = article.querySelectorAll(".large img, .large figcaption");
  const picture = image.src;
  const show = (source, text) => { image.src = source; words.textContent = text; };
  for (const figure of article.querySelectorAll(".strip figure")) {
    const one = () => show(figure.querySelector("img").src, figure.textContent);
    const none = () => show(picture, "the picture");
    for (const event of ["pointerenter", "focus"]) figure.addEventListener(event, one);
    for (const event of ["pointerleave", "blur"]) figure.addEventListener(event, none);
  }
}
"""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title · mmjax report</title>
<style>$style</style>
<noscript><style>.script { display: none; }</style></noscript>
</head>
<body>
<p class="above">mmjax report</p>
<h1>$title</h1>
$sources
$cards
<nav aria-label="Sections">$links</nav>
<main>$sections</main>
<script>$script</script>
</body>
</html>
""")
