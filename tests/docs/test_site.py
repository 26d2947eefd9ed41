"""The site: it builds without a warning, its links lead somewhere, it needs no network, and it has every page."""

from __future__ import annotations

import ast
import html as html_module
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

for needed in ("sphinx", "myst_parser", "furo", "latex2mathml"):
    pytest.importorskip(needed)

from filelock import FileLock  # noqa: E402  (torch requires it)

import cmdp_fast as cf  # noqa: E402
from cmdp_fast.guide import __main__ as command  # noqa: E402
from cmdp_fast.guide import api, docstrings, markdown, mathml, pages, site, sources  # noqa: E402
from cmdp_fast.trainer.settings.budget import BudgetSettings  # noqa: E402

ROOT = Path(__file__).parents[2]
LOADED = {"script": "src", "img": "src", "source": "srcset", "iframe": "src", "link": "href", "object": "data"}
CODE = {"code", "pre", "script", "style", "math"}


class Html(HTMLParser):
    """What of a page the tests look at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.prose: list[str] = []
        self.inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if "id" in given:
            self.ids.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADED and given.get(LOADED[tag]) and given.get("rel") not in ("index", "search", "next", "prev"):
            self.loaded.append(given[LOADED[tag]])
        if tag in CODE:
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.prose.append(data)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The site, built once for all processes of a test run, where a warning is an error."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if base.name.startswith("popen-") else base) / "site"
    with FileLock(f"{shared}.lock"):
        if not (shared / "left_out").exists():
            left_out = site.build(shared)
            (shared / "left_out").write_text("\n".join(left_out), encoding="utf-8")
    return shared


@pytest.fixture(scope="module")
def html(folder):
    return {path: Html(path) for path in folder.rglob("*.html")}


def broken(html: dict[Path, Html], folder: Path) -> Iterator[str]:
    """Links inside the site that lead to no page, no file or no place of a page."""
    for path, page in html.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not file.is_file() or (anchor and file.suffix == ".html" and anchor not in html[file].ids):
                yield f"{path.relative_to(folder)}: {link}"


def test_no_link_is_broken(html, folder):
    assert not list(broken(html, folder))


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">x</a><a href="b.html#there">x</a><a href="c.html">x</a>')
    (tmp_path / "b.html").write_text('<p id="here">')
    html = {path: Html(path) for path in tmp_path.glob("*.html")}
    assert list(broken(html, tmp_path)) == ["a.html: b.html#there", "a.html: c.html"]


def test_nothing_is_loaded_from_the_network(html, folder):
    for path, page in html.items():
        for address in page.loaded:
            parts = urlsplit(address)
            assert not parts.netloc and parts.scheme in ("", "data"), f"{path.name}: {address}"
            if not parts.scheme:
                assert (path.parent / unquote(parts.path)).is_file(), f"{path.name}: {address}"
    for path in [*folder.rglob("*.css"), *folder.rglob("*.js")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import\s*|import\(|src\s*=\s*)['\"]?https?:", text), path.name


def test_no_formula_is_left(html):
    for path, page in html.items():
        prose = "\n".join(page.prose)
        assert not (left := re.search(r".{0,30}(\$|\\[a-zA-Z]+|\\\().{0,30}", prose)), f"{path.name}: {left[0]}"
    (method,) = [path for path in html if path.name == "method.html"]
    assert method.read_text(encoding="utf-8").count("<math") > 10


def test_every_page_is_there_and_can_be_found(html, folder):
    expected = [page.name for group in pages.pages_of(ROOT).values() for page in group]
    expected += [page.name for page in pages.results_of(ROOT)] + ["index", "search", "api/index"]
    assert {folder / f"{name}.html" for name in expected} <= html.keys()
    index = (folder / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(") and "linear_token_stats" in index
    start = html[folder / "index.html"]
    assert {f"{name}.html" for name in ("tutorial", "budget", "troubleshooting", "from_trl")} <= set(start.links)


def test_every_public_name_is_there(html, folder):
    assert {f"cmdp_fast.{name}" for name in cf.__all__} <= html[folder / "api" / "cmdp_fast.html"].ids
    objective = html[folder / "api" / "cmdp_fast.objective.html"].ids
    assert {"cmdp_fast.objective.ppo_loss", "cmdp_fast.objective.direct_coefficient"} <= objective
    advantage = html[folder / "api" / "cmdp_fast.advantage.html"].ids
    assert {f"cmdp_fast.advantage.{name}" for name in ("grpo", "rloo", "gae")} <= advantage
    for name in (*api.MODULES, "cmdp_fast.trainer.methods.ppo", "cmdp_fast.trainer.settings.budget"):
        assert folder / "api" / f"{name}.html" in html
    for path, page in html.items():
        assert "Alias for field number" not in "".join(page.prose), path.name


def fields_of(kind: type) -> Iterator[tuple[str, str]]:
    """The fields that a class has of its own, each with the string below it in the source."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    for field, text in itertools.pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            yield field.target.id, inspect.cleandoc(text.value.value)


