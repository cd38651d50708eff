"""Files that were damaged in one place each, and whether the static checks of ``moe-export validate`` say which."""
