"""Where reference log-probabilities come from: models beside the policy, a scoring, a cache."""
