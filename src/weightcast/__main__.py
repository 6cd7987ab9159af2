"""`python -m weightcast` is the `weightcast` command."""

from weightcast.cli import main

if __name__ == "__main__":
    main()
