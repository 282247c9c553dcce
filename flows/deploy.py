"""The build step of `prefect.yaml`: a deployment's parameters are the whole settings, not the name of a preset alone.

Prefect's form sends back every field that it shows, so what it shows must be what runs. A bad value is refused when the
deployment is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.settings import choose


def fill(
    preset: str = "",
    config: str | None = None,
    run: str = "",
    runs: str | None = None,
    set: Sequence[str] = (),
) -> dict[str, Any]:
    """The settings as `prefect run` would choose them from the same words, for `{{ settings }}` in `parameters`.

    Raises `ContractError` for anything that is not valid.
    """
    chosen = choose(preset, Path(config) if config else None, run, Path(runs) if runs else None, set)
    return {"settings": chosen.model_dump(mode="json")}
