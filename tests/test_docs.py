"""Every example that is printed runs: in docstrings, the README and the docs."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import weightnorm as wn

ROOT = Path(__file__).parent.parent
MODULES = [module.name for module in pkgutil.walk_packages(wn.__path__, "weightnorm.") if "__main__" not in module.name]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        exec(compile(block, str(page), "exec"), names)


def test_the_public_page_is_what_it_says():
    for name in wn.__all__:
        assert getattr(wn, name) is not None, name
    typed = re.search(r"if TYPE_CHECKING:\n(.*?)\n\n", Path(wn.__file__).read_text(), re.S).group(1)
    assert set(re.findall(r" as (\w+)", typed)) == set(wn.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'AdamZ'"):
        wn.AdamZ  # noqa: B018


def test_everything_public_is_documented():
    for name in set(wn.__all__) - {"__version__"}:
        text = getattr(wn, name).__doc__
        assert text, name
        if name != "formula":
            assert "Example:" in text, name
