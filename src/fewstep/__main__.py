"""``python -m fewstep`` is the console script."""

from fewstep.cli.main import main

if __name__ == "__main__":
    main()
