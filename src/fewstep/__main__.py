"""``python -m fewstep`` is the console script."""

from fewstep.distill.cli import main

if __name__ == "__main__":
    main()
