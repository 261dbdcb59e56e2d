"""A training run, from its config to its last checkpoint; it can be killed and resumed anywhere.

A step depends only on the parameters, the optimizer's state and the next batch of the data
iterator. A checkpoint holds all three, so a resumed run computes what an uninterrupted run would,
bit for bit on the same devices. A step draws no random numbers.

With several processes, each runs this loop on its own rows of the same batches, and control flow
depends only on values that are the same in all of them. Process 0 alone writes config and metrics.
"""

import contextlib
import pathlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from qwen3next_jax.checkpoint.load import check_same_model, load_parameters
from qwen3next_jax.checkpoint.parameters import parameter_shapes
from qwen3next_jax.checkpoint.store import CheckpointStore
from qwen3next_jax.config import RunConfig
from qwen3next_jax.data.corpus import Data, check_same_data
from qwen3next_jax.data.pipeline import input_metrics, training_batches
from qwen3next_jax.model.decoder import Qwen3Next
from qwen3next_jax.parallel.context import implementations
from qwen3next_jax.parallel.layout import check_copies, describe_layout
from qwen3next_jax.parallel.mesh import BATCH, make_mesh, no_mesh
from qwen3next_jax.parallel.names import matching_names, named_leaves
from qwen3next_jax.parallel.processes import (
    BatchShare,
    ShouldStop,
    Stopped,
    compiled_together,
    exchange,
    require_same,
)
from qwen3next_jax.training.diagnostics import for_all_layers
from qwen3next_jax.training.environment import record_environment
from qwen3next_jax.training.metrics import names_at, reporters
from qwen3next_jax.training.program import Program, make_program, new_model
from qwen3next_jax.training.step import (
    TrainState,
    first_bad_parameter,
    first_non_finite,
    initial_state,
    split_frozen,
)
from qwen3next_jax.training.timing import Clock, Profile
from qwen3next_jax.training.workdir import has_steps, keep_config, last_step

Evaluate = Callable[[Qwen3Next], dict[str, Any]]
Sample = Callable[[Qwen3Next], list[dict[str, Any]]]


class NonFiniteLossError(RuntimeError):
    """The loss, a gradient or a parameter is not finite; the message says where and what helps."""


class ExpertOverflowError(RuntimeError):
    """Assignments of tokens to experts were dropped; the message says how many, and what helps."""


def train(
    config: RunConfig,
    workdir: pathlib.Path,
    data: Data,
    *,
    evaluate: Evaluate | None = None,
    sample: Sample | None = None,
    suites: Evaluate | None = None,
    report: Callable[[], None] = lambda: None,
    should_stop: ShouldStop = lambda: False,
) -> tuple[Qwen3Next, int]:
    """Trains until `config.train.num_steps`, from the work directory's last checkpoint if any.

    Args:
      config: the run's config, which is written to `workdir/config.json`.
      workdir: directory for config.json, environment.jsonl, metrics.jsonl, samples.jsonl,
        checkpoints/ and tensorboard/, shared by all processes. The caller holds its
        `workdir.workdir_lock`.
      data: the training data.
      evaluate: from the model to metrics; called on the mesh every `eval_every` steps and at the
        end. None: no evaluation.
      sample: from the model to lines for samples.jsonl; called every `sample_every` steps and at
        the end. None: no samples.
      suites: from the model to more metrics; called without a mesh every `evaluation.every` steps
        and at the end. None: no suites. These three may raise `Stopped` once `should_stop` returns
        True; what they leave undone is made up for when the run is resumed.
      report: called in process 0 after each evaluation, checkpoint and run of the suites.
      should_stop: whether to save and leave; called after each step and after each slow hook. See
        `processes.joined`.

    Returns:
      The trained model, and how many steps this call took: 0 if the run was already finished.

    Raises:
      ValueError: the directory holds a run of another config, of other data or of another
        tokenizer, `initial_checkpoint` is of another model, or the processes differ in config, code
        or versions.
      FileNotFoundError: `initial_checkpoint` does not exist.
      DamagedCheckpointError: all checkpoints are damaged.
      Stopped: `should_stop` returned true; the state is saved, and the same call goes on from it.
      ExpertOverflowError: assignments were dropped and `mesh.on_overflow` is "error".
      NonFiniteLossError: names the step, the first bad parameter and the last good checkpoint.
    """
    mesh = make_mesh(config.mesh)
    # Evaluations and samples use the same precision as the steps.
    precision = jax.default_matmul_precision(config.precision.matmul)
    with jax.set_mesh(mesh), precision:
        hooks = _Hooks(evaluate, sample, suites, report, should_stop)
        return _Run(config, workdir, data, mesh, hooks).take_steps()


