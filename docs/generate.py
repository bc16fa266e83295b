"""The hook of MkDocs that adds what is generated: a page a method, a page a benchmark, and the navigation to them.

The build stops, with one line, where an example fails, a method misses a part of its page, or (with --strict, as
`make docs` runs it) a link, an anchor or a page of the navigation does not exist, or a guide is in no navigation.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import examples
import measured
import methods

ROOT = Path(__file__).parents[1]
# documents at the top of the project that get a page, because guides point to them
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_building = False


def pages() -> dict[str, str]:
    """Every generated page: path in the site -> Markdown.

    Raises:
        DocsError: One cannot be made.
    """
    made = {"methods/index.md": methods.index(), "measured/index.md": measured.index()}
    for method in methods.built():
        made[f"methods/{method.family}/{method.name}.md"] = methods.page(method)
    made |= {f"methods/{family}/index.md": methods.family_page(family) for family in methods.families()}
    made |= {f"measured/{job}.md": measured.job_page(job, data) for job, data in measured.jobs().items()}
    for name, path in OUTSIDE.items():
        made[path] = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
    return made


def navigation() -> list[dict[str, Any]]:
    """The part of the navigation that leads to the generated pages."""
    families: list[Any] = ["methods/index.md"]
    for family in methods.families():
        listed = [
            {method.name: f"methods/{family}/{method.name}.md"} for method in methods.built() if method.family == family
        ]
        families.append({family: [f"methods/{family}/index.md", *listed]})
    jobs = [{job.replace("_", "-"): f"measured/{job}.md"} for job in measured.jobs()]
    outside = [{Path(path).stem.capitalize(): path} for path in OUTSIDE.values()]
    return [{"Methods": families}, {"Measured": ["measured/index.md", *jobs]}, {"Project": outside}]


def to_site(markdown: str) -> str:
    """A guide with its links to documents outside of ``docs/`` turned to their pages."""
    for name, path in OUTSIDE.items():
        markdown = re.sub(rf"\]\(\.\./{re.escape(name)}(?=[#)])", f"]({path}", markdown)
    return markdown


@contextmanager
def _one_line() -> Iterator[None]:
    """Ends the build with the message of a `DocsError` instead of a traceback."""
    from mkdocs.exceptions import PluginError

    try:
        yield
    except examples.DocsError as error:
        raise PluginError(str(error)) from None


def on_startup(command: str, **_: Any) -> None:
    """`mkdocs serve` rebuilds at every keystroke, and leaves the examples out."""
    global _building
    _building = command == "build"


def on_config(config: Any) -> Any:
    """Leads from the navigation of mkdocs.yml on to what is generated."""
    config.nav = [*config.nav, *navigation()]
    return config


def on_pre_build(config: Any) -> None:
    """Runs every example that the site shows."""
    if _building:
        with _one_line(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tests see them; here they would bury the one line that counts
            for method in methods.built():
                examples.run(examples.shown(method))
            examples.run_guides(ROOT)


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    from mkdocs.structure.files import File

    with _one_line():
        for path, content in pages().items():
            files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Mends the links of a page that lead out of ``docs/``."""
    return to_site(markdown)
