"""docs/ARCHITECTURE.md is the map: whoever looks for a module finds it there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest

HERE: Final = Path(__file__).resolve().parents[2]
# Folders that the map names as wholes.
WHOLE: Final = ("supervisord/ctl", "supervisord/rpc", "gateway_client/gateways/embedded/dialects",
                "gateway_client/gateways/embedded/models")  # fmt: skip
MODULES: Final = sorted(
    path.relative_to(HERE)
    for package in ("supervisord", "sandbox", "gateway_client")
    for path in (HERE / package).rglob("*.py")
    if path.stem not in {"__init__", "__main__"} and not str(path.relative_to(HERE)).startswith(WHOLE)
)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_the_map_has_every_module(module: Path) -> None:
    text = (HERE / "docs" / "ARCHITECTURE.md").read_text()
    assert re.search(rf"[`{{,/ ]{module.stem}(\.py|[}},])", text), f"say in docs/ARCHITECTURE.md what {module} is for"
