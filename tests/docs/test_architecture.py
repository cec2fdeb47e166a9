"""The document names what there is."""

from __future__ import annotations

import re

from module_list import DOCUMENT, PACKAGES, module_list, written_list
from newcomer import ROOT


def test_the_module_list_is_the_tree() -> None:
    assert written_list() == module_list(), "run: python tests/docs/module_list.py"


def test_files_named_in_the_text_exist() -> None:
    text = DOCUMENT.read_text().split("## Modules")[0]
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(named) > 10
    roots = [ROOT, *(ROOT / package for package in PACKAGES)]
    assert [name for name in sorted(named) if not any((r / name).exists() for r in roots)] == []
