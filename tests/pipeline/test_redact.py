"""No secret reaches a tracker, a summary or a report."""

import pytest

from pipeline.redact import HIDDEN, flatten, is_secret, redact, redact_text


@pytest.mark.parametrize(
    "name",
    [
        "token", "hf_token", "apiKey", "api_key", "API-KEY", "password", "db.password", "secret_access_key",
        "spark.hadoop.fs.s3a.secret.key", "spark.hadoop.fs.s3a.access.key", "headers.Authorization", "client_secret",
        "fs.azure.account.key.store.dfs.core.windows.net", "accessToken", "spark.executorEnv.PGPASSWORD",
        "spark.executorEnv.DB_PASS", "spark.executorEnv.GITHUB_PAT", "spark.ssl.keyPassphrase",
    ],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    [
        "bypass",
        "pattern",
        "passes",
        "path",
        "max_completion_tokens",
        "max_tokens",
        "api_key_env",
        "prompt_tokens",
        "key",
        "annotation_key",
        "seed",
        "",
    ],
)
def test_names_that_are_none(name: str) -> None:
    assert not is_secret(name)


def test_values_are_hidden_at_any_depth() -> None:
    shown = redact(
        {
            "spark": {"extra": {"spark.hadoop.fs.s3a.secret.key": "hunter2", "spark.ui.port": "1"}},
            "urls": ["https://me:hunter2@host:1/v1", "https://h/x?X-Amz-Signature=hunter2&a=1"],
            "uri": "postgresql+psycopg://u:hunter2@db/mlflow",
            "max_tokens": 5,
            "token": "",
            "spark.executor.extraJavaOptions": "-Xmx1g -Dfs.password=hunter2 -Dx=1",
        }
    )
    assert shown["spark.executor.extraJavaOptions"] == f"-Xmx1g -Dfs.password={HIDDEN} -Dx=1"
    assert "hunter2" not in str(shown)
    assert shown["spark"]["extra"]["spark.hadoop.fs.s3a.secret.key"] == HIDDEN
    assert shown["spark"]["extra"]["spark.ui.port"] == "1"
    assert shown["uri"] == f"postgresql+psycopg://{HIDDEN}@db/mlflow"
    assert shown["max_tokens"] == 5
    assert shown["token"] == ""


def test_text_without_secrets_is_unchanged() -> None:
    assert redact_text("see https://example.org/a?b=c, mail me@example.org") == (
        "see https://example.org/a?b=c, mail me@example.org"
    )


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1]}) == {"a.b": 1, "a.c": {}, "d": [1]}
