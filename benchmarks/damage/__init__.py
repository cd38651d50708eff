"""Damages files in one place each, and tests whether the static checks of ``moe-export validate`` name it."""