class _Hooks(NamedTuple):
    evaluate: Evaluate | None
    sample: Sample | None
    suites: Evaluate | None
    report: Callable[[], None]
    should_stop: ShouldStop


class _Due(NamedTuple):
    """Which hooks are called after a step, and whether it is saved."""

    evaluate: bool = False
    save: bool = False
    suites: bool = False
    sample: bool = False


class _Dispatched(NamedTuple):
    """A step that runs on the devices."""

    step: int
    metrics: dict[str, jax.Array]
    batch: dict[str, jax.Array]  # to find the parameter at fault, should the step be halted
    position: dict[str, Any]  # of this process's data behind the batch


class _Run:
    """A run in progress: its state, and the steps whose metrics the host has not read yet."""

    def __init__(
        self, config: RunConfig, workdir: pathlib.Path, data: Data, mesh: Mesh, hooks: _Hooks
    ):
        t = config.train
        self._config, self._workdir, self._data, self._hooks = config, workdir, data, hooks
        # Checks come first, so that a refused run does not write its config to the directory.
        require_same(config.to_dict())
        _check_start(config, workdir)
        self._program = make_program(config, mesh)
        check_copies(
            named_leaves(self._program.state),
            mesh.shape,
            max_replicated=config.mesh.max_replicated,
        )
        keep_config(config, workdir)
        _log_program(config, mesh, self._program.state)
        shape = (t.global_batch_size, t.sequence_length)
        self._share = BatchShare(NamedSharding(mesh, BATCH), shape)
        self._batches = training_batches(
            data,
            batch_size=t.global_batch_size,
            sequence_length=t.sequence_length,
            seed=t.seed,
            hosts=self._share.hosts,
            host=self._share.host,
        )
        # Taken now rather than at each checkpoint, when the tokenizer's file may be gone.
        self._fingerprint = data.fingerprint()
        self._store = CheckpointStore(
            workdir / "checkpoints", keep=t.keep_checkpoints, keep_best=t.keep_best
        )
        self._start, self._tokens, self._state = _restore_or_initialize(
            config, self._program, self._store, data, self._batches
        )
        record_environment(workdir, mesh, start_step=self._start)
        self._writer, self._progress = reporters(workdir, t.num_steps, start_step=self._start)
        self._train_step = compiled_together(self._program.step)
        self._saved = self._start  # the last step that was saved, or tried to be
        self._unsettled: deque[_Dispatched] = deque()
        # The metrics of a step are read once the next step is dispatched, so that the devices never
        # wait for the host. Virtual devices of a CPU share its threads, so two steps with
        # collectives could deadlock: there a step is read before the next one.
        self._ahead = 0 if jax.default_backend() == "cpu" and mesh.size > 1 else 1
        self._stopping = False
        self._clock = Clock(self._tokens)
        self._profile = Profile(workdir / "profile", t.profile_steps, t.num_steps)

    def take_steps(self) -> tuple[Qwen3Next, int]:
        """Takes the remaining steps; returns what `train` returns."""
        last = self._config.train.num_steps
        # However the loop ends, a pending save is completed and the metrics are on disk.
        with (
            closing(self._store),
            closing(self._writer),
            closing(self._progress),
            closing(self._batches),
            closing(self._profile),
        ):
            if any(missed := self._missed_hooks()):
                self._evaluate_and_save(self._start, missed)
                if self._stopping:
                    raise Stopped(f"step {self._start} is saved in {self._workdir}")
            for step in range(self._start + 1, last + 1):
                self._dispatch(step)
                due, profiled = self._due(step), self._profile.ends_at(step)
                now = self._poll_stop() or any(due) or profiled
                while len(self._unsettled) > (0 if now else self._ahead):
                    self._settle(self._unsettled.popleft())
                if profiled:
                    self._profile.close()
                self._clock.spent_on("step")
                if any(due) or self._stopping:
                    self._evaluate_and_save(step, due)
                if self._stopping:
                    raise Stopped(f"step {step} is saved in {self._workdir}")
        return self._model(), max(last - self._start, 0)

    def _dispatch(self, step: int) -> None:
        """Reads a batch and starts a step on it."""
        self._profile.before(step)
        self._clock.spent_on("step")
        rows = next(self._batches)
        self._clock.spent_on("data")
        batch = self._share.assemble(rows)
        self._state, metrics = self._train_step(self._state, batch)
        self._unsettled.append(_Dispatched(step, metrics, batch, self._batches.get_state()))

    def _is_logged(self, step: int) -> bool:
        t = self._config.train
        return step % t.log_every == 0 or step in (1, t.num_steps)

    def _settle(self, dispatched: _Dispatched) -> None:
        """Reads the metrics of a dispatched step: logs them, or ends the run."""
        step, metrics, batch, position = dispatched
        if np.asarray(metrics.pop("halted")):
            self._halt(step, _as_lists(metrics), batch)
        self._tokens += int(metrics.pop("tokens"))
        if step == self._start + 1:
            self._clock.compiled(self._tokens)
        self._store.check()  # rather than at the next save, many steps later
        if self._is_logged(step):
            values: dict[str, Any] = {
                name: for_all_layers(self._config.model, name, x) if isinstance(x, list) else x
                for name, x in _as_lists(metrics).items()
            }
            values |= input_metrics(
                self._data,
                _of_all_processes(position),
                sequence_length=self._config.train.sequence_length,
            )
            values |= {"tokens": self._tokens, **self._clock.read(self._tokens)}
            self._writer.write(step, values)
            speed = values["tokens_per_second"]
            self._progress.update(step, loss=values["loss"], tokens_per_second=speed)

    def _halt(self, step: int, values: dict[str, Any], batch: Any) -> NoReturn:
        """Ends the run at a step that was halted."""
        # NaN activations are all routed to the same experts and overflow them: report the NaN.
        finite = np.isfinite([values["loss"], values["grad_norm"]]).all()
        if finite and values.get("dropped_assignments"):
            raise _overflow(step, values["dropped_assignments"], self._config)
        bad = first_bad_parameter(self._program.graph, self._config, self._state.params, batch)
        raise self._non_finite(
            f"The loss or its gradient is not finite at step {step} (loss {values['loss']}, "
            f"gradient norm {values['grad_norm']}). The first to be so is {bad}."
        )

    def _non_finite(self, problem: str) -> NonFiniteLossError:
        self._store.wait()
        last_good = self._store.latest_step()
        left = (
            f"There is no checkpoint yet in {self._workdir}: begin with a lower "
            "optimizer.learning_rate, more optimizer.warmup_steps or a smaller optimizer.clip_norm."
        )
        if last_good is not None:
            folder = self._workdir / "checkpoints"
            left = (
                f"The last good checkpoint, of step {last_good}, is in {folder}. The same command "
                "goes on from it by the same steps, which helps only if the machine was at fault. "
                "Else give another --workdir, a lower --config.optimizer.learning_rate, and "
                f"--config.train.initial_checkpoint={folder / str(last_good)}."
            )
        return NonFiniteLossError(f"{problem} {left}")

    def _poll_stop(self) -> bool:
        """Whether to save and leave after the step under way."""
        self._stopping = self._stopping or self._hooks.should_stop()
        return self._stopping

    @contextlib.contextmanager
    def _may_be_left(self) -> Iterator[None]:
        """For a hook, which raises `Stopped` when it finds that the run is asked to stop."""
        try:
            yield
        except Stopped:
            self._stopping = True

    def _due(self, step: int) -> _Due:
        t, hooks = self._config.train, self._hooks

        def due(every: int) -> bool:
            return step == t.num_steps or (every > 0 and step % every == 0)

        return _Due(
            evaluate=hooks.evaluate is not None and due(t.eval_every),
            save=due(t.checkpoint_every),
            suites=hooks.suites is not None and due(self._config.evaluation.every),
            sample=hooks.sample is not None and due(t.sample_every),
        )

    def _missed_hooks(self) -> _Due:
        """The hooks due at the step that the run resumes from whose results are in no file.

        They are missing if the run failed, was killed or was asked to stop before they ran.
        """
        step, folder = self._start, self._workdir
        if not step:
            return _Due()
        found = None
        if jax.process_index() == 0:  # which writes them
            files = (folder / "metrics.jsonl", folder / "samples.jsonl")
            found = [sorted(names_at(file, step)) for file in files]
        measured, sampled = exchange(found)[0]
        due = self._due(step)
        return _Due(
            evaluate=due.evaluate and "seconds/evaluation" not in measured,
            suites=due.suites and "seconds/suites" not in measured,
            sample=due.sample and "text" not in sampled,
        )

    def _evaluate_and_save(self, step: int, due: _Due) -> None:
        """Calls the hooks that are due, and saves if that is due; the step must be settled.

        Once the run is asked to stop, no further hooks are called, and the step is saved in any
        case.
        """
        hooks = self._hooks
        # A step is halted by its gradient, before the update. What the update made of rows that no
        # batch reads would be noticed late, or never.
        if step != self._saved and (bad := first_non_finite(self._state.params)):
            raise self._non_finite(
                f"The update of step {step} made parameters that are not finite, first of all "
                f"{bad}; it is not saved."
            )
        scores: dict[str, Any] = {}
        try:
            if hooks.evaluate and due.evaluate and not self._stopping:
                with self._may_be_left():
                    scores = hooks.evaluate(self._model())
            if scores:
                self._writer.write(step, scores | self._clock.taken("evaluation"))
            if due.save or self._poll_stop():
                self._save(step, scores)
            if hooks.suites and due.suites and not self._poll_stop():
                # Suites set the mesh themselves if they need it.
                with no_mesh(), self._may_be_left():
                    tested = hooks.suites(self._model())
                    self._writer.write(step, tested | self._clock.taken("suites"))
            if hooks.sample and due.sample and not self._poll_stop():
                # A few rows of text cannot be sharded over the mesh.
                with no_mesh(), self._may_be_left():
                    self._writer.write_samples(step, hooks.sample(self._model()))
                self._clock.spent_on("samples")
            if step != self._saved and self._poll_stop():
                self._save(step, scores)
        except Exception:
            # Save the step all the same; but not with several processes, since all must take part
            # in a save and the others may not have failed.
            if jax.process_count() == 1:
                self._save(step, scores)
            raise
        if due.evaluate or due.save or due.suites:
            if jax.process_index() == 0:
                hooks.report()
            self._clock.spent_on("report")

    def _save(self, step: int, scores: dict[str, Any]) -> None:
        """Saves a step, unless that was done or tried before."""
        if step == self._saved:
            return
        self._saved = step
        position = _of_all_processes(self._batches.get_state())
        extras = {"tokens": self._tokens, "data": position, **self._fingerprint}
        metric = scores.get("eval_ce")
        metric = None if metric is None else float(metric)  # which may be a number of NumPy or JAX
        self._store.save(step, self._state, extras, metric=metric)
        self._clock.spent_on("checkpoint")

    def _model(self) -> Qwen3Next:
        return nnx.merge(self._program.graph, self._state.params)


