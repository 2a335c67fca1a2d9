"""Dynamics with a known answer, and measurements that only that answer passes."""

import numpy as np
from visistage.calib.evaluate import Share
from visistage.calib.plan_search.agreement import Agreement
from visistage.calib.plan_search.candidates import Pricing
from visistage.calib.plan_search.dynamics import PromptReading
from visistage.graphs.plan.cost import Geometry
from visistage.graphs.plan.plan import StagePlan

LAYERS, TOKENS = 10, 24
T, K, E = 4, 6, 7


def pricing(layers=LAYERS, tokens=TOKENS):
    return Pricing(Geometry(layers, 64, 128, 300), tokens)


def planted(rng, t=T, k=K, e=E, layers=LAYERS, tokens=TOKENS):
    """Up to layer t all tokens count a little, from t to e the same k a lot, then none."""
    cosines = np.full((layers, tokens), 0.99999, np.float32)
    norms = rng.random((layers, tokens)).astype(np.float32) * 0.01
    strong = rng.permutation(tokens)[:k]
    cosines[1:t] = 0.997
    norms[1:t] += 0.1
    cosines[t : e + 1, strong] = 0.93
    norms[t : e + 1, strong] = 1 + rng.random((e + 1 - t, k))
    return PromptReading(cosines, norms)


def agree(share, total=200, kl=None):
    right = round(share * total)
    return Agreement(
        Share(right, total),
        Share(right, total),
        1 - share if kl is None else kl,
        (None,) * right + (0,) * (total - right),
    )


def truth(plan: StagePlan) -> float:
    """All is well from the planted t, K and e on; before them something is lost."""
    keep = plan.keep if plan.keep is not None else (TOKENS if plan.exit == LAYERS - 1 else 0)
    lost = 0.06 * max(0, T - plan.trigger) + 0.03 * max(0, E - plan.exit)
    if plan.trigger < E:
        lost += 0.05 * max(0, K - keep) / K
    return 1 - lost


class Recorder:
    """A measurement that notes what it was asked."""

    def __init__(self, of=truth):
        self.of, self.plans = of, []

    def __call__(self, plan):
        self.plans.append(plan)
        return agree(self.of(plan))
