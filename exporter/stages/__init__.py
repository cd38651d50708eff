"""The stages: each is a function of the files that it declares in ``table.py``, and writes files of its own.

Their code stands in rooms: ``teacher/`` runs the original, ``student/`` makes it smaller and teaches it, ``files/``
writes and tunes the files, ``judge/`` measures them, ``search/`` looks for the best recipe.
"""
