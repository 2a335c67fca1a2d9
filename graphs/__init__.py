"""The network: plans, configs, contracts (pure) and the torch modules of each stage."""
