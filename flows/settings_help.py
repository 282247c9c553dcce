"""The settings of a flow as `prefect run FLOW -h` shows them: key, value under the chosen preset, help."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from flows.catalog import FLOWS
from pipeline.settings import PipelineConfig
from pipeline.stages import with_upstream

_OPTIONS = ("preset", "run", "runs")  # --preset, --name and --runs


def show_settings(flow: str, settings: PipelineConfig) -> None:
    """Print the settings of the flow's own stages; those of the stages it needs are named by the flow that shows them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120")))
    own = FLOWS[flow].stages
    table = Table(
        box=None, pad_edge=False, title_justify="left", title=f"Settings, with the values of '{settings.preset}'"
    )
    table.add_column("--set", no_wrap=True)
    table.add_column("value", max_width=32)
    table.add_column("help", ratio=1)
    for part in (*own, *(["loop"] if FLOWS[flow].in_rounds else []), "drift", "spark", "tracking"):
        for key, value, told in described(getattr(settings, part), f"{part}."):
            table.add_row(key, Text(value), Text(told))
        table.add_section()
    for key, value, told in described(settings, ""):
        if "." not in key and key not in _OPTIONS:
            table.add_row(key, Text(value), Text(told))
    console.print(table)
    needed = [stage for stage in with_upstream(own, FLOWS[flow].own(settings)) if stage not in own]
    if needed:
        shown = [f"{stage}.* (prefect run {_flow_of(stage)} -h)" for stage in needed]
        console.print(f"And those of the stages that it needs: {', '.join(shown)}.", markup=False)


def described(config: BaseModel, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Key, value and help of every field, depth first."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from described(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _shown(value), " ".join((field.description or "").split())


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _flow_of(stage: str) -> str:
    return next(entry.name for entry in FLOWS.values() if entry.stages == (stage,))
