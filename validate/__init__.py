"""Proof: runs files in their own runtimes and measures what they became. Imports nothing that compresses."""

from compressors.model import quiet_libraries as quiet_libraries
