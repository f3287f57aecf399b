"""One file a method. A file has ``Config`` (an ``ObjectiveConfig``) and ``build(config, roles) -> Objective``.

Files are found by name, so adding a method is adding a file, and deleting one breaks nothing else.
"""
