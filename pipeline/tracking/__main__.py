"""Sends a run's folder to MLflow by hand: `python -m pipeline.tracking RUN_FOLDER [STORE]`.

Exit codes: 0 the store has everything, 1 something could not be sent, 2 a wrong command.
"""

import sys
from pathlib import Path

from pipeline.executions import read_executions
from pipeline.redact import redact_text
from pipeline.tracking.replay import replay


def main() -> None:
    """Send to the store that is named, else to the one that the run was tracked with last."""
    folder = Path(sys.argv[1]) if len(sys.argv) in (2, 3) else Path("no-folder")
    stores = sys.argv[2:] or [each.tracking["uri"] for each in read_executions(folder) if each.tracking["enabled"]]
    if not folder.is_dir() or not stores:
        print("error: use python -m pipeline.tracking RUN_FOLDER [STORE], with a run that was tracked", file=sys.stderr)
        raise SystemExit(2)
    sentence = replay(folder, stores[-1])
    print(sentence or f"MLflow ({redact_text(stores[-1])}) has all of {folder}")
    raise SystemExit(int(bool(sentence)))


main()
