"""The machines that people have: proxies, telemetry that is on by default, terminals that know ASCII only."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.request import proxy_bypass

import pytest

from flows.environment import set_environment

ROOT = Path(__file__).parents[2]
PLUGINS = {"PREFECT_PLUGINS_ENABLED": "1", "PYTHONPATH": str(ROOT)}
PROXY = "http://127.0.0.1:9"  # where nobody listens
HIDDEN = {"no_proxy", "http_proxy", "https_proxy", "all_proxy", "ci", "do_not_track", "pythonutf8", "prefect_api_url"}


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.lower() not in HIDDEN} | PLUGINS | more


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"http_proxy": PROXY}, "localhost,127.0.0.1,::1"),
        ({"HTTPS_PROXY": PROXY, "NO_PROXY": "corp.invalid"}, "corp.invalid,localhost,127.0.0.1,::1"),
        ({"all_proxy": PROXY, "no_proxy": "127.0.0.1"}, "127.0.0.1,localhost,::1"),
        ({"http_proxy": PROXY, "no_proxy": "*"}, "*"),
        ({}, None),
    ],
)
def test_what_a_machine_asks_of_itself_goes_through_no_proxy(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ:
        if name.lower() in HIDDEN:
            monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    set_environment()
    set_environment()
    assert (os.environ.get("no_proxy"), os.environ.get("NO_PROXY")) == (expected, expected)
    for host in ("localhost", "127.0.0.1"):
        assert not given or proxy_bypass(host)


def test_outside_the_repository_nothing_is_reported_to_anyone(tmp_path: Path) -> None:
    """Importing Prefect loads the plugin, as every `prefect run` does."""
    code = (
        "import json, os, prefect\n"
        "from prefect._internal.analytics import is_telemetry_enabled\n"
        "from mlflow.telemetry.utils import is_telemetry_disabled\n"
        "from prefect.settings import get_current_settings\n"
        "from huggingface_hub.constants import HF_HUB_DISABLE_TELEMETRY as hub\n"
        "analytics = get_current_settings().server.analytics_enabled\n"
        "print(json.dumps([is_telemetry_enabled(), analytics, not is_telemetry_disabled(), not hub]))"
    )
    reported = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path, env=environment(), timeout=240)
    assert json.loads(reported) == [False, False, False, False]


def test_ever_new_shapes_do_not_fill_the_memory() -> None:
    """In bfloat16, on CPUs where torch keeps something for each shape; what the user has chosen wins."""
    code = (
        "from flows.environment import set_environment\n"
        "set_environment()\n"
        "import psutil, torch\n"
        "torch.set_num_threads(1)\n"
        "weight, process = torch.zeros(2048, 512).bfloat16(), psutil.Process()\n"
        "for n in range(1, 500):\n"
        "    torch.nn.functional.linear(torch.zeros(n, 512).bfloat16(), weight)\n"
        "    before = process.memory_info().rss if n == 20 else (before if n > 20 else 0)\n"
        "print(process.memory_info().rss - before)"
    )
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    without = {name: value for name, value in environment().items() if name not in names}
    limited, unlimited = (
        int(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=without | chosen, timeout=240))
        for chosen in ({}, dict.fromkeys(names, "1024"))
    )
    if unlimited < 200 * 2**20:
        pytest.skip("on this CPU torch keeps nothing for each shape")
    assert limited < unlimited / 2


def test_what_the_user_has_chosen_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "0")
    set_environment()
    assert os.environ["DO_NOT_TRACK"] == "0"


@pytest.mark.parametrize(
    ("arguments", "code", "encoding"),
    [
        (("annotate", "-h"), 0, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}),
        (("annotate", "--set", "run=ü ü"), 2, {"PYTHONIOENCODING": "ascii"}),
    ],
)
def test_a_terminal_that_knows_ascii_only_is_no_reason_to_fail(
    arguments: tuple[str, ...], code: int, encoding: dict[str, str], tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "run", *arguments],
        cwd=tmp_path, env=environment(**encoding), capture_output=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert b"Traceback" not in done.stderr
    (done.stdout + done.stderr).decode("ascii")
