"""Tasks that the user supplies, run by lm-evaluation-harness on our backends."""
