"""``make bench``: what every way of teaching a compressed model brings, and what it costs."""
