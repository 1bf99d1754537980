"""Ends a run as `kill -9` does, at a step of its choice."""

import contextlib

import pytest

from experiments.training import steps


@contextlib.contextmanager
def killed(monkeypatch, when):
    """Context manager: ends a run inside before its first step with when(config, task, step)."""
    build = steps.build

    class Killed(BaseException):
        pass

    def breaking(config, seq_len, devices=None, task=None):
        program = build(config, seq_len, devices, task)
        step = program.train_step

        def train_step(state, batch):
            if when(config, task, int(state.step)):
                raise Killed
            return step(state, batch)

        object.__setattr__(program, "train_step", train_step)
        return program

    monkeypatch.setattr(steps, "build", breaking)
    with pytest.raises(Killed):
        yield
    monkeypatch.undo()
