"""The trained blocks that tests of compressing methods use."""

from tests.compressors.conftest import trained_block as trained_block
