"""Configurations: what is out of range is refused, and all of it can be written as JSON."""

import json
from enum import Enum
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from semanticblur_core.config import FinetuneConfig, ModelConfig, TrainConfig
from semanticblur_core.errors import ConfigError


class Schedule(str, Enum):  # noqa: UP042 - its text is not its value, which is the point
    COSINE = "cosine"


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ModelConfig, {"semantic_channels": np.int32(40), "backbone": np.str_("resnet34")}),
        (TrainConfig, {"epochs": np.int64(3), "learning_rate": np.float32(0.5), "ema_decay": 0}),
        (TrainConfig, {"schedule": Schedule.COSINE}),
        (FinetuneConfig, {"seed": np.uint8(7), "ema_decay": np.float64(0.5)}),
        (FinetuneConfig, {"replay_weight": Fraction(1, 2), "drift_limit": np.int16(1)}),
    ],
)
def test_numbers_of_other_libraries_become_those_of_json(kind: Any, values: Any) -> None:
    config = kind(**values)
    written = config.to_dict()
    assert {name: written[name] for name in values} == values
    assert {type(value) for value in written.values()} <= {int, float, bool, str}
    assert kind.from_dict(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 1.0}, "epochs: expected a whole number, got 1.0"),
        ({"epochs": True}, "epochs: expected a whole number, got True"),
        ({"learning_rate": "1"}, "learning_rate: expected a number, got '1'"),
        ({"frozen_statistics": 1}, "frozen_statistics: expected true or false, got 1"),
        ({"schedule": 1}, "schedule: expected text, got 1"),
    ],
)
def test_values_of_another_type_are_refused(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)
