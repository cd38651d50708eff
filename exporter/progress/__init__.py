"""Tells the person who waits for a run where it is: events, the run's place and speed, and three ways to show them.

A stage's process counts steps (:mod:`exporter.processes.progress`); the run adds its own place and the time left
(:mod:`exporter.progress.run_progress`), and a view shows each event (:mod:`exporter.progress.views`).
"""
