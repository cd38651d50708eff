"""``python -m exporter`` is ``moe-export``."""

from exporter.cli import main

if __name__ == "__main__":
    main()