def _check_start(config: RunConfig, workdir: pathlib.Path) -> None:
    """Checks `initial_checkpoint` of a new run, or the steps of a run to be resumed."""
    t = config.train
    if (warmup := config.optimizer.warmup_steps) >= t.num_steps:
        logging.warning(
            "The learning rate will not reach its peak: optimizer.warmup_steps=%d, and "
            "train.num_steps=%d",
            warmup,
            t.num_steps,
        )
    if t.initial_checkpoint and not has_steps(workdir):
        check_same_model(t.initial_checkpoint, config.model, _new_parameters(config))
    if (last := last_step(workdir)) > t.num_steps:
        raise ValueError(
            f"train.num_steps={t.num_steps} lies before the checkpoint of step {last} in "
            f"{workdir}; give at least that, or begin another run in another --workdir"
        )


def _restore_or_initialize(
    config: RunConfig, program: Program, store: CheckpointStore, data: Data, batches: Any
) -> tuple[int, int, TrainState]:
    """The number of steps taken so far, of tokens trained on, and the state.

    They are those of the newest good checkpoint, and `batches` is set to its position in the data.
    A run without checkpoints starts from the weights of `initial_checkpoint`, or from random ones.
    """
    if store.latest_step() is None:
        given = config.train.initial_checkpoint
        if not given:
            return 0, 0, _random_state(config, program)
        state = _loaded_state(config, program)
        _check_finite(state, f"train.initial_checkpoint={given!r}", "give another one")
        return 0, 0, state
    start, state, extras = store.restore_latest(program.state)
    folder = store.directory / str(start)
    _check_finite(state, f"The checkpoint {folder}", "remove it to go on from an earlier one")
    if start < config.train.num_steps:
        check_same_data(data, extras)
        batches.set_state(extras["data"])
        logging.info("Going on from the checkpoint of step %d", start)
    return start, extras["tokens"], state


