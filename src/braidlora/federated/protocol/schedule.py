"""The learning rate of each round."""

from __future__ import annotations

import math

from braidlora.config import FederatedConfig


def rate_multiplier(config: FederatedConfig, round: int) -> float:
    """m(t), by which round t, counted from 1, multiplies `training.learning_rate`; formulas in RateScheduleSection."""
    schedule, done = config.federation.lr_schedule, round - 1
    if schedule.decay == "constant":
        return 1.0
    if schedule.decay == "exponential":
        assert schedule.factor is not None
        return schedule.factor**done
    if schedule.decay == "step":
        assert schedule.factor is not None
        assert schedule.every is not None
        return float(schedule.factor ** (done // schedule.every))
    floor, over = schedule.floor or 0.0, done / config.federation.rounds
    falling = 1.0 - over if schedule.decay == "linear" else (1.0 + math.cos(math.pi * over)) / 2.0
    return floor + (1.0 - floor) * falling


def learning_rate(config: FederatedConfig, round: int) -> float:
    """The rate at the start of round t, which `training.scheduler` then shapes within the round."""
    return config.training.learning_rate * rate_multiplier(config, round)
