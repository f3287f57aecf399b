"""One file per objective: one subclass of ``ObjectiveConfig``, whose ``build`` returns the ``Objective``.

Objectives are found by file name: to add one, add a file. No other module depends on any of these files.
"""
