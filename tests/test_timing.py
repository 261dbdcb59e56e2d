"""Every second of a run is booked once."""

from qwen3next_jax.training import timing


def test_every_second_between_two_lines_is_spent_on_one_thing(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "monotonic", lambda: now[0])
    clock = timing.Clock(100)

    def spend(seconds, what):
        now[0] += seconds
        clock.spent_on(what)

    spend(6, "samples")  # made up for by a run that goes on
    spend(3, "data")
    spend(20, "step")
    clock.compiled(200)
    first = clock.read(200)
    assert first["seconds/compile"] == 23
    assert first["seconds/samples"] == 6
    assert first["tokens_per_second"] == 0  # no step but the one that compiled
    for _ in range(2):
        spend(1, "data")
        spend(4, "step")
    now[0] += 7
    assert clock.taken("evaluation") == {"seconds/evaluation": 7}
    spend(2, "checkpoint")
    assert clock.read(500) == {
        "tokens_per_second": 30,
        "data_wait": 0.2,
        "seconds/data": 2,
        "seconds/step": 8,
        "seconds/checkpoint": 2,
    }
