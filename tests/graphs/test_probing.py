"""What readings decide, in plain numbers: no model, no graph."""

from dataclasses import replace

import numpy as np
from visistage.graphs.plan.probing import Decision
from visistage.graphs.plan.stages import Probe

PROBE = Probe(first=2, cosine=0.9, contribution=0.5, exit_cosine=0.99)


def decide(probe, *readings):
    """A decision after readings (cosines, norms) of the layers from 2 on."""
    decision = Decision(probe)
    for layer, (cosines, norms) in enumerate(readings, start=2):
        decision.read(layer, np.array(cosines), np.array(norms))
    return decision


LOUD, QUIET = ([0.95], [0.0]), ([0.995], [0.0])
TRIGGER = ([0.5, 0.99, 0.99], [0.5, 0.6, 0.7])


def test_the_first_layer_below_the_threshold_selects():
    decision = decide(PROBE, ([0.9, 0.95, 0.99], [9, 9, 9]), TRIGGER)
    assert decision.trigger == 3
    assert decision.kept.tolist() == [1, 2]  # more than the threshold, and not the one that fired
    assert decision.norms.tolist() == [0.5, 0.6, 0.7]
    assert decide(replace(PROBE, strict=False), TRIGGER).kept.tolist() == [0, 1, 2]
    assert decide(PROBE, LOUD, QUIET).trigger is None
    assert decide(replace(PROBE, contribution=1.0), TRIGGER).kept.tolist() == []


def test_quiet_layers_count_from_the_one_after_the_trigger():
    assert decide(PROBE, TRIGGER, QUIET).exit is None
    assert decide(PROBE, TRIGGER, QUIET, QUIET).exit == 4
    assert decide(PROBE, QUIET, TRIGGER, QUIET, QUIET).exit == 5
    assert decide(replace(PROBE, exit_layers=1), TRIGGER, QUIET).exit == 3
    empty = ([], [])
    assert decide(PROBE, TRIGGER, empty, empty).exit == 4  # no token, no effect


def test_cumulative_and_consecutive_counts():
    readings = (TRIGGER, QUIET, LOUD, QUIET, QUIET)
    assert decide(PROBE, *readings).exit == 5
    assert decide(replace(PROBE, consecutive=True), *readings).exit == 6


def test_the_released_code_lets_no_vision_leave_that_it_kept_whole():
    whole = (replace(PROBE, contribution=0.1), replace(PROBE, contribution=0.1, whole_leaves=False))
    assert [decide(probe, TRIGGER, QUIET, QUIET).exit for probe in whole] == [4, None]
    assert decide(whole[1], TRIGGER).settled
    assert decide(replace(PROBE, whole_leaves=False), TRIGGER, QUIET, QUIET).exit == 4


def test_a_decision_is_settled_when_nothing_can_change_it():
    never = replace(PROBE, exit_cosine=None)
    assert not decide(never, LOUD).settled
    assert decide(never, TRIGGER).settled
    assert not decide(PROBE, TRIGGER).settled
    done = decide(PROBE, TRIGGER, QUIET, QUIET, LOUD, QUIET, QUIET)
    assert done.settled
    assert done.exit == 4
    assert decide(never, TRIGGER, QUIET, QUIET).exit is None
