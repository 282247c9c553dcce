"""Settings of tracking."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from data.contracts import Config
from pipeline.redact import holds_secret


class TrackingConfig(Config):
    """Where runs and models are recorded with MLflow."""

    enabled: bool = True
    """Record runs and models with MLflow; metrics are kept in the run's folder either way."""
    uri: str = ""
    """MLflow tracking server or store; empty means the SQLite file `mlflow.db` in the folder of runs. Without a password or
    token: MLflow reads them from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""
    experiment_prefix: str = Field(default="ads-relevance", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    """Experiments are named PREFIX/STAGE, registered models PREFIX-teacher and PREFIX-student. Letters, digits, dots, dashes
    and underscores."""
    log_weights: bool = False
    """Upload the teacher's weights too. Off, its version points at a folder of card, figures and settings."""
    promotion_margin: float = Field(default=0.005, ge=0, le=1)
    """A new student becomes champion if the lower 95 % limit of its ROC-AUC minus the champion's, by paired bootstrap on the
    test pairs that both were measured on, is at least minus this."""

    @model_validator(mode="after")  # of the table, not the field: a message about a field repeats its value
    def _uri_holds_no_secret(self) -> Self:
        if holds_secret(self.uri):
            raise ValueError(
                "uri must not hold a password or token, since settings are recorded: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN (for a database PGPASSWORD or its own file), in the "
                "environment, and give the address alone"
            )
        return self
