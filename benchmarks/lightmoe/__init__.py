"""Replaced experts beside pruned, merged, narrower and coarser ones, each with and without the same training."""