def _check_finite(state: TrainState, what: str, way_out: str) -> None:
    exchange(None)  # one process may have read its share long before another
    if bad := first_non_finite(state.params):
        raise NonFiniteLossError(
            f"{what} has parameters that are not finite, first of all {bad}; {way_out}"
        )


def _of_all_processes(shards: dict[str, Any]) -> dict[str, Any]:
    """The states of all shards of the data, gathered from the processes."""
    return {shard: state for states in exchange(shards) for shard, state in states.items()}


def _random_state(config: RunConfig, program: Program) -> TrainState:
    return _drawn(
        lambda: initial_state(nnx.state(new_model(config)), program.optimizer, config),
        program.state,
    )


def _drawn(create: Callable[[], Any], like: Any) -> Any:
    """What `create` draws, in its final sharding: no device ever holds the whole model."""
    shardings = jax.tree.map(lambda x: x.sharding, like)
    # It runs once, and XLA:CPU would spend half a minute optimising the random number generators.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(create, out_shardings=shardings, compiler_options=options)()


def _loaded_state(config: RunConfig, program: Program) -> TrainState:
    """Loads the parameters in their final sharding, with a new optimizer state."""
    logging.info("Beginning with the weights of %s", config.train.initial_checkpoint)
    names = _new_parameters(config)

    def chosen(params: nnx.State) -> dict[str, Any]:
        return {name: x for name, x in named_leaves(params) if name in names}

    new = {}
    if names:
        logging.info("Drawn instead: %s", ", ".join(sorted(names)))
        new = _drawn(lambda: chosen(nnx.state(new_model(config))), chosen(program.state.params))
    params = load_parameters(
        config.train.initial_checkpoint, config.model, program.state.params, new
    )
    shardings = jax.tree.map(lambda x: x.sharding, program.state)
    create = jax.jit(
        lambda p: initial_state(p, program.optimizer, config),
        out_shardings=shardings,
        donate_argnums=0,
    )
    return create(params)


