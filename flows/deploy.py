"""The build step of `prefect.yaml`: a deployment's parameters are the whole settings, not the name of a preset alone.

Prefect's form sends back every field that it shows, so what it shows must be what runs. A bad value is refused when the
deployment is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.contracts import ContractError
from pipeline.redact import hidden_keys
from pipeline.settings import choose


def fill(
    preset: str = "",
    config: str | None = None,
    name: str = "",
    runs: str | None = None,
    set: Sequence[str] = (),
) -> dict[str, Any]:
    """The settings as `prefect run` would choose them from the same words, for `{{ settings }}` in `parameters`.

    Raises `ContractError` for anything that is not valid, and for a secret: Prefect shows a deployment's parameters.
    """
    chosen = choose(preset, Path(config) if config else None, name, Path(runs) if runs else None, set)
    values = chosen.model_dump(mode="json")
    if secret := hidden_keys(values):
        raise ContractError(
            f"{', '.join(secret)} would be shown on Prefect's pages; leave it out, and give it to the worker's "
            "environment or to Spark's own configuration (SPARK_CONF_DIR)"
        )
    return {"settings": values}
