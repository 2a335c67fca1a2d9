"""The plan that the data supports: candidates measured, and confirmed on samples held out.

``Choice.to_dict`` is what a calibration keeps (``choice``; {} where the plan was given, not
chosen). Shares are of 1, not per cent.

    budget        {"lose": 0.01} or {"cost": 0.5}
    agreement     what "lose" counts: "tokens" (teacher-forced, see calib/agreement.py)
    cost          what "cost" counts: "visual FLOPs as the graphs run them, dense = 1"
    max_tokens    longest answer that was compared
    samples       {"choosing": n, "held_out": n}
    plan          the chosen plan, StagePlan.to_dict()
    text          the same as one can type it: "visipruner:shallow=false,t=4,e=6,keep=16", "dense"
    fits          whether a pruned plan kept the budget; false: dense was taken
    reasons       {"s", "t", "K", "e"}: a sentence each
    warnings      sentences; what should be known before the choice is trusted
    chosen        index into candidates, or null for dense
    candidates    by cost, ascending:
      text, name  as above; the plan's name
      s, t, keep, e
                  text-blind layers, last layer with all tokens, K, last layer with any
      cost        share of dense visual FLOPs
      visual_flops
      predicted   share of the visual tokens' influence that the plan cuts off, from dynamics alone
      measured    on the choosing samples: an Agreement, see below
      held_out    the same on the samples held out, or null where it was not tried
      front       whether no other candidate is cheaper and agrees as well
      verdict     "chosen", "near miss: ...", or "" where there is nothing to say

    Agreement     {"prompts": n,
                   "tokens": {"right", "total", "share", "low", "high"},    low, high: Wilson 95 %
                   "answers": the same, of whole answers,
                   "kl": mean nats per token,
                   "divergences": {"0": n, ...}  prompts by the token at which they first differ}
"""