def _new_parameters(config: RunConfig) -> set[str]:
    """The paths of the parameters that `train.new_parameters` means.

    Raises:
      ValueError: a glob matches none, or some are frozen.
    """
    t = config.train
    names = parameter_shapes(config.model) if t.new_parameters else ()
    new = matching_names(names, t.new_parameters, key="train.new_parameters")
    frozen = matching_names(
        names, t.frozen_parameters if new else (), key="train.frozen_parameters"
    )
    if both := sorted(new & frozen):
        raise ValueError(
            f"train.new_parameters and train.frozen_parameters both match {', '.join(both)}, which "
            "would stay as they are drawn; let one of them match less, such as 'groups/*/router' "
            "in place of '*/router'"
        )
    return new


def _log_program(config: RunConfig, mesh: Mesh, state: TrainState) -> None:
    """Logs sizes, the placement of the state, and the implementations in use."""
    trained, frozen = (
        sum(x.size for x in jax.tree.leaves(p)) for p in split_frozen(state.params, config)
    )
    logging.info(
        "%s parameters%s, %s of training state, on %d %s devices, mesh %s",
        f"{trained + frozen:,}",
        f" ({frozen:,} frozen)" if frozen else "",
        f"{sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 1e9:.3f} GB",
        mesh.size,
        mesh.devices.flat[0].platform,
        dict(mesh.shape),
    )
    if mesh.size > 1:
        logging.info(
            "Where the training state lies:\n%s", describe_layout(named_leaves(state), mesh.shape)
        )
    t, compute = config.train, config.precision.compute
    used = implementations(
        config.model,
        mesh,
        rows=t.micro_batch_size,
        tokens=t.sequence_length,
        dtype=jnp.dtype(compute),
    )
    used["compute"] = compute
    logging.info("Implementations: %s", "; ".join(f"{of}: {name}" for of, name in used.items()))


def _overflow(step: int, dropped: float, config: RunConfig) -> ExpertOverflowError:
    return ExpertOverflowError(
        f"At step {step}, {dropped:,.0f} assignments of tokens to experts found no place in the "
        f"receive buffers of mesh.moe_buffer_factor={config.mesh.moe_buffer_factor}, and the step "
        "was not taken. Raise the factor (-1: room for whatever comes), or let them be dropped "
        'and counted by mesh.on_overflow="drop"; the same command then goes on from the last '
        "checkpoint."
    )


def _as_lists(metrics: dict[str, jax.Array]) -> dict[str, Any]:
    """Metrics as floats; those with a value for each layer as lists."""
    return {name: np.asarray(x).tolist() for name, x in metrics.items()}
