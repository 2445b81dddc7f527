"""Which processes end with the one that started them."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

RANK = "from megatron_prores.system.processes import end_with_launcher as end; end(); "
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"


@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_ends_with_its_launcher_and_without_one_outlives_its_parent(launched: bool) -> None:
    environment = {name: os.environ[name] for name in os.environ if name != "TORCHELASTIC_RUN_ID"}
    if launched:
        environment["TORCHELASTIC_RUN_ID"] = "none"
    script = f"{RANK} print('ready', flush=True); sys.stdin.read(); print('done', flush=True)"
    parent = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, "import sys; " + script],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    assert parent.stdout.readline() == "ready\n"
    (rank,) = psutil.Process(parent.pid).children()
    parent.kill()
    parent.wait()
    if launched:
        assert not psutil.wait_procs([rank], 30)[1]
    parent.stdin.close()
    assert parent.stdout.read() == ("" if launched else "done\n")
