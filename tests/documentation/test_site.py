"""The site: each page is in its navigation, no link is broken, nothing is requested from elsewhere."""

from __future__ import annotations

import doctest
import importlib.util
import json
import re
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

import lightning_prune
from tests.support.browser import DESKTOP, PHONE, TIMEOUT, browser, opened  # noqa: F401
from website.__main__ import build
from website.navigation import listed_pages, navigation, pages_of, toml
from website.reference import exported, packages
from website.requests import external_requests
from website.roles import markdown
from website.sources import MOVED, _page, entries, targets

ROOT = Path(__file__).parents[2]
missing = [
    name for name in ("zensical", "mkdocstrings_handlers", "nbconvert") if not importlib.util.find_spec(name)
]
with_generator = pytest.mark.skipif(bool(missing), reason=f"not installed (the extra docs): {missing}")


def test_the_navigation_has_every_page_notebook_and_public_package_once():
    pages = pages_of(entries())
    expected = {target for target in targets().values() if target.endswith(".md")}
    assert sorted(pages) == sorted(expected | {f"reference/{package}.md" for package in packages()})


def test_the_navigation_follows_the_tables_of_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    row = "| [Data](guides/data.md) |"
    assert row in index
    listed = listed_pages(index.replace(row, f"| [A new page](guides/new.md) | for |\n{row}"))
    guide = list(listed["Guides"])
    assert guide.index("guides/new.md") == guide.index("guides/data.md") - 1
    assert "guides/new.md" in pages_of(navigation(listed, {}, {}))
    other = listed_pages(
        "## Recipes: by example\n\n| page | for |\n|:--|:--|\n| [One](recipes/one.md) | x |\n"
    )
    assert "recipes/one.md" in pages_of(navigation(other, {}, {}))


def test_no_two_files_share_a_place_in_the_site():
    assert len(set(targets().values())) == len(targets())
    assert all((ROOT / source).is_file() for source in MOVED)


def test_pages_keep_their_pictures():
    pictures = [
        each.partition(")")[0] for each in _page("README.md", "start.md").split("](results/figures/")[1:]
    ]
    assert pictures == ["demo.png", "report_run.webp", "report_sweep.webp", "plan.svg"]
    assert {f"results/figures/{name}" for name in pictures} <= {*targets().values()}


@pytest.mark.parametrize("package", packages())
def test_the_reference_has_the_names_that_packages_export(package):
    assert exported(package) == import_module(package).__all__


def test_roles_in_docstrings_become_links_where_there_is_a_page():
    text = markdown(
        ":class:`~lightning_prune.Plan`, :func:`no_such`, :mod:`lightning_prune.criteria`\n\nExample:\n    1"
    )
    assert text.startswith(
        "[`Plan`][lightning_prune.Plan], `no_such`, [`criteria`][lightning_prune.criteria]"
    )
    assert text.endswith("\n\nExamples:\n    1")


def test_requests_to_other_hosts_are_found_and_links_of_readers_are_not(tmp_path):
    (tmp_path / "page.html").write_text(
        '<a href="https://example.org/read">x</a><img src="here.png"><link rel="canonical" href="https://a.org">'
        '<script src="//cdn.example.org/a.js"></script><link rel="stylesheet" href="https://fonts.example.org/b">'
    )
    (tmp_path / "style.css").write_text("@import 'https://c.example.org/d.css'; a { background: url(e.png) }")
    assert external_requests(tmp_path) == [
        "page.html: //cdn.example.org/a.js",
        "page.html: https://fonts.example.org/b",
        "style.css: https://c.example.org/d.css",
    ]


@pytest.mark.parametrize("module", ["links", "navigation", "roles"])
def test_examples_of_the_builder(module):
    result = doctest.testmod(import_module(f"website.{module}"))
    assert result.attempted
    assert not result.failed


def test_strings_are_quoted_in_the_configuration():
    assert toml('say "\\"') == '"say \\"\\\\\\""'


def test_make_docs_sets_up_what_it_needs():
    plan = subprocess.run(
        ["make", "-n", "docs", "STAMP=new"], cwd=ROOT, capture_output=True, text=True, timeout=600, check=True
    ).stdout
    assert plan.index("pip install") < plan.index("-m website")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Build the site; a broken link, an unknown reference or a request to another host is an error."""
    return build(tmp_path_factory.mktemp("site"))


@with_generator
def test_the_site_builds_without_a_warning_and_has_every_page(site):
    pages = {page.removesuffix(".md") + ".html" for page in pages_of(entries())}
    assert pages <= {path.relative_to(site).as_posix() for path in site.rglob("*.html")}
    reference = (site / "reference" / "lightning_prune.html").read_text()
    assert [name for name in lightning_prune.__all__ if f'id="lightning_prune.{name}"' not in reference] == []
    assert ":class:" not in reference
    assert list((site / "notebooks" / "quickstart_files").glob("*.png"))
    searched = {
        item["location"].split("#")[0] for item in json.loads((site / "search.json").read_text())["items"]
    }
    assert pages <= searched


@with_generator
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize(
    "page",
    [
        "index",
        "overview",
        "guides/budgets",
        "notebooks/pareto",
        "reference/lightning_prune",
        "results/quality",
    ],
)
def test_pages_opened_from_the_folder_request_nothing_and_fit_the_window(browser, site, page, width):  # noqa: F811
    with opened(browser, site / f"{page}.html", width) as visit:
        visit.page.wait_for_load_state()
        assert visit.errors == []
        assert [address for address in visit.requests if not address.startswith(("file:", "blob:"))] == []
        assert visit.overflow() <= 0
        broken = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
        assert visit.page.evaluate(broken) == []


@with_generator
def test_the_search_works_without_a_server(browser, site):  # noqa: F811
    with opened(browser, site / "index.html") as visit:
        visit.page.keyboard.press("Control+k")
        visit.page.keyboard.type("attention maps", delay=20)
        number = visit.page.get_by_text(re.compile(r"^\s*\d+ results")).first
        number.wait_for(timeout=TIMEOUT)
        assert int(number.inner_text().split()[0]) > 0
        assert visit.errors == []


@with_generator
def test_a_broken_link_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("website.__main__.collect", lambda folder: _one_page(folder, "[gone](no/such.md)"))
    monkeypatch.setattr("website.__main__.entries", lambda: [{"Home": "index.md"}])
    with pytest.raises(RuntimeError, match=r"no/such\.md"):
        build(tmp_path)


def _one_page(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "index.md").write_text(f"# Page\n\n{text}\n")
