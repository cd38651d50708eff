"""The stages: each is a function of the files that it declares in ``table.py``, and writes files of its own.

Their code is in sub-packages: ``teacher/`` runs the original, ``student/`` makes it smaller and trains it, ``files/``
writes and tunes the files, ``judge/`` measures them, ``search/`` looks for the best recipe.
"""
