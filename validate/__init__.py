"""Proves files: runs them in their own runtimes and measures them. Imports nothing that compresses."""

from compressors.model import quiet_libraries as quiet_libraries
