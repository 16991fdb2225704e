"""From a request to a decision: campaigns, candidates, inputs, checks, timers, isolation, budget."""
