"""Adds the verb `run` to Prefect's own command line; loaded by Prefect as a plugin each time `prefect` is imported.

It only names where the command is, so that importing Prefect stays as fast as before; and Prefect reports to nobody.
"""

from __future__ import annotations

import logging

from flows.environment import set_environment

RUN_HELP = "Run one of this project's flows here and now (alone: list them)."


def register() -> None:
    """Register `prefect run`, unless Prefect has a command of that name by now.

    Prefect has no public way to add a command, so the private import is guarded: when it moves, `prefect` itself keeps
    working, and `python -m flows.cli` is the same command.
    """
    try:
        from prefect.cli._app import _app

        if "run" not in _app:
            _app.command("flows.cli:run_app", name="run", help=RUN_HELP)
    except Exception as error:  # anything else would break every other command of Prefect
        logging.getLogger(__name__).warning("`prefect run` is not available (%s); use `python -m flows.cli`", error)


set_environment()
register()
