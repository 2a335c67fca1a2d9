"""The routers of layers, one file for each way to compute gates: ``plan.routing.ROUTERS``."""
