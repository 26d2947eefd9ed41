"""The same measures and samples as Markdown for pages on GitHub, `samples.md`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .chosen import Chosen, Voice
from .groups import Group
from .measures import Row, columns_of, text_of
from .samples import Part, Sample
from .visible import visible
from .words import counted, facts_of, lead_of, measure_words, plot_words, sample_words, title_of, verdict_of

# What Markdown or HTML read as markup inside a line, where all that is escaped stands: in a file a character reference
# is none of it. (GitHub's comments look for mentions once references are read.) A colon makes a link of `http://`, a
# point one of `www.`.
_MARKUP = re.compile(r"[&<>|`*_~\[\]\\$#:@]|(?<=[Ww])\.")


def markdown_of(groups: Sequence[Group], rows: Sequence[Row], chosen: Chosen, plot: str) -> str:
    """The Markdown, with the plot under its name."""
    columns = columns_of(rows)
    table = [
        _line(["", "seeds", *(column.title for column in columns)]),
        "| --- |" + " ---: |" * (len(columns) + 1),
        *(
            _line(
                [
                    row.label,
                    row.seeds,
                    *(text_of(row.figures[c.name], c) if c.name in row.figures else "–" for c in columns),
                ]
            )
            for row in rows
        ),
    ]
    parts = [
        f"# {escaped(title_of(groups))}",
        escaped(lead_of(groups)),
        f"![Reward against cumulative KL over the training]({plot})",
        plot_words(groups),
        "## Measures",
        "\n".join(table),
        measure_words(groups),
        "## Samples",
        sample_words(chosen),
        *(_prompt(number, row, chosen.voices) for number, row in enumerate(chosen.rows, 1)),
    ]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """A visible text as Markdown that shows it, on one line; in a table too."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text).replace("\n", "<br>").replace("\t", "&emsp;")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def _prompt(number: int, row: Sequence[Sample], voices: Sequence[Voice]) -> str:
    messages = [f"{visible(role)}: {_shown(text)}" if role else _shown(text) for role, text in row[0].prompt]
    if row[0].more_messages:
        messages.append(f"… {counted(row[0].more_messages, 'more message')}")
    table = [
        "| | completion | reward | nats | tokens | |",
        "| --- | --- | ---: | ---: | ---: | --- |",
        *(_line(_cells(sample, voice)) for sample, voice in zip(row, voices, strict=True)),
    ]
    return f"**Prompt {number}** {escaped(chr(10).join(messages))}\n\n" + "\n".join(table)


def _cells(sample: Sample, voice: Voice) -> list[str]:
    facts = facts_of(sample, voice.run)
    verdict = ", ".join(filter(None, [verdict_of(facts), "cut off" if facts.cut_off else ""]))
    reward, spent, length = (
        facts.reward.removeprefix("reward "),
        facts.spent.removesuffix(" nats"),
        str(sample.length),
    )
    return [voice.name, _shown(sample.completion), reward, spent, length, verdict]


def _shown(part: Part) -> str:
    more = f" … {counted(part.left_out, 'more character')}" if part.left_out else ""
    return visible(part.text) + more