def words(text: str) -> list[str]:
    """Without markup, and without formulas, which are MathML on the page."""
    return re.findall(r"\w+", re.sub(r"\$[^$]+\$", "", text))


def description(page: str, name: str) -> str:
    """What stands below a name on a page of the API."""
    below = page.partition(f'id="{name}"')[2].partition("<dd>")[2].partition("</dd>")[0]
    return html_module.unescape(re.sub(r"<[^>]+>", "", re.sub(r"<math.*?</math>", "", below, flags=re.DOTALL)))


def signature(page: str, name: str) -> str:
    below = page.partition(f'id="{name}">')[2].partition("</dt>")[0]
    return " ".join(html_module.unescape(re.sub(r"<[^>]+>", "", below)).split())


def test_every_field_is_described_in_whole(folder):
    """Napoleon would take the words before a colon for the field's type, and put them behind the others."""
    count = 0
    for path in sorted((folder / "api").glob("cmdp_fast*.html")):
        page, module = path.read_text(encoding="utf-8"), importlib.import_module(path.stem)
        for name, kind in vars(module).items():
            if isinstance(kind, type) and f'id="{path.stem}.{name}"' in page:
                for field, text in fields_of(kind):
                    count += 1
                    assert words(description(page, f"{path.stem}.{name}.{field}")) == words(text), f"{name}.{field}"
    assert count > 150


