"""An asv environment that is the running Python, with the fourbit that is installed in it.

asv's own kinds do not fit: virtualenv would download torch again for every commit, and "existing" records no
results, so that `asv publish` would make an empty page. This one records them under the checked-out commit,
and refuses any other. It is no judge of whether the installed fourbit is that commit's: install it first.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from asv import util
from asv.environment import Environment
from asv.machine import Machine, MachineCollection


def setup() -> None:
    """Called by asv when it loads this plugin: describe the machine as `asv machine --yes` does, if nobody has."""
    try:
        MachineCollection.load(Machine.get_unique_machine_name())
    except util.UserError:
        Machine.load(force_interactive=True, use_defaults=True)


class CurrentEnvironment(Environment):
    """The Python that runs asv."""

    tool_name = "current"
    matches_python_fallback = False

    def __init__(self, conf: Any, python: str, requirements: dict[str, str], tagged_env_vars: dict[Any, str]) -> None:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        self._python, self._requirements = version, {}  # asked for by the line below
        super().__init__(conf, version, {}, tagged_env_vars)
        self._global_env_vars.pop("ASV_ENV_DIR", None)

    @classmethod
    def matches(cls, python: str) -> bool:
        return True

    def check_presence(self) -> bool:
        return True

    def create(self) -> None:
        pass

    def _setup(self) -> None:
        pass

    def install_project(self, conf: Any, repo: Any, commit_hash: str) -> None:
        if commit_hash != repo.get_hash_from_name("HEAD"):
            raise util.UserError("only the checked-out commit can be measured, with the fourbit that is installed")

    def run(self, args: list[str], **kwargs: Any) -> str:
        # asv imports the folder `benchmarks` by itself; the harness lies beside it
        env = dict(kwargs.pop("env", None) or os.environ)
        env["ASV_PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), env.get("ASV_PYTHONPATH"))))
        output: str = util.check_output([sys.executable, *args], env=env, **kwargs)
        return output
