"""Runs tasks that the user supplies, by lm-evaluation-harness on our backends."""