def test_types_are_those_of_values_alone(folder):
    """Not all that stands beside them for the command line; in what is searched, too."""
    for path in [*folder.glob("api/*.html"), folder / "searchindex.js"]:
        text = html_module.unescape(re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8")))
        assert not (left := re.search(r".{0,40}(Annotated\[|<lambda>|Unit\(given=).{0,40}", text)), (
            f"{path.name}: {left[0]}"
        )
    page = (folder / "api" / "cmdp_fast.trainer.settings.budget.html").read_text(encoding="utf-8")
    name = "cmdp_fast.trainer.settings.budget.BudgetSettings"
    assert signature(page, f"{name}.budget").startswith("budget: float = 2.0")
    assert "budget" not in signature(page, name)  # each stands below, with what it means
    assert "budget: " in signature((folder / "api" / "cmdp_fast.html").read_text("utf-8"), "cmdp_fast.Constraint")


def test_the_classes_are_as_they_were_after_the_types_were_shown():
    before = BudgetSettings.__annotations__
    with api.plain_types():
        assert BudgetSettings.__annotations__["budget"] is float
    assert BudgetSettings.__annotations__ is before and "Annotated" in str(before["budget"])


def test_pages_of_measurements_have_titles_of_their_own(html, folder):
    names = [page.name for page in pages.results_of(ROOT)]
    index = (folder / "results" / "index.html").read_text(encoding="utf-8")
    shown = [re.search(rf'href="{name.removeprefix("results/")}\.html">([^<]+)</a>', index)[1] for name in names]
    assert len(set(shown)) == len(shown) and {*pages.RESULT_TITLES.values()} <= {*shown}
    assert {f"results/{name}" for name in pages.RESULT_TITLES} <= {*names}


def test_what_is_left_out_needs_a_package(folder):
    left_out = (folder / "left_out").read_text(encoding="utf-8").split()
    assert all(name.startswith(api.OPTIONAL) for name in left_out)
    index = (folder / "api" / "index.html").read_text(encoding="utf-8")
    assert all(name in index for name in left_out)


def test_no_page_has_a_path_of_the_machine_that_builds(folder):
    path = re.compile(re.escape(str(ROOT)) + r"(?![\w-])")
    for page in [*folder.rglob("*.html"), *folder.rglob("*.js")]:
        assert not path.search(page.read_text(encoding="utf-8")), page.relative_to(folder)
    line = api.left_out_line("cmdp_fast.integrations.verl", f"verl is not installed, expected it: pip install '{ROOT}'")
    assert line == "Left out: ``cmdp_fast.integrations.verl`` (verl is not installed: ``pip install '.[verl]'``).\n"
    assert str(ROOT) not in api.left_out_line("cmdp_fast.integrations.trl", f"cannot import name 'x' ({ROOT}/x.py)")


def test_the_first_page_is_short(html, folder):
    words = "".join(html[folder / "index.html"].prose).split()
    assert len(words) < 900


def test_links_and_images_of_a_guide():
    text = "[a](x.md#b) `[c](d.md)` ![e](f.png) [`g`](h.py)\n```\n[i](j.md)\n```\n[k](https://l.m) [n](o.bin)\n"
    found = markdown.relinked(text, lambda a, _: None if a.endswith(".bin") else f"to/{a}", lambda a: f"images/{a}")
    assert found == (
        "[a](to/x.md#b) `[c](d.md)` ![e](images/f.png) [`g`](to/h.py)\n```\n[i](j.md)\n```\n[k](https://l.m) n\n"
    )


def test_sections_of_the_readme():
    text = "# T\nabove\n## A\n```\n## no title\n```\n## B b\nb\n"
    assert markdown.sections(text) == {"": "above\n", "A": "\n```\n## no title\n```\n", "B b": "\nb\n"}


@pytest.fixture
def clone(tmp_path):
    """As much of a clone as the sources of a site need."""
    groups = pages.GROUPS.values()
    titles = [title for group in groups for page in group for title in page.sections if title] + list(
        pages.INDEX.sections
    )
    for page in [pages.INDEX, *(page for group in groups for page in group)]:
        (tmp_path / page.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page.path).write_text("# T\n", encoding="utf-8")
    readme = "\n".join(["# T", "above", *(f"## {title}\ntext" for title in titles)])
    (tmp_path / "README.md").write_text(readme, encoding="utf-8")
    return tmp_path


def test_a_section_that_is_on_no_page_is_named(clone, tmp_path):
    sources.write(clone, tmp_path / "out")
    with (clone / "README.md").open("a", encoding="utf-8") as readme:
        readme.write("\n## Another\ntext\n")
    with pytest.raises(ValueError, match="Another"):
        sources.write(clone, tmp_path / "out")


def test_a_link_to_a_section_that_a_guide_replaces_is_one_to_the_guide(clone, tmp_path):
    (clone / "cmdp_fast" / "ops" / "README.md").write_text(
        "# T\n[a](../../README.md#the-method) [b](../../README.md#speed) "
        "[c](../../README.md#cite) [d](../../README.md)\n"
    )
    (clone / pages.INDEX.path).write_text("# T\n## Cite\n<!-- from README.md: Cite -->\n", encoding="utf-8")
    sources.write(clone, tmp_path / "out")
    written = (tmp_path / "out" / "operations.md").read_text(encoding="utf-8")
    assert written == "# T\n[a](method.md) [b](speed.md#speed) [c](index.md#cite) [d](index.md)\n"
    assert "text" in (tmp_path / "out" / "index.md").read_text(encoding="utf-8")


def test_a_link_to_nothing_is_named(clone, tmp_path):
    (clone / "cmdp_fast" / "ops" / "README.md").write_text("# T\n[x](nowhere.py)\n", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"cmdp_fast/ops/nowhere\.py"):
        sources.write(clone, tmp_path / "out")


def test_a_docstring_becomes_restructured_text():
    lines = [
        "One * *of* **x.** of `a.b` and `--c d`, $x_1$.",
        "",
        "    code | *",
        "",
        "$$ y",
        "z $$",
        "",
        "Args:",
        "    n_: it.",
    ]
    assert docstrings.converted(lines) == [
        r"One \* *of* **x.** of `a.b` and ``--c d``, :math:`x_1`.", "",
        ".. code-block:: text", "", "    code | *", "", "",
        ".. math::  y z", "",
        "Args:", r"    n\_: it.",
    ]  # fmt: skip


def test_a_formula_is_mathml():
    assert "<mi>log</mi><mspace" in mathml.mathml(r"\log p", "inline")
    assert "<munder><mo>max</mo>" in mathml.mathml(r"\max\limits_\pi", "block")
    assert re.match(r"<math [^>]*display=\"block\">.*</math>$", mathml.mathml(r"\frac{a}{b}", "block"))


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(site, "ROOT", tmp_path)
    assert command.main([str(tmp_path / "site")]) == 2
    assert "is no clone" in capsys.readouterr().err
    monkeypatch.setattr(command, "NEEDED", ("furo", "no_such_package"))
    assert command.main([str(tmp_path / "site")]) == 2
    assert "needs no_such_package" in capsys.readouterr().err
