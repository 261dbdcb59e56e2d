"""Converts checkpoints between Hugging Face directories and ours, and back bit for bit.

    python -m qwen3next_jax.convert from-hf SRC DST [--dtype=bfloat16]
    python -m qwen3next_jax.convert to-hf   SRC DST [--dtype=bfloat16] [--expert_layout=fused]
                                                    [--max_shard_size=5GB]

Ours is a work directory (config.json, checkpoints/), of a run or made by `from-hf`; `to-hf` also
takes one of its step folders. Data is copied chunk by chunk, so memory does not depend on the
model's size. DST appears only when it is complete.
"""

import argparse
import dataclasses
import json
import pathlib
import signal
import sys
from functools import partial
from typing import Any

import jax

from qwen3next_jax.checkpoint import hugging_face as hf
from qwen3next_jax.checkpoint.load import find_checkpoint, from_step, stored_parameters
from qwen3next_jax.checkpoint.store import CheckpointStore, Streamed, save_streamed
from qwen3next_jax.checkpoint.tensor_table import FileLayout
from qwen3next_jax.command import friendly_errors


def main(argv: list[str] | None = None) -> None:
    """Runs a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qwen3next_jax.convert", description=(__doc__ or "").partition("\n")[0]
    )
    commands, subs = parser.add_subparsers(required=True), {}
    for name, run, source in (
        ("from-hf", from_hf, "a Hugging Face directory"),
        ("to-hf", to_hf, "a work directory, or one of its step folders"),
    ):
        sub = subs[name] = commands.add_parser(name)
        sub.set_defaults(run=run)
        sub.add_argument("src", type=_local, help=source)
        sub.add_argument("dst", type=_local, help="a new or empty directory")
        sub.add_argument(
            "--dtype",
            choices=("float32", "bfloat16"),
            help="of all but A_log and dt_bias; as stored if not given",
        )
    subs["to-hf"].add_argument(
        "--expert_layout",
        choices=tuple(hf.EXPERT_LAYOUTS),
        help="the source's if not given, per_expert for a run's",
    )
    subs["to-hf"].add_argument("--max_shard_size", default="5GB", help="of a file, such as 5GB")
    args = vars(parser.parse_args(argv))
    run = args.pop("run")

    jax.config.update("jax_platforms", "cpu")  # no accelerator is needed
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda *_: sys.exit("Terminated; nothing was written."))
    with friendly_errors("Nothing was written."):
        run(**args)
    print(f"Wrote {args['dst']}")


def _local(path: str) -> pathlib.Path:
    if "://" in path:
        raise argparse.ArgumentTypeError(
            f"{path} is no path of a mounted file system; name a local directory, and copy"
        )
    return pathlib.Path(path)


def from_hf(src: pathlib.Path, dst: pathlib.Path, *, dtype: Any = None) -> None:
    """Converts a Hugging Face directory to a work directory with a checkpoint of step 0.

    Args:
      src: path of a directory with config.json and safetensors.
      dst: path of a new or empty directory.
      dtype: dtype of the parameters except `A_log` and `dt_bias`; None: as stored.

    Raises:
      FileExistsError: `dst` holds something.
      ValueError: names all that is wrong with `src`.
    """
    with hf.replacing_directory(dst) as beside:
        found = hf.open_hf(src, dtype)

        def read(path, dtype, block):
            return found.table.read(found.tensors.take, path, block, dtype)

        arrays = {
            f"params/{path}": Streamed(
                shape, found.dtypes[path], partial(read, path, found.dtypes[path])
            )
            for path, shape in found.table.parameters.items()
        }
        layout = dataclasses.asdict(found.layout)
        save_streamed(beside / "checkpoints", 0, arrays, {"hugging_face_layout": layout})
        described = {"model": found.config.to_dict()}
        (beside / "config.json").write_text(json.dumps(described, indent=2) + "\n")
        hf.copy_companions(src, beside)


def to_hf(
    src: pathlib.Path,
    dst: pathlib.Path,
    *,
    dtype: Any = None,
    expert_layout: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Converts one of our checkpoints to a Hugging Face directory.

    Args:
      src: a work directory, whose newest good checkpoint is taken, or one of its step folders.
      dst: path of a new or empty directory.
      dtype: dtype of the tensors except `A_log` and `dt_bias`; None: as stored.
      expert_layout: "per_expert" or "fused"; None: that of the files it was converted from, or
        "per_expert".
      max_shard_size: most bytes in a file, as a number or such as "5GB".

    Raises:
      FileExistsError: `dst` holds something.
      FileNotFoundError: there is no checkpoint.
      ValueError: `src` is no checkpoint of ours, or of a model that Hugging Face lacks.
      DamagedCheckpointError: the step, or every step of the work directory, is damaged.
    """
    ours = find_checkpoint(src)
    if ours is None:
        raise ValueError(f"{src} is a Hugging Face directory already")

    def write(store: CheckpointStore, step: int) -> None:
        parameters = stored_parameters(store, step, ours.config)
        remembered = store.describe(step)[1].get("hugging_face_layout")
        layout = FileLayout() if remembered is None else FileLayout.from_dict(remembered)
        if expert_layout is not None:
            layout = dataclasses.replace(layout, fused=hf.expert_layouts(expert_layout))
        hf.write_hf(
            dst,
            ours.config,
            parameters,
            lambda path: store.read_blocks(step, f"params/{path}"),
            dtype=dtype,
            layout=layout,
            max_shard_size=max_shard_size,
            companions=ours.workdir,
        )

    from_step(ours, write)


if __name__ == "__main__":
    main()
