"""The page, `samples.html`: one file that loads nothing and runs nothing, whatever the samples hold.

Every text goes through `_e`, which is the only way into the page for what a run has written; numbers are formatted by
this package, and colours are classes of its own style sheet.
"""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Sequence

from .chosen import Chosen, Voice
from .groups import Group
from .measures import Row, columns_of, text_of
from .plot import COLOURS
from .samples import Sample
from .style import STYLE
from .tokens import EMPTY, END, LINE_END, crossed_behind, edges_of, shown_tokens
from .visible import visible
from .words import counted, facts_of, lead_of, measure_words, plot_words, sample_words, title_of, verdict_of

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page_of(groups: Sequence[Group], rows: Sequence[Row], chosen: Chosen, light: bytes, dark: bytes) -> str:
    """The page: what was run, the plot (PNG, for either colour scheme), the table of measures and the samples."""
    title = _e(title_of(groups))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            "</head>",
            "<body>",
            "<main>",
            f"<h1>{title}</h1>",
            f'<p class="lead">{_e(lead_of(groups))}</p>',
            "<h2>Training</h2>",
            "<figure>",
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{_image(dark)}">',
            f'<img src="{_image(light)}" alt="Reward against cumulative KL over the training"></picture>',
            f'<figcaption class="note">{_e(plot_words(groups))}</figcaption>',
            "</figure>",
            "<h2>Measures</h2>",
            _table(rows),
            f'<p class="note">{_e(measure_words(groups))}</p>',
            "<h2>Samples</h2>",
            f'<p class="note">{_e(sample_words(chosen))}</p>',
            *_samples(chosen),
            "</main>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _e(text: str) -> str:
    return html.escape(text, quote=True)


def _image(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _dot(method: int | None) -> str:
    return f'<span class="dot{"" if method is None else f" m{method % len(COLOURS)}"}"></span>'


def _table(rows: Sequence[Row]) -> str:
    columns = columns_of(rows)
    heads = "".join(f'<th scope="col">{_e(head)}</th>' for head in ("", "seeds", *(column.title for column in columns)))
    lines = []
    for row in rows:
        figures = [text_of(row.figures[c.name], c) if c.name in row.figures else "–" for c in columns]
        name = f'<th scope="row">{_dot(row.method)}<bdi>{_e(row.label)}</bdi></th>'
        lines.append(f"<tr>{name}{''.join(f'<td>{_e(text)}</td>' for text in (row.seeds, *figures))}</tr>")
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _samples(chosen: Chosen) -> list[str]:
    if not chosen.rows:
        return []
    edges = edges_of([voice.run for voice in chosen.voices])
    told = any(sample.tokens is not None for row in chosen.rows for sample in row)
    return [
        *([_legend(edges)] if told else []),
        *(_prompt(number, row, chosen.voices, edges) for number, row in enumerate(chosen.rows, 1)),
    ]


def _legend(edges: Sequence[float]) -> str:
    """The scale of the shading, and what the signs say."""
    ends = [f"{edge:g}" for edge in edges]
    levels = [f"below {ends[0]}", *(f"{low} to {high}" for low, high in itertools.pairwise(ends))]
    levels += [f"from {ends[-1]} nats"]
    items = [f'<span class="swatch k{level}"></span>{_e(text)}' for level, text in enumerate(levels)]
    items += [
        '<span class="key"></span> the token that exceeds the budget, those behind it underlined',
        f"{LINE_END} line end",
        f"{END} end of sequence",
        f"{EMPTY} a token without text",
    ]
    return (
        '<p class="note">A token is shaded by what it costs; its tooltip has the nats, and those spent so far.</p>'
        f'<ul class="legend">{"".join(f"<li>{item}</li>" for item in items)}</ul>'
    )


def _prompt(number: int, row: Sequence[Sample], voices: Sequence[Voice], edges: Sequence[float]) -> str:
    messages = []
    for role, (text, left_out) in row[0].prompt:
        name = f'<span class="role"><bdi>{_e(visible(role))}</bdi></span>\n' if role else ""
        messages.append(f"{name}<bdi>{_e(visible(text))}</bdi>{_more(left_out, 'character')}")
    if row[0].more_messages:
        messages.append(_more(row[0].more_messages, "message"))
    cells = "\n".join(_cell(sample, voice, edges) for sample, voice in zip(row, voices, strict=True))
    return (
        f'<section class="prompt"><h3>Prompt {number}</h3><div class="ask">{chr(10).join(messages)}</div>\n'
        f'<div class="grid">\n{cells}\n</div></section>'
    )


def _cell(sample: Sample, voice: Voice, edges: Sequence[float]) -> str:
    return (
        f'<article class="cell"><h3>{_dot(voice.method)}<bdi>{_e(voice.name)}</bdi></h3>'
        f'<div class="text"><bdi>{_completion(sample, edges)}</div>'
        f'<p class="facts">{_facts(sample, voice)}</p></article>'
    )


def _completion(sample: Sample, edges: Sequence[float]) -> str:
    """The completion from within its `bdi`, which it ends."""
    if sample.tokens is None:
        text, left_out = sample.completion
        note = (
            '<span class="more"> (its tokens do not spell it, so no costs are shown)</span>' if sample.misspelt else ""
        )
        return f"{_e(visible(text))}</bdi>{_more(left_out, 'character')}{note}"
    tokens = shown_tokens(sample, edges)
    spans = []
    for token in tokens:
        tag = "mark" if token.crossing else "span"
        kinds = [*([] if token.level is None else [f"k{token.level}"]), *(["end"] if token.end else [])]
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        spans.append(f'<{tag}{kind} title="{_e(token.title)}">{_e(token.text)}</{tag}>')
    return f"{''.join(spans)}</bdi>{_more(sample.more_tokens, 'token', crossed_behind(sample, len(tokens)))}"


def _more(left_out: int, what: str, note: str = "") -> str:
    if not left_out:
        return ""
    return f'<span class="more"> … {counted(left_out, f"more {what}")}{_e(note)}</span>'


def _facts(sample: Sample, voice: Voice) -> str:
    facts = facts_of(sample, voice.run)
    verdicts = []
    if facts.within is not None:
        kind, sign = ("within", "✓") if facts.within else ("over", "✕")
        verdicts.append(f'<span class="{kind}">{sign} {_e(verdict_of(facts))}</span>')
    elif facts.open:
        verdicts.append(f'<span class="open">? {_e(facts.open)}</span>')
    if facts.cut_off:
        verdicts.append('<span class="cut">✂ cut off</span>')
    measured = " · ".join(_e(text) for text in (facts.reward, facts.spent, facts.length) if text)
    return f"{measured}<br>{' · '.join(verdicts)}" if verdicts else measured
