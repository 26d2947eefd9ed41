"""What `--help` shows: the options that a beginner needs and the names of the sections, a section, or everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from cmdp_fast.errors import InputError
from cmdp_fast.nearest import did_you_mean
from cmdp_fast.terminal import beside, wrapped

from ..settings.config import TrainConfig
from .options import Option, Section, Settings, first_sentence, meaning, read_sections, sections_of

ALL = "all"
COLUMN = 26  # where the texts begin


class Screen(NamedTuple):
    """A command with its settings, as help shows them."""

    prog: str
    description: str
    kind: type[Settings]
    default: Any
    width: int

    def lines(self, topic: str = "") -> list[str]:
        """The lines of `--help`, of `--help-all` (the topic "all") or of a section or an option. Raises InputError for
        a topic that is neither."""
        sections = read_sections(self.kind, self.default, self.prog.split()[-1])
        if not topic:
            return list(self._short(sections))
        if topic == ALL:
            every = (line for section in sections for line in self._section(section))
            return [*self._head(), *every, *self._left_out()]
        name = topic.lstrip("-").lower().replace("_", "-")
        by_section = {section.name: section for section in sections}
        if name in by_section and not topic.startswith("-"):
            return list(self._section(by_section[name]))[1:]
        options = {o.name.replace("_", "-"): o for section in sections for o in section.options}
        if option := options.get(name) or options.get(name.removeprefix("no-")):
            return self._option(option, f"{option.says} (section {option.section})")
        trainings = sections_of(TrainConfig, None, "train")
        if name in {topic for section in trainings for topic in (section.name, *(o.flag[2:] for o in section.options))}:
            where = f"cmdp-fast train --help {name}"
            raise InputError(f"--help {topic}: a setting of trainings, which `{where}` tells of, and none here")
        raise InputError(
            f"--help {topic}: neither a section ({', '.join(by_section)}) nor an option"
            f"{did_you_mean(name, [*by_section, *options])}"
        )

    def _head(self) -> Iterator[str]:
        positional = [o.given for o in _options(sections_of(self.kind, self.default, "")) if o.positional]
        yield from wrapped(" ".join([f"usage: {self.prog}", *positional, "[options]"]), self.width, rest=" " * 7)
        yield ""
        yield from wrapped(self.description, self.width)

    def _short(self, sections: list[Section]) -> Iterator[str]:
        options = _options(sections)
        chosen = getattr(self.kind, "ESSENTIAL", ()) or tuple(o.name for o in options)
        yield from self._head()
        yield ""
        by_name = {option.name: option for option in options}
        for name in chosen:
            yield from self._option(by_name[name], first_sentence(by_name[name].says), short=True)
        yield ""
        if len(chosen) == len(options):
            if any(first_sentence(o.says) != o.says.removesuffix(".") for o in options):
                yield from wrapped(f"{self.prog} --help-all says more of each.", self.width)
            return
        yield from wrapped(f"All {len(options)} options: {self.prog} --help-all, or --help SECTION:", self.width)
        for section in sections:
            yield from beside(section.name, first_sentence(section.says), self.width, len("  cache-teacher  "))
        yield from self._left_out()

    def _left_out(self) -> Iterator[str]:
        sections, refused = getattr(self.kind, "UNREAD", ()), getattr(self.kind, "REFUSED", ())
        if not sections:
            return
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in refused)
        text = f"Options of a training alone, which are refused here: sections {', '.join(sections)}; {flags}."
        yield from ["", *wrapped(text, self.width)]

    def _section(self, section: Section) -> Iterator[str]:
        yield ""
        yield from wrapped(f"{section.name}: {section.says}", self.width)
        for option in section.options:
            yield from self._option(option, option.says)

    def _option(self, option: Option, says: str, short: bool = False) -> list[str]:
        switch = option.flag if short else f"{option.flag}, --no-{option.flag.removeprefix('--')}"
        flag = f"{option.flag} {option.given}".strip() if option.given else switch
        means = short and meaning(option)
        default = f"{option.default} = {means}" if means else option.default
        default = "" if option.positional else f" (default: {default})"
        return beside(flag, f"{says}{default}", self.width, COLUMN)


def _options(sections: Sequence[Section]) -> list[Option]:
    return [option for section in sections for option in section.options]
