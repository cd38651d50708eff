"""The stages' order, the processes that they run in, and the work folder that lets a killed run go on."""
