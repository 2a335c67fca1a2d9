"""What the network is: plans, configs, contracts (pure) and the torch modules of each stage."""
