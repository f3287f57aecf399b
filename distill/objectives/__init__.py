"""One file a method. A file has ``Config`` (its settings), ``NEEDS`` (the roles it reads) and ``build``.

Files are found by name, so adding a method is adding a file, and deleting one breaks nothing else.
"""
