"""How a run spends its time: seconds by activity, and a profiler trace of some steps."""

import pathlib
import time

import jax


class Clock:
    """Measures how the time is spent: every second belongs to one activity."""

    def __init__(self, tokens: int):
        """Starts the clock of a run that has trained on so many tokens."""
        self._last, self._tokens = time.monotonic(), tokens
        self._spent: dict[str, float] = {}

    def spent_on(self, what: str) -> None:
        """Books the time since the last call on an activity."""
        now = time.monotonic()
        self._spent[what] = self._spent.get(what, 0.0) + now - self._last
        self._last = now

    def compiled(self, tokens: int) -> None:
        """Books the first step and its data as compilation: they are no measure of speed."""
        self.spent_on("step")
        self._spent["compile"] = self._spent.pop("step") + self._spent.pop("data", 0.0)
        self._tokens = tokens

    def taken(self, what: str) -> dict[str, float]:
        """Books the time since the last call; returns it as a metric, which `read` leaves out."""
        self.spent_on(what)
        return {f"seconds/{what}": self._spent.pop(what)}

    def read(self, tokens: int) -> dict[str, float]:
        """Metrics since the last read, after so many tokens in all; then starts anew.

        They are tokens_per_second, data_wait (the share of the steps' time spent waiting for data)
        and seconds/WHAT of each activity.
        """
        self.spent_on("step")
        step, data = self._spent["step"], self._spent.get("data", 0.0)
        seconds = {f"seconds/{what}": value for what, value in self._spent.items()}
        speed = (tokens - self._tokens) / max(step + data, 1e-9)
        self._tokens, self._spent = tokens, {}
        return {
            "tokens_per_second": speed,
            "data_wait": data / max(step + data, 1e-9),
            **seconds,
        }


class Profile:
    """A profiler trace of the steps from `steps[0]` to `steps[1]`, as far as they are taken."""

    def __init__(self, directory: pathlib.Path, steps: tuple[int, ...], last: int):
        """Prepares a trace for `directory`, of no step if `steps` is (); `last` ends the run."""
        self._directory, self._tracing = directory, False
        self._first, self._last = (steps[0], min(steps[1], last)) if steps else (0, -1)

    def before(self, step: int) -> None:
        """Starts the trace before its first step."""
        if not self._tracing and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._directory))
            self._tracing = True

    def ends_at(self, step: int) -> bool:
        """Whether a step is the last to be traced."""
        return self._tracing and step == self._last

    def close(self) -> None:
        """Ends the trace and writes it, if it is running."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
