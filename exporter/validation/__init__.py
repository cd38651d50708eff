"""``moe-export validate``: any file of a model, compared with the original before and while it runs."""
