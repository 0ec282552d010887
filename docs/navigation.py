"""A page that the navigation in mkdocs.yml forgot stands at the end of the guides, so that it can be found."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def on_config(config: Any) -> Any:
    """Called by mkdocs when it has read its configuration."""
    guides = next(section["Guides"] for section in config.nav if "Guides" in section)
    named = str(config.nav)
    guides += [page.name for page in sorted(Path(config.docs_dir).glob("*.md")) if f"'{page.name}'" not in named]
    return config
