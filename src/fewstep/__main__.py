"""``python -m fewstep`` is the console script."""

from fewstep.distill.cli import main

main()
