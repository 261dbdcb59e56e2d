"""Reads batches of several runs at a time, in a process that can be killed.

    python tests/read_batches.py RUNS.json LOG

RUNS holds, by name, `load` and `read`, the arguments of `load_data` and `training_batches`, and the
`state` to go on from, or null. After each batch LOG gets a line: the run's name, the batch's digest
and the state behind it. The process ends when it is killed.
"""

import hashlib
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from qwen3next_jax.data.corpus import load_data
from qwen3next_jax.data.pipeline import training_batches


def open_run(run):
    batches = training_batches(load_data(**run["load"]), **run["read"])
    if run["state"] is not None:
        batches.set_state(run["state"])
    return batches


def digest(batch):
    content = hashlib.sha256()
    for name in sorted(batch):
        content.update(f"{name}{batch[name].dtype}{batch[name].shape}".encode())
        content.update(batch[name].tobytes())
    return content.hexdigest()


if __name__ == "__main__":
    runs = json.loads(pathlib.Path(sys.argv[1]).read_text())
    opened = {name: open_run(run) for name, run in runs.items()}
    with open(sys.argv[2], "a") as log:
        while True:
            for name, batches in opened.items():
                line = [name, digest(next(batches)), batches.get_state()]
                log.write(json.dumps(line) + "\n")
                log.flush()
